"""Log-probabilities of every pair under the model before alignment: computed once, by Ray Data actors.

DPO's reference never changes, so its values are a table like any other: `reference`, beside `scored`. It is skipped when
model, template, processing, precision and length are those it was made with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import ray
import torch

from mmedpo_ray import cluster, tables
from mmedpo_ray.align.batch import ImageLoader, Pair, forest_batch
from mmedpo_ray.align.logps import make_fast, response_logps
from mmedpo_ray.align.policy import objective_of
from mmedpo_ray.align.prepare import COLUMNS, Refusal, tokenise, with_reversed_pairs
from mmedpo_ray.config import AlignConfig, Config
from mmedpo_ray.models.loading import PromptWriter, load_model, load_processor, model_fingerprint
from mmedpo_ray.parts import DoneIds
from mmedpo_ray.run_folder import RunFolder
from mmedpo_ray.stage import Manifest, Station, digest, read_manifest, read_table

# Batches handed to an actor; inside, pairs of one image stay together.
_BATCH_FORWARDS = 8


def reference(config: Config) -> Manifest:
    """Writes the `reference` table of a run.

    Rows that cannot be trained on (prompt longer than ``align.max_length``, equal sides, an image placeholder in the
    text) go to ``dropped/`` with the reason.

    Raises:
        UserError: `scored` is missing, no row is left, or an image cannot be read.
    """
    run = RunFolder(config.run.folder)
    settings = reference_settings(config)
    station = Station("reference", run.reference, config, settings=[settings], inputs=[run.scored])
    if (manifest := station.finished()) is not None:
        return manifest
    scored = read_manifest(run.scored)
    return station.write_rows(
        lambda done: _pipeline(config, done, digest(settings)),
        schema=tables.REFERENCE,
        id_column="pair_id",
        total=scored.rows_out if scored else None,
    )


def reference_settings(config: Config) -> dict[str, Any]:
    """What the values depend on besides the pairs."""
    return {
        "model": model_fingerprint(config.model.path),
        "precision": config.align.precision,
        "max_length": config.align.max_length,
        "common_token_weight": config.align.common_token_weight,
        "reversed_pairs": config.align.reversed_visual_coefficient > 0,
    }


def needs_reference_table(align: AlignConfig) -> bool:
    """Whether training reads reference log-probabilities from the table."""
    return (
        align.objective == "dpo" and align.reference == "precomputed" and objective_of(align).needs_reference
    )


def _pipeline(config: Config, done: DoneIds, key: str) -> ray.data.Dataset | None:
    align = config.align
    # The rows are small (no image bytes): handing them over directly spares the tasks that would read and split them.
    table = read_table(RunFolder(config.run.folder).scored, tables.SCORED, "scored").select(COLUMNS)
    if align.reversed_visual_coefficient:
        table = with_reversed_pairs(table)
    table = done.leave_out(table, "pair_id")
    if not table.num_rows:
        return None
    rows = min(align.pairs_per_forward * _BATCH_FORWARDS, -(-table.num_rows // align.max_workers))
    blocks = [table.slice(start, rows).combine_chunks() for start in range(0, table.num_rows, rows)]
    use_gpu = cluster.has_gpu() if align.use_gpu is None else align.use_gpu
    return ray.data.from_arrow(blocks).map_batches(
        ReferenceScorer,
        fn_constructor_kwargs={"model": config.model.path, "align": align, "key": key, "use_gpu": use_gpu},
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=min(align.min_workers, len(blocks))),
        num_cpus=align.cpus_per_worker,
        num_gpus=1 if use_gpu else 0,
    )


class ReferenceScorer:
    """A Ray Data actor that holds the model.

    Args:
        model: as ``model.path``.
        align: precision, lengths and batch size.
        key: goes into the table.
        use_gpu: whether it has a GPU.
    """

    def __init__(self, model: str, align: AlignConfig, key: str, *, use_gpu: bool = False) -> None:
        torch.set_num_threads(align.threads_per_worker)
        self._align = align
        self._key = key
        self._device = torch.device("cuda" if use_gpu else "cpu")
        dtype = torch.bfloat16 if align.precision == "bf16" else torch.float32
        policy: Any = load_model(model, dtype)  # mypy misreads transformers' decorated `to`
        self._model = policy.to(self._device)
        make_fast(self._model, attention=align.attention)
        self._writer = PromptWriter(load_processor(model))
        self._images = ImageLoader(self._writer)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows of `scored` → rows of `reference`."""
        pairs: list[Pair] = []
        rows: list[dict[str, Any]] = []
        for row in batch.to_pylist():
            tokens = tokenise(row, self._writer, self._align.max_length, self._align.common_token_weight)
            if isinstance(tokens, Refusal):
                rows.append(
                    {
                        "pair_id": row["pair_id"],
                        tables.DROP_REASON: tokens.reason,
                        tables.DROP_DETAIL: tokens.detail,
                    }
                )
            else:
                pairs.append(
                    Pair(
                        pair_id=row["pair_id"],
                        image_id=row["image_id"],
                        is_visual=row["kind"] != "text",
                        image_uri=row["image_uri"],
                        rejected_image_uri=row["rejected_image_uri"],
                        prompt=tokens.prompt,
                        chosen=tokens.chosen,
                        rejected=tokens.rejected,
                        weight=1.0,
                        chosen_weights=tokens.chosen_weights,
                        rejected_weights=tokens.rejected_weights,
                    )
                )
        rows += self._score(pairs)
        return tables.to_table(rows, tables.with_drop_columns(tables.REFERENCE))

    def _score(self, pairs: list[Pair]) -> Iterable[dict[str, Any]]:
        ordered = sorted(pairs, key=lambda pair: (pair.image_id, pair.pair_id))
        for start in range(0, len(ordered), self._align.pairs_per_forward):
            chunk = ordered[start : start + self._align.pairs_per_forward]
            sequences = forest_batch(chunk, self._images, self._writer.pad_token_id, both_sides=True)
            with torch.no_grad():
                logps = response_logps(self._model, sequences.to(self._device)).logps.tolist()
            for pair, chosen, rejected in zip(chunk, logps[: len(chunk)], logps[len(chunk) :], strict=True):
                yield {
                    "pair_id": pair.pair_id,
                    "ref_chosen_logp": chosen,
                    "ref_rejected_logp": rejected,
                    "key": self._key,
                }
