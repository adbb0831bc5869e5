"""The stage `curate`: `samples` → `pairs`, of text (a dispreferred answer) and visual (a dispreferred image).

Each train sample is planned for one text pair, each train image for some visual pairs; every planned pair ends in the
table or in `dropped/`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.curate.text import candidates, rejections
from mmedpo_ray.curate.text.stage import prepare, text_pairs
from mmedpo_ray.curate.visual.stage import finished_visual_pairs, make_visual_pairs
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.tables import joins, schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner, read_manifest

_TURNED_DOWN = ".turned_down"


def curate(config: Config) -> Manifest:
    """Makes the preference pairs of the run's train samples. Ray must be initialised.

    What they are made of comes first, each in its own table: `candidates` sampled from the target model, `choices` and
    `rewrites` of a model behind an endpoint, and the `visual` pairs.

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
    inputs += make_visual_pairs(config, partial(train_samples, config))
    stage = StageRunner("curate", run.pairs, config, settings=settings, inputs=inputs)
    if (manifest := stage.finished()) is not None:
        return manifest
    counts = storage.join(run.pairs, _TURNED_DOWN, stage.key)

    def build(done: IdSet) -> ray.data.Dataset | None:
        made = (text_pairs(config, done, counts), finished_visual_pairs(config, done))
        parts = [part for part in made if part is not None]
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else parts[0].union(*parts[1:])

    manifest = stage.write_rows(
        build,
        schema=schemas.PAIRS,
        id_column="pair_id",
        extra=_Figures(counts),
    )
    storage.remove(storage.join(run.pairs, _TURNED_DOWN))
    if said := rejections.in_words(manifest.extra["turned_down"]):
        console.print(f"{'':<12} {said}", soft_wrap=True)
    return manifest


def key_settings(config: Config) -> list[Any]:
    """What the pairs depend on besides the tables they are made of.

    The endpoint is not among it: what it wrote is a table with a key of its own. The visual pairs are another.
    """
    chosen = config.curate.text.model_dump(mode="json", exclude={"endpoint"})
    return [chosen, config.run.seed]


def train_samples(config: Config, columns: Sequence[str] = tuple(schemas.SAMPLES.names)) -> pa.Table:
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
    # `Stage` says what to run where the table is missing.
    if read_manifest(folder) is not None and joins.num_rows(folder, split="train") == 0:
        raise _no_train_row(folder)


def _no_train_row(folder: str) -> UserError:
    return UserError(
        f"none of the {joins.num_rows(folder):,} samples is in the train split, so there is nothing to make pairs from. "
        "Lower data.test_share or check data.train_file."
    )


class _Figures:
    """What the manifest tells of the table: pairs of each kind, who wrote the rejected side, images, answers turned down.

    A :class:`~mmedpo_ray.tables.stage_runner.Tally`; images are counted in eight bytes each.

    Args:
        counts: folder of what the tasks turned down.
    """

    columns = ("kind", "generator", "image_id")

    def __init__(self, counts: str) -> None:
        self._counts = counts
        self._kinds: Counter[str] = Counter()
        self._generators: Counter[str] = Counter()
        self._images = IdSet()

    def add(self, rows: pa.RecordBatch) -> None:
        self._kinds.update(rows["kind"].to_pylist())
        self._generators.update(rows["generator"].to_pylist())
        self._images.add(pc.unique(rows["image_id"]).to_pylist())

    def figures(self) -> dict[str, Any]:
        return {
            "kinds": dict(self._kinds),
            "generators": dict(self._generators),
            "images": len(self._images),
            "turned_down": rejections.count(self._counts),
        }
