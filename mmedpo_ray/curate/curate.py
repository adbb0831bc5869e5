"""The station `curate`: `samples` → `pairs`, of text (a dispreferred answer) and visual (a dispreferred image).

Each train sample is planned for one text pair, each train image for some visual pairs; every planned pair ends in the
table or in `dropped/`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray import storage, tables
from mmedpo_ray.cluster import has_gpu
from mmedpo_ray.config import Config
from mmedpo_ray.curate.candidates import sample_candidates
from mmedpo_ray.curate.hallucinate import Candidate, released_pair, stable_seed, text_pair
from mmedpo_ray.curate.rule_edit import vocabulary_of
from mmedpo_ray.curate.tools import TOOLS
from mmedpo_ray.curate.visual import VisualPairs
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import model_fingerprint
from mmedpo_ray.run_folder import RunFolder
from mmedpo_ray.stage import Manifest, Station, read_table

_ROWS_PER_TASK = 2048
_IMAGES_PER_TASK = 256
_IMAGES_PER_TOOL_BATCH = 8
_CANDIDATE_FIELDS = ("candidate", "generator", "prompt_sha256", "seed")


def curate(config: Config) -> Manifest:
    """Makes the preference pairs of the run's train samples. Ray must be initialised.

    With ``curate.text.method: on_policy`` the target model is sampled first (table `candidates`).

    Raises:
        UserError: `samples` is missing, has no train row, or no pair is left.
        DroppedShareError: too few samples give a pair.
    """
    run = RunFolder(config.run.folder)
    method = config.curate.text.method
    inputs = [run.samples]
    samples = train_samples(config)
    if method == "on_policy":
        sample_candidates(config, samples)
        inputs.append(run.candidates)
    elif method == "released":
        inputs.append(run.released)
    settings: list[Any] = [config.curate, config.run.seed]
    if config.curate.visual.tool != "none" and TOOLS[config.curate.visual.tool].has_model:
        settings.append(model_fingerprint(config.model.path))
    station = Station("curate", run.pairs, config, settings=settings, inputs=inputs)
    if (manifest := station.finished()) is not None:
        return manifest

    def build(done: set[str]) -> ray.data.Dataset | None:
        if not done:
            storage.remove(run.noised)
        parts = [
            part
            for part in (_text_pairs(config, samples, done), _visual_pairs(config, samples, done))
            if part is not None
        ]
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else parts[0].union(*parts[1:])

    return station.write_rows(build, schema=tables.PAIRS, id_column="pair_id", extra=_count_pairs)


def train_samples(config: Config) -> pa.Table:
    """The train rows of `samples`, all questions of an image together.

    Raises:
        UserError: there is none.
    """
    samples = read_table(RunFolder(config.run.folder).samples, tables.SAMPLES, "samples")
    train = samples.filter(pc.equal(samples["split"], "train"))
    if train.num_rows == 0:
        raise UserError(
            f"none of the {samples.num_rows:,} samples is in the train split, so there is nothing to make pairs from. "
            "Lower data.test_share or check data.train_file."
        )
    return train.sort_by([("image_id", "ascending"), ("sample_id", "ascending")]).combine_chunks()


def draw_visual_samples(samples: pa.Table, per_image: int, seed: int) -> pa.Table:
    """Draws up to ``per_image`` questions of every image, by a hash of the seed and the sample's id."""
    order = [stable_seed(seed, "visual", name) for name in samples["sample_id"].to_pylist()]
    ranked = samples.append_column("_order", pa.array(order, pa.int64())).sort_by(
        [("image_id", "ascending"), ("_order", "ascending"), ("sample_id", "ascending")]
    )
    images = ranked["image_id"].to_numpy(zero_copy_only=False)
    starts = np.r_[True, images[1:] != images[:-1]]
    position = np.arange(len(images))
    rank = position - np.maximum.accumulate(np.where(starts, position, 0))
    return ranked.filter(pa.array(rank < per_image)).drop_columns(["_order"])


# ---------------------------------------------------------------------- text pairs


def _text_pairs(config: Config, samples: pa.Table, done: set[str]) -> ray.data.Dataset | None:
    settings = config.curate.text
    if settings.method == "none":
        return None
    schema = tables.with_drop_columns(tables.PAIRS)
    if settings.method == "released":
        planned = _without(_released_rows(config, samples), "pair_id", done)
        if planned.num_rows == 0:
            return None

        def keep(batch: pa.Table) -> pa.Table:
            rows = (released_pair(row, settings.max_length_ratio) for row in batch.to_pylist())
            return tables.to_table(rows, schema)

        return _map_tasks(planned, keep, config, _ROWS_PER_TASK)

    planned = samples
    if settings.method == "on_policy":
        planned = _with_candidates(config, samples)
    planned = _without(
        planned, "sample_id", {name.removesuffix(":text") for name in done if name.endswith(":text")}
    )
    if planned.num_rows == 0:
        return None
    vocabulary = ray.put(_vocabulary(config, samples))
    seed = config.run.seed

    def make(batch: pa.Table) -> pa.Table:
        known = ray.get(vocabulary)
        rows = (text_pair(row, _candidates_of(row), settings, known, seed) for row in batch.to_pylist())
        return tables.to_table(rows, schema)

    return _map_tasks(planned, make, config, _ROWS_PER_TASK)


def _vocabulary(config: Config, samples: pa.Table) -> frozenset[str]:
    """The concepts of all reference answers, read in tasks."""

    def read(batch: pa.Table) -> pa.Table:
        return pa.table(
            {"concept": sorted(vocabulary_of(batch["answer"].to_pylist()))},
            pa.schema([("concept", pa.string())]),
        )

    found = _map_tasks(samples.select(["answer"]), read, config, _ROWS_PER_TASK)
    return frozenset(row["concept"] for row in found.iter_rows())


def _released_rows(config: Config, samples: pa.Table) -> pa.Table:
    released = read_table(RunFolder(config.run.folder).released, tables.PAIRS, "released")
    in_train = pc.is_in(released["sample_id"], value_set=samples["sample_id"].combine_chunks())
    return released.filter(in_train)


def _with_candidates(config: Config, samples: pa.Table) -> pa.Table:
    """Adds to each sample the list of its candidates, in order."""
    candidates = read_table(RunFolder(config.run.folder).candidates, tables.CANDIDATES, "candidates")
    lists = candidates.group_by("sample_id", use_threads=False).aggregate(
        [(name, "list") for name in _CANDIDATE_FIELDS]
    )
    positions = pc.index_in(samples["sample_id"], value_set=lists["sample_id"].combine_chunks())
    for name in _CANDIDATE_FIELDS:
        samples = samples.append_column(f"{name}_list", lists[f"{name}_list"].take(positions))
    return samples


def _candidates_of(row: dict[str, Any]) -> list[Candidate]:
    columns = [row.get(f"{name}_list") or [] for name in _CANDIDATE_FIELDS]
    return [Candidate(*values) for values in zip(*columns, strict=True)]


# ---------------------------------------------------------------------- visual pairs


def _visual_pairs(config: Config, samples: pa.Table, done: set[str]) -> ray.data.Dataset | None:
    settings = config.curate.visual
    if settings.tool == "none":
        return None
    planned = draw_visual_samples(samples, settings.per_image, config.run.seed)
    planned = _without(
        planned, "sample_id", {name.removesuffix(":visual") for name in done if name.endswith(":visual")}
    )
    if planned.num_rows == 0:
        return None
    if not TOOLS[settings.tool].has_model:
        return _map_tasks(planned, VisualPairs(config), config, _IMAGES_PER_TASK)
    return ray.data.from_arrow(_slices(planned, _IMAGES_PER_TASK)).map_batches(
        VisualPairs,
        fn_constructor_args=(config,),
        batch_format="pyarrow",
        batch_size=_IMAGES_PER_TOOL_BATCH,
        compute=ray.data.ActorPoolStrategy(size=config.model.engine.replicas),
        num_cpus=1,
        num_gpus=1 if has_gpu() else 0,
    )


# ---------------------------------------------------------------------- shared


def _without(table: pa.Table, column: str, names: set[str]) -> pa.Table:
    if not names:
        return table
    return table.filter(pc.invert(pc.is_in(table[column], value_set=pa.array(sorted(names), pa.string()))))


def _map_tasks(table: pa.Table, function: Any, config: Config, rows: int) -> ray.data.Dataset:
    """Runs a batch function over slices of a table in Ray tasks."""
    return ray.data.from_arrow(_slices(table, rows)).map_batches(
        function,
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=config.ray.data_cpus,
    )


def _slices(table: pa.Table, rows: int) -> list[pa.Table]:
    """Blocks of ``rows`` rows that travel alone."""
    return [table.slice(start, rows).combine_chunks() for start in range(0, table.num_rows, rows)]


def _count_pairs(pairs: pa.Table) -> dict[str, Any]:
    """Figures for the manifest: pairs of each kind, and who wrote the rejected side."""

    def counts(column: str) -> dict[str, int]:
        return {item["values"]: item["counts"] for item in pc.value_counts(pairs[column]).to_pylist()}

    return {
        "kinds": counts("kind"),
        "generators": counts("generator"),
        "images": pc.count_distinct(pairs["image_id"]).as_py(),
    }
