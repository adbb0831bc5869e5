"""What the images of some visual pairs show: how much of the image, and of its lesion, the noise changes.

Decoding every image of a large table would take hours, so a seeded sample stands for them. The images of one
pair are in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from mmedpo_ray.audit.features import Features, NotCheckedError
from mmedpo_ray.audit.samples import Samples
from mmedpo_ray.datasets.pair_table import PairTable
from mmedpo_ray.io import images
from mmedpo_ray.io.masks import marked_pixels
from mmedpo_ray.radiology.labelled_boxes import asked_region

Source = Literal["mask", "heat map"]

MAX_PAIRS = 64
# A pixel counts as changed above this difference of 8-bit levels, which lossy files reach by themselves.
_LEVELS = 4
# A heat map marks what has at least this share of its highest value.
_HOT = 0.5


@dataclass(frozen=True)
class PairImages:
    """What the two images of a visual pair show.

    Attributes:
        problem: why they could not be compared ("image_missing", "image_undecodable", "image_too_large",
            "image_unreadable", "size_differs"), or None.
        changed: share of the image that differs by more than 4 levels of 255, 0 to 1.
        identical: every pixel is the same.
        lesion_changed: share of the lesion that differs; NaN where no lesion is known.
        source: what marks the lesion: the mask of the data set, the heat map of the tool, or None.
    """

    problem: str | None
    changed: float = float("nan")
    identical: bool = False
    lesion_changed: float = float("nan")
    source: Source | None = None


@dataclass(frozen=True)
class ImageSample:
    """The visual pairs whose images were read.

    Attributes:
        rows: (K,) their positions in the table, ascending.
        pairs: what each of them shows.
    """

    rows: np.ndarray
    pairs: tuple[PairImages, ...]


@dataclass(frozen=True)
class _Lesion:
    """Files that may mark the lesion, the best first, and what was asked about the image."""

    files: tuple[tuple[str | None, Source], ...]
    question: str
    answer: str


def measure_images(
    pairs: PairTable, features: Features, samples: Samples | None, seed: int, max_pixels: int
) -> ImageSample:
    """Reads the images of at most 64 visual pairs.

    Args:
        pairs: the table.
        features: its numbers.
        samples: gives the lesion masks; without it heat maps mark the lesions.
        seed: of the draw.
        max_pixels: larger images are not decoded.

    Raises:
        NotCheckedError: the table names no images to compare.
    """
    if not {"image_uri", "rejected_image_uri"} <= pairs.columns:
        raise NotCheckedError("the table has no columns image_uri and rejected_image_uri")
    candidates = np.flatnonzero(features.visual & ~features.same_image)
    if len(candidates) == 0:
        raise NotCheckedError("the table has no visual pair with a second image")
    size = min(MAX_PAIRS, len(candidates))
    drawn = np.sort(np.random.default_rng(seed).choice(candidates, size, replace=False))
    originals, noised = (pairs.values(name, drawn) for name in ("image_uri", "rejected_image_uri"))
    lesions = _lesions(pairs, features, samples, drawn)
    compared = (_compare(*each, max_pixels) for each in zip(originals, noised, lesions, strict=True))
    return ImageSample(drawn, tuple(compared))


def _lesions(
    pairs: PairTable, features: Features, samples: Samples | None, drawn: np.ndarray
) -> Iterator[_Lesion]:
    masks = heat_maps = [None] * len(drawn)
    if "heat_map_uri" in pairs.columns:
        heat_maps = pairs.values("heat_map_uri", drawn)
    if samples is not None and "mask_uri" in samples.table.column_names:
        column = samples.table["mask_uri"]
        masks = [column[row].as_py() if row >= 0 else None for row in features.sample_row[drawn].tolist()]
    asked = (pairs.values(name, drawn) for name in ("question", "chosen"))
    for mask, heat_map, question, answer in zip(masks, heat_maps, *asked, strict=True):
        yield _Lesion(((mask, "mask"), (heat_map, "heat map")), question or "", answer or "")


def _compare(original: str, noised: str, lesion: _Lesion, max_pixels: int) -> PairImages:
    try:
        before, after = (images.load_image(uri, max_pixels) for uri in (original, noised))
    except images.ImageError as error:
        return PairImages(error.reason)
    except OSError:
        return PairImages("image_unreadable")
    if before.size != after.size:
        return PairImages("size_differs")
    pixels = [np.asarray(images.to_rgb(image), np.int16) for image in (before, after)]
    changed = np.abs(pixels[0] - pixels[1]).max(axis=2) > _LEVELS
    identical = before.mode == after.mode and np.array_equal(np.asarray(before), np.asarray(after))
    for uri, source in lesion.files:
        region = _region(uri, source, lesion, before.size, max_pixels) if uri else None
        if region is not None and region.any():
            return PairImages(None, float(changed.mean()), identical, float(changed[region].mean()), source)
    return PairImages(None, float(changed.mean()), identical)


def _region(
    uri: str, source: Source, lesion: _Lesion, size: tuple[int, int], max_pixels: int
) -> np.ndarray | None:
    """(H, W) bool, what a file marks as the lesion; None where it cannot be read."""
    try:
        image = images.load_image(uri, max_pixels)
    except (images.ImageError, OSError):
        return None
    region = marked_pixels(image) if source == "mask" else _hot(image)
    if image.size != size:
        region = np.asarray(Image.fromarray(region).resize(size, Image.Resampling.NEAREST))
    if source == "mask":
        with contextlib.suppress(OSError):
            region, _ = asked_region(region, uri, lesion.question, lesion.answer)
    return region


def _hot(heat_map: Image.Image) -> np.ndarray:
    """(H, W) bool: the hottest places of a stored heat map."""
    grey = heat_map if heat_map.mode in ("L", "1", "I;16", "I", "F") else images.to_rgb(heat_map).convert("L")
    values = np.asarray(grey).astype(np.float64)
    return values >= max(_HOT * values.max(), 1e-9)
