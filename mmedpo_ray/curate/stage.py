"""The stage `curate`: `samples` → `pairs`, of text (a dispreferred answer) and visual (a dispreferred image).

Each train sample is planned for one text pair, each train image for some visual pairs; every planned pair ends in the
table or in `dropped/`.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.curate.samples import check_train_split, train_samples
from mmedpo_ray.curate.text import candidates, rejections
from mmedpo_ray.curate.text.stage import prepare, text_pairs
from mmedpo_ray.curate.visual.stage import finished_visual_pairs, make_visual_pairs
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner, read_manifest

_TURNED_DOWN = ".turned_down"


def curate(config: Config) -> Manifest:
    """Makes the preference pairs of the run's train samples. Ray must be initialised.

    First come the tables that the pairs are made of: `candidates` sampled from the target model, `choices` and `rewrites`
    of a model behind an endpoint, and the `visual` pairs.

    Raises:
        UserError: `samples` is missing, has no train row, or no pair is left.
        DroppedShareError: too few samples give a pair.
    """
    run = RunFolder(config.run.folder)
    # If the table is missing, the first stage below says what to run.
    if read_manifest(run.samples) is not None:
        check_train_split(run.samples)
    inputs = prepare(config, partial(train_samples, config, candidates.COLUMNS))
    settings = key_settings(config)
    for folder in (run.choices, run.rewrites):
        if folder in inputs and (asked := read_manifest(folder)) is not None:
            # The reasons of dropped rows decide about their pairs too, and are not part of the table's identity.
            settings.append(asked.dropped)
    inputs += make_visual_pairs(config, partial(train_samples, config))
    stage = StageRunner("curate", run.pairs, config, settings=settings, inputs=inputs)
    if (manifest := stage.finished()) is not None:
        return manifest
    counts = storage.join(run.pairs, _TURNED_DOWN, stage.key)

    def build(done: IdSet) -> ray.data.Dataset | None:
        made = (text_pairs(config, done, counts), finished_visual_pairs(config, done))
        parts = [part for part in made if part is not None]
        return parts[0].union(*parts[1:]) if len(parts) > 1 else next(iter(parts), None)

    manifest = stage.write_rows(build, schema=schemas.PAIRS, id_column="pair_id", extra=_Figures(counts))
    storage.remove(storage.join(run.pairs, _TURNED_DOWN))
    if said := rejections.in_words(manifest.extra["turned_down"]):
        console.print(f"{'':<12} {said}", soft_wrap=True)
    return manifest


def key_settings(config: Config) -> list[Any]:
    """What the pairs depend on besides the tables they are made of.

    Not the endpoint, whose answers are tables with keys of their own, and not the visual pairs, which are one too.
    """
    return [config.curate.text.model_dump(mode="json", exclude={"endpoint"}), config.run.seed]


class _Figures:
    """For the manifest: pairs of each kind, who wrote the rejected side, images, answers turned down.

    A :class:`~mmedpo_ray.tables.stage_runner.Tally`; an image takes eight bytes of memory.

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
