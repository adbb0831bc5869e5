"""The table `visual`: the visual pairs, as a stage of its own.

`pairs` copies its rows. So a change of the text pairs alone, such as an endpoint that answers on the second
run, leaves the heat maps and the noised images as they are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.compat.cluster import MODEL_RESTARTS, has_gpu
from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.seeds import stable_seed
from mmedpo_ray.curate.settings import VisualCurationConfig
from mmedpo_ray.curate.tool_registry import TOOLS
from mmedpo_ray.curate.visual.visual_pairs import RETRY_REASONS, VisualPairs
from mmedpo_ray.io import storage
from mmedpo_ray.radiology.finding_prompts import names_finding
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.manifest import counts_in_words
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import Skip, map_slices
from mmedpo_ray.tables.stage_runner import MANIFEST, Manifest, StageRunner

log = logging.getLogger(__name__)

_IMAGES_PER_TASK = 256
NO_FINDING_ASKED = "no question or answer names a finding, as curate.visual.questions=finding wants it"
# The key of the images in `noised`.
_IMAGES_OF = ".images_of.json"


def make_visual_pairs(config: Config, train_samples: Callable[[], pa.Table]) -> list[str]:
    """Makes the visual pairs that the settings ask for; returns the folder of their table, if there is one.

    Args:
        config: all settings.
        train_samples: gives the train rows of `samples`; called only if a pair must be made.

    Raises:
        UserError: `samples` is missing, or the tool cannot be used.
    """
    run = RunFolder(config.run.folder)
    if config.curate.visual.tool == "none":
        return []
    stage = StageRunner("visual", run.visual, config, settings=_key_settings(config), inputs=[run.samples])
    if (manifest := stage.finished()) is not None:
        _warn_of_none(manifest, config)
        return [run.visual]

    def build(done: IdSet) -> ray.data.Dataset | None:
        if not done:
            _make_room(run, stage.key)
        return _planned_pairs(config, train_samples(), done)

    # How many may be dropped is about all pairs, so `pairs` looks after it.
    manifest = stage.write_rows(
        build,
        schema=schemas.PAIRS,
        id_column="pair_id",
        allow_empty=True,
        retry_reasons=RETRY_REASONS,
        limit_dropped=False,
    )
    # What a killed task was writing.
    storage.remove_temporary(run.noised)
    _warn_of_none(manifest, config)
    return [run.visual]


def _warn_of_none(manifest: Manifest, config: Config) -> None:
    """Says that a tool gave no pair at all: training on text pairs alone is another method."""
    if not manifest.rows_in and config.curate.visual.questions == "finding":
        log.warning("curate: %s, so training would see text pairs alone.", NO_FINDING_ASKED)
    if manifest.rows_out or not manifest.rows_in:
        return
    tool = config.curate.visual.tool
    others = ", ".join(name for name in TOOLS if name != "dataset_mask")
    remedy = (
        "The data name no lesion masks: add them to the rows, or find lesions with "
        f"curate.visual.tool={others}"
        if set(manifest.dropped) == {"no_mask"}
        else f"{storage.join(RunFolder(config.run.folder).visual, 'dropped')} has the reason of each"
    )
    log.warning(
        "curate: none of the %s visual pairs of curate.visual.tool=%s could be made (%s), so training would "
        "see text pairs alone. %s; curate.visual.tool=none if that is meant.",
        f"{manifest.rows_in:,}",
        tool,
        counts_in_words(manifest.dropped),
        remedy,
    )


def finished_visual_pairs(config: Config, done: IdSet) -> ray.data.Dataset | None:
    """The rows of the table `visual` that are not done, kept and dropped; None without a tool or a row."""
    if config.curate.visual.tool == "none":
        return None
    folder = RunFolder(config.run.folder).visual
    return map_slices(
        [folder, storage.join(folder, "dropped")],
        schemas.with_drop_columns(schemas.PAIRS),
        Skip(done, "pair_id"),
        num_cpus=config.ray.data_cpus,
    )


def draw_visual_samples(samples: pa.Table, settings: VisualCurationConfig, seed: int) -> pa.Table:
    """Draws up to ``per_image`` of the questions of each image, by a hash of the seed and the sample's id."""
    if settings.questions == "finding":
        texts = zip(samples["question"].to_pylist(), samples["answer"].to_pylist(), strict=True)
        samples = samples.filter(pa.array([names_finding(*each) for each in texts], pa.bool_()))
    if not samples.num_rows:
        return samples
    order = [stable_seed(seed, "visual", name) for name in samples["sample_id"].to_pylist()]
    ranked = samples.append_column("_order", pa.array(order, pa.int64())).sort_by(
        [("image_id", "ascending"), ("_order", "ascending"), ("sample_id", "ascending")]
    )
    images = ranked["image_id"].to_numpy(zero_copy_only=False)
    starts = np.r_[True, images[1:] != images[:-1]]
    position = np.arange(len(images))
    rank = position - np.maximum.accumulate(np.where(starts, position, 0))
    return ranked.filter(pa.array(rank < settings.per_image)).drop_columns(["_order"])


def _make_room(run: RunFolder, key: str) -> None:
    """Deletes images of other settings, and says whose are made now.

    Images of an earlier attempt with the same settings stay and are overwritten with equal bytes, since a
    task that outlives its driver may still be writing there.
    """
    mark = storage.join(run.visual, _IMAGES_OF)
    try:
        if json.loads(storage.read_bytes(mark)) == key:
            return
    except (FileNotFoundError, ValueError):
        pass
    # Tables of other settings name images that go now: they must not be taken for finished later.
    for folder in (run.pairs, run.visual):
        storage.remove(storage.join(folder, MANIFEST))
    storage.remove(mark)
    storage.remove(run.noised)
    storage.write_bytes(mark, json.dumps(key).encode())


def _key_settings(config: Config) -> list[Any]:
    """Settings, seed and the state of the tool's files; the batch size changes last digits at most."""
    settings = config.curate.visual
    chosen = settings.model_dump(mode="json", exclude={"batch_images"})
    return [chosen, config.run.seed, TOOLS[settings.tool].fingerprint(config)]


def _planned_pairs(config: Config, samples: pa.Table, done: IdSet) -> ray.data.Dataset | None:
    settings = config.curate.visual
    planned = draw_visual_samples(samples, settings, config.run.seed)
    pair_ids = pc.binary_join_element_wise(planned["sample_id"], ":visual", "")
    planned = planned.filter(pc.invert(done.mask(pair_ids)))
    if planned.num_rows == 0:
        return None
    blocks = ray.data.from_blocks(_slices(planned, _IMAGES_PER_TASK))
    if not TOOLS[settings.tool].has_model:
        return blocks.map_batches(
            VisualPairs(config),
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            num_cpus=config.ray.data_cpus,
        )
    return blocks.map_batches(
        VisualPairs,
        fn_constructor_args=(config,),
        batch_format="pyarrow",
        batch_size=settings.batch_images,
        compute=ray.data.ActorPoolStrategy(size=config.model.engine.replicas),
        num_cpus=1,
        num_gpus=1 if has_gpu() else 0,
        **MODEL_RESTARTS,
    )


def _slices(table: pa.Table, rows: int) -> list[pa.Table]:
    """Blocks of ``rows`` rows that travel alone."""
    return [table.slice(start, rows).combine_chunks() for start in range(0, table.num_rows, rows)]
