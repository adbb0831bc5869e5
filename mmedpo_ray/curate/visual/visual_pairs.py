"""Visual pairs: a tool finds the lesion, noise hides it, the answer stays the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.seeds import stable_seed
from mmedpo_ray.curate.text.text_pairs import common
from mmedpo_ray.curate.tool_registry import TOOLS
from mmedpo_ray.curate.visual.tools.base import Localisation
from mmedpo_ray.io import images as image_files
from mmedpo_ray.io import storage
from mmedpo_ray.io.png import encode_pixels
from mmedpo_ray.noise.lesion_noise import Noised, add_lesion_noise
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.schemas import DROP_DETAIL, DROP_REASON

# Drop reasons that pass when the storage answers again.
RETRY_REASONS = (image_files.UNREADABLE, "mask_unreadable")
# The shorter side of a stored heat map; the finest grid of a tool's model (CLIPSeg) has 352 patches a side,
# MedKLIP's 14.
HEAT_MAP_SIDE = 256


@dataclass(frozen=True)
class VisualPair:
    """A visual pair in memory.

    Attributes:
        row: the sample.
        image: its decoded image, in the file's own mode.
        heat_map: float32 (H, W) in [0, 1].
        confidence: the tool's, above 0 and at most 1.
        seed: of the noise.
        noised: the dispreferred image.
        parameters: those of the noise and the tool's choice, JSON-able; with ``lesion_covered`` (share of the
            sample's own lesion mask that the noise covers) if it has one.
    """

    row: dict[str, Any]
    image: Image.Image
    heat_map: np.ndarray
    confidence: float
    seed: int
    noised: Noised
    parameters: dict[str, Any]


class PairMaker:
    """Samples → visual pairs in memory. Writes nothing.

    Args:
        config: all settings; the tool's model, if any, is loaded here.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._settings = config.curate.visual
        self._loader = image_files.ImageLoader(config.data.max_pixels)
        self._given_masks = TOOLS["dataset_mask"](config)
        self._tool = None if self._settings.tool == "dataset_mask" else TOOLS[self._settings.tool](config)

    def make(self, rows: list[dict[str, Any]]) -> Iterator[VisualPair | dict[str, Any]]:
        """A pair or a dropped row for each sample, samples of an image together.

        At most ``batch_images`` images are held decoded.

        Args:
            rows: samples, in any order. An image that several of them show is decoded once.
        """
        by_image: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_image.setdefault(row["image_uri"], []).append(row)
        ordered = [row for together in by_image.values() for row in together]
        decoded: dict[str, Image.Image | image_files.ImageError] = {}
        for start in range(0, len(ordered), self._settings.batch_images):
            batch = ordered[start : start + self._settings.batch_images]
            held, decoded = decoded, {}
            for uri in dict.fromkeys(row["image_uri"] for row in batch):
                decoded[uri] = held[uri] if uri in held else self._loader.load(uri)
            yield from self._make_batch(batch, decoded)

    def _make_batch(
        self, batch: list[dict[str, Any]], decoded: dict[str, Image.Image | image_files.ImageError]
    ) -> Iterator[VisualPair | dict[str, Any]]:
        usable: list[tuple[dict[str, Any], Image.Image]] = []
        for row in batch:
            image = decoded[row["image_uri"]]
            if isinstance(image, image_files.ImageError):
                yield dropped(row, image.reason, image.detail)
            else:
                usable.append((row, image))
        if not usable:
            return
        for (row, image), localisation in zip(usable, self._localise(usable), strict=True):
            yield self._pair(row, image, localisation)

    def _localise(self, usable: list[tuple[dict[str, Any], Image.Image]]) -> list[Localisation]:
        if self._tool is None:
            return [self._given(row, image) for row, image in usable]
        # The last digits of a network's numbers depend on how many rows it gets at a time. So it always gets
        # the same number, however many samples are left of a run that goes on.
        missing = self._settings.batch_images - len(usable) if self._tool.has_model else 0
        filled = usable + usable[-1:] * missing
        found = self._tool.localise([image for _, image in filled], [row for row, _ in filled])
        return found[: len(usable)]

    def _given(self, row: dict[str, Any], image: Image.Image) -> Localisation:
        """The lesion that the data set marks; ``mask_unreadable`` if its storage does not answer."""
        try:
            return self._given_masks.localise([image], [row])[0]
        except OSError as error:
            detail = image_files.unreadable(row["mask_uri"], error).detail
            return Localisation(None, 0.0, "mask_unreadable", detail)

    def _pair(
        self, row: dict[str, Any], image: Image.Image, found: Localisation
    ) -> VisualPair | dict[str, Any]:
        sample_id = row["sample_id"]
        if found.heat_map is None:
            return dropped(row, found.problem or "tool_failed", found.detail)
        # Written so that a confidence of NaN is none.
        if not (found.confidence > 0 and found.confidence >= self._settings.min_confidence):
            return dropped(row, "tool_found_nothing", f"{sample_id}: confidence {found.confidence:.3f}")
        seed = stable_seed(self._config.run.seed, visual_pair_id(sample_id))
        try:
            noised = add_lesion_noise(
                image, found.heat_map, self._settings.noise, np.random.default_rng(seed)
            )
        except ValueError as error:
            return dropped(row, "heat_map_unusable", f"{sample_id}: {error}")
        if not noised.parameters["changed_share"]:
            share = noised.parameters["mask_share"]
            return dropped(row, "noise_changed_nothing", f"{sample_id}: mask share {share:.3g}")
        given: Localisation | None = found
        if self._tool is not None:
            given = self._given(row, image) if row["mask_uri"] else None
        if given is not None and given.problem in RETRY_REASONS:
            # Made without knowing the lesion it would be another pair than the one that comes with the mask.
            return dropped(row, given.problem, given.detail)
        parameters = noised.parameters | _coverage(found, given, noised.places)
        return VisualPair(row, image, found.heat_map, found.confidence, seed, noised, parameters)


def _coverage(found: Localisation, given: Localisation | None, places: np.ndarray) -> dict[str, Any]:
    """What the tool chose, and whether the noise hits the lesion that the data set marks, for the audit."""
    if given is None or given.heat_map is None or not (area := np.count_nonzero(given.heat_map)):
        return found.choice
    covered = np.count_nonzero(given.heat_map.ravel()[places]) / area
    return found.choice | given.choice | {"lesion_covered": float(f"{covered:.6g}")}


class VisualPairs:
    """Ray Data batch function: samples → visual pairs; images and heat maps go to the run's ``noised/``.

    Args:
        config: all settings.
    """

    def __init__(self, config: Config) -> None:
        self._tool = config.curate.visual.tool
        self._maker = PairMaker(config)
        self._folder = storage.absolute(RunFolder(config.run.folder).noised)

    def __call__(self, batch: pa.Table) -> pa.Table:
        made = self._maker.make(batch.to_pylist())
        rows = [self._write(pair) if isinstance(pair, VisualPair) else pair for pair in made]
        return schemas.to_table(rows, schemas.with_drop_columns(schemas.PAIRS))

    def _write(self, pair: VisualPair) -> dict[str, Any]:
        pair_id = visual_pair_id(pair.row["sample_id"])
        name = hashlib.sha256(pair_id.encode()).hexdigest()[:24]
        # In 256 folders, since file systems are slow with millions of files in one.
        noised_uri = storage.join(self._folder, name[:2], f"{name}.png")
        heat_map_uri = storage.join(self._folder, name[:2], f"{name}_heat.png")
        # A model's map comes from a coarse grid, a mask that came with the data is exact.
        least = HEAT_MAP_SIDE if TOOLS[self._tool].has_model else None
        storage.write_bytes(heat_map_uri, encode_pixels(heat_map_pixels(pair.heat_map, least)))
        storage.write_bytes(noised_uri, encode_pixels(pair.noised.pixels))
        return {
            "pair_id": pair_id,
            "kind": "visual",
            "rejected_image_uri": noised_uri,
            "chosen": pair.row["answer"],
            "rejected": pair.row["answer"],
            "generator": self._tool,
            "seed": pair.seed,
            "tool": self._tool,
            "tool_confidence": round(pair.confidence, 6),
            "heat_map_uri": heat_map_uri,
            "noise": json.dumps(pair.parameters),
            **common(pair.row),
        }


def visual_pair_id(sample_id: str) -> str:
    """The id of a sample's visual pair."""
    return f"{sample_id}:visual"


def dropped(row: dict[str, Any], reason: str, detail: str | None) -> dict[str, Any]:
    """The row of a sample that gives no visual pair, and why."""
    return {
        "pair_id": visual_pair_id(row["sample_id"]),
        "sample_id": row["sample_id"],
        "image_id": row["image_id"],
        "kind": "visual",
        DROP_REASON: reason,
        DROP_DETAIL: detail or row["sample_id"],
    }


def heat_map_pixels(heat_map: np.ndarray, least: int | None = None) -> np.ndarray:
    """A heat map (H, W) in [0, 1] as uint8, 255 = 1.0.

    Args:
        heat_map: at the size of the image.
        least: of a larger map only every so many-th row and column is taken, as many as leave the shorter
            side this long at least; None: all.
    """
    step = max(1, min(heat_map.shape) // least) if least else 1
    scaled = heat_map[step // 2 :: step, step // 2 :: step] * np.float32(255)
    scaled += np.float32(0.5)
    return scaled.astype(np.uint8)
