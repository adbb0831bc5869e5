"""The prepare stage: pairs tokenised once, with their log-probabilities under the model before alignment.

DPO's reference never changes, so its values are columns of a table like any other. One pass over slices of
`scored` makes both: Ray Data actors that hold the model tokenise their pairs and run them; if the objective
needs no reference, plain tasks tokenise. The rows are sorted by image when the parts are merged, and indexed
(:mod:`~mmedpo_ray.align.data.pair_index`). The table is skipped if model, template, processing, precision and
length are those it was made with.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from rich.markup import escape

from mmedpo_ray.align.data import tokenise
from mmedpo_ray.align.data.batch import ImageLoader, pack_pairs, read_ahead
from mmedpo_ray.align.data.pair_index import VISUAL, ensure_index, index_pairs
from mmedpo_ray.align.data.token_counts import TokenCounts
from mmedpo_ray.align.losses import reference_source
from mmedpo_ray.align.packing.logps import response_logps, use_packed_forward
from mmedpo_ray.align.packing.trees import PackedTrees
from mmedpo_ray.align.plan.balance import Limits, balance
from mmedpo_ray.align.plan.preview import announce_ahead
from mmedpo_ray.align.plan.resources import check_cluster, wants_gpu
from mmedpo_ray.align.policy import check_model
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.compat.cluster import MODEL_RESTARTS
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.models.fingerprint import model_files
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.joins import BySample
from mmedpo_ray.tables.provenance import MADE_WITH, MODEL_FILES, SCORED, changes
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import map_slices, plan_slices, read_slices
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner, read_manifest

# Forward passes in the rows that an actor gets at once: what a crash costs. A large table has larger slices,
# or they would be too many for the driver: then every worker gets about so many slices of at most so many
# rows.
_SLICE_FORWARDS = 8
_SLICES_PER_WORKER = 64
_MOST_ROWS = 2048

_ID = "tree_key"
# Raised when the table's columns change.
_COLUMNS_VERSION = 2
_RAW = schemas.with_drop_columns(schemas.PREPARED)
_ROWS = pa.schema([schemas.SCORED.field(name) for name in tokenise.COLUMNS])
_ANSWERS = pa.schema([schemas.SCORED.field(name) for name in ("sample_id", "kind", "rejected")])


def prepare(config: Config) -> Manifest:
    """Writes the `prepared` table of a run and its index.

    Before it loads a model it prints what the run will need.

    Rows that cannot be trained on (weight 0, prompt longer than ``align.max_length``, equal sides, an image
    placeholder in the text) go to ``dropped/`` with the reason.

    Raises:
        UserError: `scored` is missing, no row is left, a weight is invalid, an image cannot be read, or the
            cluster is too small.
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
            changed = escape(changes(before.extra.get(MADE_WITH), parts))
            console.print(
                f"[dim]{stage.name}: writing {run.prepared} again. Changed: {changed}[/dim]", soft_wrap=True
            )
        if reference_source(config.align) == "precomputed":
            announce_ahead(config)
        manifest = stage.write_rows(
            lambda done: _pipeline(config, done),
            schema=schemas.PREPARED,
            id_column=_ID,
            total=_rows_in(run.scored),
            extra=lambda _: {MADE_WITH: parts},
            extra_columns=(),
            intended_reasons=(tokenise.WEIGHT_ZERO,),
        )
    ensure_index(run.prepared, manifest)
    return manifest


def finished_table(config: Config) -> Manifest | None:
    """The manifest of the `prepared` table if it exists and is current; starts nothing.

    Raises:
        UserError: `scored` is missing.
    """
    manifest = read_manifest(RunFolder(config.run.folder).prepared)
    return manifest if manifest is not None and manifest.key == _stage(config).key else None


def preparation_settings(config: Config) -> dict[str, Any]:
    """What the table depends on besides `scored`."""
    align = config.align
    with_reference = reference_source(align) == "precomputed"
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
    """Everything that the table's key is a hash of, as its manifest keeps it."""
    scored = read_manifest(RunFolder(config.run.folder).scored)
    return {**preparation_settings(config), SCORED: scored.identity if scored is not None else None}


def _stage(config: Config) -> StageRunner:
    run = RunFolder(config.run.folder)
    settings = [preparation_settings(config)]
    return StageRunner("prepare", run.prepared, config, settings=settings, inputs=[run.scored])


def _rows_in(folder: str) -> int:
    manifest = read_manifest(folder)
    return manifest.rows_out if manifest else 0


def _pipeline(config: Config, done: IdSet) -> ray.data.Dataset | None:
    align, run = config.align, RunFolder(config.run.folder)
    total = _rows_in(run.scored)
    if len(done) >= total and not align.reversed_visual_coefficient:
        return None
    reader = _Reader(config.model.path, align, run.scored, done)
    if reference_source(align) != "precomputed":
        return map_slices([run.scored], _ROWS, reader.prepare, num_cpus=config.ray.data_cpus)
    few = min(align.pairs_per_forward * _SLICE_FORWARDS, -(-total // align.max_workers))
    rows = max(1, few, min(_MOST_ROWS, total // (align.max_workers * _SLICES_PER_WORKER)))
    # The actors read their slices themselves: separate tasks before them would take time to start.
    slices = plan_slices([run.scored], rows=rows)
    if not slices:
        return None
    use_gpu = wants_gpu(align)
    fewest, most = (min(count, len(slices)) for count in (align.min_workers, align.max_workers))
    return ray.data.from_blocks(slices).map_batches(
        ReferenceScorer,
        fn_constructor_kwargs={"reader": reader, "use_gpu": use_gpu},
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
        num_cpus=align.cpus_per_worker,
        num_gpus=1 if use_gpu else 0,
        **MODEL_RESTARTS,
    )


class _Reader:
    """Slices of `scored` → rows of `prepared`, in tasks; small, because it is sent to them.

    Args:
        model: as ``model.path``.
        align: lengths and coefficients.
        scored: folder of the table.
        done: keys of rows that are already written.
    """

    def __init__(self, model: str, align: AlignConfig, scored: str, done: IdSet) -> None:
        self.model, self.align, self._done = model, align, done
        self._answers = BySample([scored], _ANSWERS) if align.reversed_visual_coefficient else None

    def rows(self, slice_: pa.Table) -> list[dict[str, Any]]:
        """The prepared rows of a slice, dropped ones included."""
        rows: list[Any] = slice_.to_pylist()
        if self._answers is not None:
            # The text pair of a sample may be in another slice.
            samples = [row["sample_id"] for row in rows if row["kind"] == VISUAL]
            found = self._answers.rows(pa.chunked_array([samples], pa.string()))
            rows = tokenise.with_reversed_pairs(
                rows, tokenise.wrong_answers(row for group in found.values() for row in group)
            )
        if self._done:
            rows = [row for row in rows if tokenise.tree_key(row) not in self._done]
        return tokenise.prepare_rows(rows, _writer(self.model), self.align)

    def prepare(self, slice_: pa.Table) -> pa.Table:
        """The prepared rows as a table, without reference log-probabilities."""
        return schemas.to_table(self.rows(slice_), _RAW)


@functools.lru_cache(1)
def _writer(model: str) -> PromptWriter:
    """A process tokenises many slices."""
    return PromptWriter(load_processor(model))


class ReferenceScorer:
    """A Ray Data actor that holds the model.

    Args:
        reader: prepares the rows of a slice; has model and settings.
        use_gpu: whether it has a GPU.
    """

    def __init__(self, reader: _Reader, *, use_gpu: bool = False) -> None:
        align = reader.align
        torch.set_num_threads(align.threads_per_worker)
        self._reader = reader
        self._device = torch.device("cuda" if use_gpu else "cpu")
        dtype = torch.bfloat16 if align.precision == "bf16" else torch.float32
        model: Any = load_model(reader.model, dtype)  # mypy misreads transformers' decorated `to`
        self._model = model.to(self._device)
        use_packed_forward(self._model, attention=align.attention)
        self._writer = _writer(reader.model)
        self._images = ImageLoader(self._writer, threads=align.image_threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Planned slices of `scored` → rows of `prepared`."""
        rows = self._reader.rows(read_slices(batch, _ROWS))
        kept = sorted((row for row in rows if schemas.DROP_REASON not in row), key=lambda row: row[_ID])
        chunks = [[kept[member] for member in members] for members in self._forwards(kept)]
        # The images of the next forward are read during this one.
        for chunk, packed in zip(chunks, read_ahead(self._pack, chunks), strict=True):
            with torch.no_grad():
                logps = response_logps(self._model, packed.to(self._device)).logps.tolist()
            for row, chosen, rejected in zip(chunk, logps[: len(chunk)], logps[len(chunk) :], strict=True):
                row["ref_chosen_logp"], row["ref_rejected_logp"] = chosen, rejected
        return schemas.to_table(rows, _RAW)

    def _forwards(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """The rows of every forward pass, by the limits of training; rows without weight are in none."""
        pairs, starts = index_pairs(schemas.to_table(rows, schemas.PREPARED))
        sizes = np.diff(np.append(starts, len(pairs)))
        counts = TokenCounts(pairs, np.repeat(np.arange(len(starts)), sizes), both_sides=True)
        trees = [
            [member for member in range(start, start + size) if pairs["weight"][member] > 0]
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)
        ]
        return [members for members in balance(trees, counts, 1, Limits.of(self._reader.align)) if members]

    def _pack(self, rows: list[dict[str, Any]]) -> PackedTrees:
        pairs = [tokenise.make_pair(row, self._writer) for row in rows]
        return pack_pairs(pairs, self._images, self._writer.pad_token_id, both_sides=True)
