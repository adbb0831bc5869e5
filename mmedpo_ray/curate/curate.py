"""The station `curate`: `samples` → `pairs`, of text (a dispreferred answer) and visual (a dispreferred image).

Each train sample is planned for one text pair, each train image for some visual pairs; every planned pair ends in the
table or in `dropped/`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray import joins, storage, tables
from mmedpo_ray.cluster import has_gpu
from mmedpo_ray.config import Config
from mmedpo_ray.curate import candidates
from mmedpo_ray.curate.hallucinate import stable_seed
from mmedpo_ray.curate.text_pairs import prepare, text_pairs
from mmedpo_ray.curate.tools import TOOLS
from mmedpo_ray.curate.visual import VisualPairs
from mmedpo_ray.errors import UserError
from mmedpo_ray.parts import DoneIds
from mmedpo_ray.run_folder import RunFolder
from mmedpo_ray.seen_ids import SeenIds
from mmedpo_ray.stage import MANIFEST, Manifest, Station, read_manifest

_IMAGES_PER_TASK = 256


def curate(config: Config) -> Manifest:
    """Makes the preference pairs of the run's train samples. Ray must be initialised.

    What the text method needs comes first, each in its own table: `candidates` sampled from the target model, `choices` and
    `rewrites` of a model behind an endpoint.

    Raises:
        UserError: `samples` is missing, has no train row, or no pair is left.
        DroppedShareError: too few samples give a pair.
    """
    run = RunFolder(config.run.folder)
    _check_samples(run.samples)
    inputs = prepare(config, lambda: train_samples(config, candidates.COLUMNS))
    settings = key_settings(config)
    for folder in (run.choices, run.rewrites):
        if folder in inputs and (asked := read_manifest(folder)) is not None:
            # Why a row was dropped decides about its pair as well, and is no part of the table's own state.
            settings.append(asked.dropped)
    station = Station("curate", run.pairs, config, settings=settings, inputs=inputs)
    if (manifest := station.finished()) is not None:
        return manifest

    def build(done: DoneIds) -> ray.data.Dataset | None:
        if not done:
            # A table of other settings names images that go now: it must not be taken for finished later.
            storage.remove(storage.join(run.pairs, MANIFEST))
            storage.remove(run.noised)
        parts = [part for part in (text_pairs(config, done), _visual_pairs(config, done)) if part is not None]
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else parts[0].union(*parts[1:])

    return station.write_rows(
        build,
        schema=tables.PAIRS,
        id_column="pair_id",
        extra=_Figures(),
    )


def key_settings(config: Config) -> list[Any]:
    """What the pairs depend on besides the tables they are made of.

    The endpoint is not among it: what it wrote is a table with a key of its own. Nor is how many images a tool gets at a time.
    """
    chosen = config.curate.model_dump(mode="json", exclude={"text": {"endpoint"}, "visual": {"batch_images"}})
    settings: list[Any] = [chosen, config.run.seed]
    if config.curate.visual.tool != "none":
        settings.append(TOOLS[config.curate.visual.tool].fingerprint(config))
    return settings


def train_samples(config: Config, columns: Sequence[str] = tuple(tables.SAMPLES.names)) -> pa.Table:
    """The train rows of `samples`, all questions of an image together.

    Args:
        config: all settings.
        columns: columns to read.

    Raises:
        UserError: the table is missing or has no train row.
    """
    folder = RunFolder(config.run.folder).samples
    wanted = dict.fromkeys(("image_id", "sample_id", *columns))
    train = storage.dataset(folder).to_table(columns=list(wanted), filter=pc.field("split") == "train")
    if train.num_rows == 0:
        raise _no_train_row(folder)
    return train.sort_by([("image_id", "ascending"), ("sample_id", "ascending")]).combine_chunks()


def _check_samples(folder: str) -> None:
    # `Station` says what to run where the table is missing.
    if read_manifest(folder) is not None and joins.num_rows(folder, split="train") == 0:
        raise _no_train_row(folder)


def _no_train_row(folder: str) -> UserError:
    return UserError(
        f"none of the {joins.num_rows(folder):,} samples is in the train split, so there is nothing to make pairs from. "
        "Lower data.test_share or check data.train_file."
    )


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


# ---------------------------------------------------------------------- visual pairs


def _visual_pairs(config: Config, done: DoneIds) -> ray.data.Dataset | None:
    settings = config.curate.visual
    if settings.tool == "none":
        return None
    planned = draw_visual_samples(train_samples(config), settings.per_image, config.run.seed)
    pair_ids = pc.binary_join_element_wise(planned["sample_id"], ":visual", "")
    planned = planned.filter(pc.invert(done.mask(pair_ids)))
    if planned.num_rows == 0:
        return None
    if not TOOLS[settings.tool].has_model:
        return ray.data.from_arrow(_slices(planned, _IMAGES_PER_TASK)).map_batches(
            VisualPairs(config),
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            num_cpus=config.ray.data_cpus,
        )
    return ray.data.from_arrow(_slices(planned, _IMAGES_PER_TASK)).map_batches(
        VisualPairs,
        fn_constructor_args=(config,),
        batch_format="pyarrow",
        batch_size=settings.batch_images,
        compute=ray.data.ActorPoolStrategy(size=config.model.engine.replicas),
        num_cpus=1,
        num_gpus=1 if has_gpu() else 0,
    )


# ---------------------------------------------------------------------- shared


def _slices(table: pa.Table, rows: int) -> list[pa.Table]:
    """Blocks of ``rows`` rows that travel alone."""
    return [table.slice(start, rows).combine_chunks() for start in range(0, table.num_rows, rows)]


class _Figures:
    """What the manifest tells of the table: pairs of each kind, who wrote the rejected side, images.

    A :class:`~mmedpo_ray.stage.Tally`; images are counted in eight bytes each.
    """

    columns = ("kind", "generator", "image_id")

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._generators: Counter[str] = Counter()
        self._images = SeenIds()

    def add(self, rows: pa.RecordBatch) -> None:
        self._kinds.update(rows["kind"].to_pylist())
        self._generators.update(rows["generator"].to_pylist())
        self._images.add(pc.unique(rows["image_id"]).to_pylist())

    def figures(self) -> dict[str, Any]:
        return {
            "kinds": dict(self._kinds),
            "generators": dict(self._generators),
            "images": len(self._images),
        }
