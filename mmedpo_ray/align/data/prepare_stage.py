"""The prepare stage: pairs tokenised once, with their log-probabilities under the model before alignment.

DPO's reference never changes, so its values are columns of a table like any other. One pass over slices of `scored` makes
both: Ray Data actors that hold the model tokenise their pairs and run them; where the objective needs no reference, plain
tasks tokenise. The rows are sorted by image when the parts are merged, which is the only time they change places, and
indexed (:mod:`~mmedpo_ray.align.data.pair_index`). The table is skipped when model, template, processing, precision and length are
those it was made with.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from rich.markup import escape

from mmedpo_ray.align.data.batch import ImageLoader, forest_batch, read_ahead
from mmedpo_ray.align.data.pair_index import TEXT, VISUAL, ensure_index, index_pairs
from mmedpo_ray.align.data.token_counts import TokenCounts
from mmedpo_ray.align.data.tokenise import (
    COLUMNS,
    WEIGHT_ZERO,
    Preparation,
    make_pair,
    prepare_rows,
    tree_key,
    with_reversed_pairs,
)
from mmedpo_ray.align.packing.logps import make_fast, response_logps
from mmedpo_ray.align.packing.trees import Forest
from mmedpo_ray.align.plan.balance import Limits, balance
from mmedpo_ray.align.plan.estimates import announce_ahead
from mmedpo_ray.align.plan.resources import check_cluster, wants_gpu
from mmedpo_ray.align.policy import check_model, objective_of
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.compat.cluster import MODEL_RESTARTS
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.models.loading import PromptWriter, load_model, load_processor, model_files
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.joins import BySample
from mmedpo_ray.tables.provenance import MADE_WITH, MODEL_FILES, SCORED, changes
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import map_slices, plan_slices, read_slices
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner, read_manifest

# Rows handed to an actor at once, in forward passes: what a crash costs it. Of a large table more, or the slices would be too
# many for the driver: then every worker gets about so many slices of at most so many rows.
_SLICE_FORWARDS = 8
_SLICES_PER_WORKER = 64
_MOST_ROWS = 2048

_ID = "tree_key"
# Raised when the table's columns change.
_COLUMNS_VERSION = 2
_RAW = schemas.with_drop_columns(schemas.PREPARED)
_ROWS = pa.schema([schemas.SCORED.field(name) for name in COLUMNS])
_ANSWERS = pa.schema([schemas.SCORED.field(name) for name in ("sample_id", "kind", "rejected")])


def prepare(config: Config) -> Manifest:
    """Writes the `prepared` table of a run and its index; before it loads a model it prints what the run will do and need.

    Rows that cannot be trained on (weight 0, prompt longer than ``align.max_length``, equal sides, an image placeholder in
    the text) go to ``dropped/`` with the reason.

    Raises:
        UserError: `scored` is missing, no row is left, a weight is impossible, an image cannot be read, or the cluster is too
            small.
    """
    run = RunFolder(config.run.folder)
    stage = _stage(config)
    manifest = stage.finished()
    if manifest is None:
        check_model(config.model.path, config.align)
        # The same workers train afterwards.
        check_cluster(config.align, use_gpu=wants_gpu(config.align))
        parts = made_with(config)
        if (before := read_manifest(run.prepared)) is not None and before.key != stage.key:
            console.print(
                f"[dim]{stage.name}: making {run.prepared} anew. Changed: "
                f"{escape(changes(before.extra.get(MADE_WITH), parts))}[/dim]",
                soft_wrap=True,
            )
        if needs_stored_reference(config.align):
            announce_ahead(config)
        manifest = stage.write_rows(
            lambda done: _pipeline(config, done),
            schema=schemas.PREPARED,
            id_column=_ID,
            total=_rows(run.scored),
            extra=lambda _: {MADE_WITH: parts},
            extra_columns=(),
            intended_reasons=(WEIGHT_ZERO,),
        )
    ensure_index(run.prepared, manifest)
    return manifest


def finished_table(config: Config) -> Manifest | None:
    """The manifest of the `prepared` table if it is there and current; nothing is started.

    Raises:
        UserError: `scored` is missing.
    """
    manifest = read_manifest(RunFolder(config.run.folder).prepared)
    return manifest if manifest is not None and manifest.key == _stage(config).key else None


def preparation_settings(config: Config) -> dict[str, Any]:
    """What the table depends on besides `scored`."""
    align = config.align
    with_reference = needs_stored_reference(align)
    return {
        MODEL_FILES: model_files(config.model.path),
        "reference log-probabilities": with_reference,
        "align.precision": align.precision if with_reference else None,
        "align.max_length": align.max_length,
        "align.common_token_weight": align.common_token_weight,
        "visual pairs": align.visual_coefficient > 0,
        "reversed pairs": align.reversed_visual_coefficient > 0,
        "pairs without weight": align.reduction == "mean",
        "columns": _COLUMNS_VERSION,
    }


def made_with(config: Config) -> dict[str, Any]:
    """All that the table's key is a hash of, as its manifest keeps it."""
    scored = read_manifest(RunFolder(config.run.folder).scored)
    return {
        **preparation_settings(config),
        SCORED: scored.identity if scored is not None else None,
    }


def needs_stored_reference(align: AlignConfig) -> bool:
    """Whether training reads reference log-probabilities from the table."""
    return (
        align.objective == "dpo" and align.reference == "precomputed" and objective_of(align).needs_reference
    )


def _stage(config: Config) -> StageRunner:
    run = RunFolder(config.run.folder)
    return StageRunner(
        "prepare", run.prepared, config, settings=[preparation_settings(config)], inputs=[run.scored]
    )


def _rows(folder: str) -> int:
    manifest = read_manifest(folder)
    return manifest.rows_out if manifest else 0


def _pipeline(config: Config, done: IdSet) -> ray.data.Dataset | None:
    align, run = config.align, RunFolder(config.run.folder)
    total = _rows(run.scored)
    if len(done) >= total and not align.reversed_visual_coefficient:
        return None
    reader = _Reader(config.model.path, Preparation.of(align), run.scored, done)
    if not needs_stored_reference(align):
        return map_slices([run.scored], _ROWS, reader.prepare, num_cpus=config.ray.data_cpus)
    rows = _slice_rows(total, align)
    # The actors read their slices themselves: a step of tasks before them would cost its start-up.
    slices = plan_slices([run.scored], rows=rows)
    if not slices:
        return None
    use_gpu = wants_gpu(align)
    few, many = (min(count, len(slices)) for count in (align.min_workers, align.max_workers))
    return ray.data.from_blocks(slices).map_batches(
        ReferenceScorer,
        fn_constructor_kwargs={"reader": reader, "align": align, "use_gpu": use_gpu},
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=few, max_size=many),
        num_cpus=align.cpus_per_worker,
        num_gpus=1 if use_gpu else 0,
        **MODEL_RESTARTS,
    )


def _slice_rows(total: int, align: AlignConfig) -> int:
    few = min(align.pairs_per_forward * _SLICE_FORWARDS, -(-total // align.max_workers))
    return max(1, few, min(_MOST_ROWS, total // (align.max_workers * _SLICES_PER_WORKER)))


class _Reader:
    """Slices of `scored` → rows of `prepared`, in tasks; small, for it travels to them.

    Args:
        model: as ``model.path``.
        how: what is wanted.
        scored: folder of the table.
        done: keys of rows that are already written.
    """

    def __init__(self, model: str, how: Preparation, scored: str, done: IdSet) -> None:
        self.model = model
        self._how = how
        self._done = done
        self._answers = BySample([scored], _ANSWERS) if how.with_reversed else None

    def rows(self, slice_: pa.Table, writer: PromptWriter) -> list[dict[str, Any]]:
        """The prepared rows of a slice, dropped ones among them."""
        rows: list[Any] = slice_.to_pylist()
        if self._answers is not None:
            rows = with_reversed_pairs(rows, self._wrong_answers(rows))
        if self._done:
            rows = [row for row in rows if tree_key(row) not in self._done]
        return prepare_rows(rows, writer, self._how)

    def prepare(self, slice_: pa.Table) -> pa.Table:
        """The same as a table, without reference log-probabilities."""
        return schemas.to_table(self.rows(slice_, _writer(self.model)), _RAW)

    def _wrong_answers(self, rows: list[dict[str, Any]]) -> dict[str, str]:
        """Rejected answers of the text pairs of these rows' samples, which may lie in another slice."""
        assert self._answers is not None
        samples = pa.chunked_array([[row["sample_id"] for row in rows if row["kind"] == VISUAL]], pa.string())
        found = self._answers.rows(samples)
        return {
            name: row["rejected"] for name, group in found.items() for row in group if row["kind"] == TEXT
        }


@functools.lru_cache(1)
def _writer(model: str) -> PromptWriter:
    """A process tokenises many slices."""
    return PromptWriter(load_processor(model))


class ReferenceScorer:
    """A Ray Data actor that holds the model.

    Args:
        reader: prepares the rows of a slice.
        align: precision and batch size.
        use_gpu: whether it has a GPU.
    """

    def __init__(self, reader: _Reader, align: AlignConfig, *, use_gpu: bool = False) -> None:
        torch.set_num_threads(align.threads_per_worker)
        self._reader = reader
        self._limits = Limits.of(align)
        self._device = torch.device("cuda" if use_gpu else "cpu")
        dtype = torch.bfloat16 if align.precision == "bf16" else torch.float32
        policy: Any = load_model(reader.model, dtype)  # mypy misreads transformers' decorated `to`
        self._model = policy.to(self._device)
        make_fast(self._model, attention=align.attention)
        self._writer = PromptWriter(load_processor(reader.model))
        self._images = ImageLoader(self._writer, threads=align.image_threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Planned slices of `scored` → rows of `prepared`."""
        rows = self._reader.rows(read_slices(batch, _ROWS), self._writer)
        kept = sorted((row for row in rows if schemas.DROP_REASON not in row), key=lambda row: row[_ID])
        chunks = [[kept[member] for member in members] for members in self._forwards(kept)]
        # The images of the next forward are read during this one.
        for chunk, forest in zip(chunks, read_ahead(self._forest, chunks), strict=True):
            logps = self._score(forest)
            for row, chosen, rejected in zip(chunk, logps[: len(chunk)], logps[len(chunk) :], strict=True):
                row["ref_chosen_logp"], row["ref_rejected_logp"] = chosen, rejected
        return schemas.to_table(rows, _RAW)

    def _forwards(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Which rows go through the model at once, by the limits of training; those without weight do not."""
        pairs, starts = index_pairs(schemas.to_table(rows, schemas.PREPARED))
        sizes = np.diff(np.append(starts, len(pairs)))
        counts = TokenCounts(pairs, np.repeat(np.arange(len(starts)), sizes), both_sides=True)
        trees = [
            [member for member in range(start, start + size) if pairs["weight"][member] > 0]
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
        ]
        return [members for members in balance(trees, counts, 1, self._limits) if members]

    def _forest(self, rows: list[dict[str, Any]]) -> Forest:
        pairs = [make_pair(row, self._writer) for row in rows]
        return forest_batch(pairs, self._images, self._writer.pad_token_id, both_sides=True)

    def _score(self, forest: Forest) -> list[float]:
        """Log-probabilities of the chosen, then of the rejected responses, nats."""
        with torch.no_grad():
            return response_logps(self._model, forest.to(self._device)).logps.tolist()
