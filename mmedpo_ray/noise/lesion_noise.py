"""Noise confined to the lesion region: the dispreferred image of a visual pair.

The paper's form (arXiv 2412.06141, section 3.1), with x the image, h the heat map in [0, 1], ε standard
normal and ξ̄ the share of signal left after k of 1,000 diffusion steps:

    x* = √ξ̄ · (x ⊙ h) + √(1 − ξ̄) · (ε ⊙ h) + x ⊙ (1 − h)

on pixel values scaled to [-1, 1], as in diffusion models. Only pixels under the mask are read, drawn for and
written, so the cost of the noise goes with the lesion and not with the image. On an image larger than the
model sees it, ε is drawn for grains of several pixels (:func:`grain_size`): independent pixels would be
averaged away when the model's processor shrinks the image.

Mode ``released`` is the authors' script: the map is smoothed by a 15 × 15 Gaussian, every pixel above its
mean minus its standard deviation (most of the image) is replaced, each colour on its own, by N(0, 10) on the
scale of 0 to 255, and storing that in 8 bits wraps what is negative. Half of the new values are therefore
nearly black, the other half nearly white. Not copied: the script swaps red and blue when it saves, writes
noise into alpha, and cannot treat 16-bit images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from mmedpo_ray.io.images import has_alpha
from mmedpo_ray.io.pixels import finite
from mmedpo_ray.noise.noise_schedule import signal_share
from mmedpo_ray.noise.settings import NoiseConfig

_RELEASED_STD = 10.0
# OpenCV's sigma for a 15 × 15 kernel where none is given: 0.3 · ((15 − 1) / 2 − 1) + 0.8.
_RELEASED_SIGMA, _RELEASED_RADIUS = 2.6, 7
# Standard deviations after which the blur's kernel ends.
_BLUR_TRUNCATE = 3.0
# Side of a grain of noise in pixels of what the model sees.
_GRAIN = 2
# Every so many-th value of a heat map tells about where its threshold lies; a prime, to see all columns of
# the image.
_SAMPLE_STRIDE = 251
_COLOUR_BANDS = {"L": 1, "I;16": 1, "LA": 1, "RGB": 3, "RGBA": 3}


@dataclass(frozen=True)
class Noised:
    """A noised image.

    Attributes:
        pixels: uint8 or uint16, (H, W) or (H, W, bands), as the original's in its :func:`plain_mode`.
        places: int64 (n,), the pixels under the noise as positions in raster order, rising. Every other pixel
            is bit for bit the original's.
        parameters: what was done, JSON-able. Always ``mode``, ``mask_share`` (n over all pixels) and
            ``changed_share`` (share whose colour differs from the original's; where it is 0 the pair would
            teach nothing).
    """

    pixels: np.ndarray
    places: np.ndarray
    parameters: dict[str, Any]

    @property
    def image(self) -> Image.Image:
        """The noised image, of the size and (where PNG has it) the mode of the original."""
        return Image.fromarray(self.pixels)

    @cached_property
    def mask(self) -> np.ndarray:
        """The pixels under the noise, bool (H, W)."""
        mask = np.zeros(self.pixels.shape[:2], bool)
        mask.ravel()[self.places] = True
        return mask


@dataclass(frozen=True)
class _Region:
    """The n pixels under the mask with all that a mode may need.

    Attributes:
        values: float32 (C, n), one row a colour, between ``low`` (black) and ``high`` (white).
        weight: 1.0 for a hard mask, else the heat, float32 (n,).
        colours: the whole image without alpha, (H, W, C).
        places: int64 (n,), their positions in raster order.
    """

    values: np.ndarray
    weight: Any
    low: float
    high: float
    colours: np.ndarray
    places: np.ndarray
    config: NoiseConfig
    rng: np.random.Generator

    def noise(self) -> np.ndarray:
        """ε: a draw per grain, or per value if a grain is a pixel; float32 (C, n), or (1, n) for grey."""
        rows = 1 if (self.values[1:] == self.values[:1]).all() else len(self.values)
        side, (height, width) = self.config.model_side, self.colours.shape[:2]
        if side is None or min(height, width) <= side:
            return self.rng.standard_normal((rows, len(self.places)), np.float32)
        grains, count = _grains_of(self.places, (height, width), side)
        return self.rng.standard_normal((rows, count), np.float32).take(grains, axis=1)


def add_lesion_noise(
    image: Image.Image, heat_map: np.ndarray, config: NoiseConfig, rng: np.random.Generator
) -> Noised:
    """Adds noise to the lesion that the heat map shows; every other pixel stays, also as a model sees it.

    Args:
        image: L, RGB, RGBA, LA or 16-bit grey; other modes are converted to one of these first. Alpha is
            never touched.
        heat_map: (H, W) of the image's size, in [0, 1].
        config: mode, its strength, mask and the mask's largest area.
        rng: source of the noise; the same state gives the same image.

    Raises:
        ValueError: the heat map has another size, or values outside [0, 1].
    """
    image = plain_mode(image)
    heat_map = np.ascontiguousarray(heat_map, dtype=np.float32)
    if heat_map.shape != (image.height, image.width):
        raise ValueError(f"the heat map is {heat_map.shape}, the image {(image.height, image.width)}")
    # A NaN fails these comparisons too.
    if not (heat_map.min() >= 0 and heat_map.max() <= 1):
        raise ValueError("a heat map must lie in [0, 1]")
    released = config.mode == "released"
    places = released_places(heat_map) if released else lesion_places(heat_map, config.area_share)
    pixels = np.asarray(image).copy()
    changed = 0
    if len(places):
        num_bands = _COLOUR_BANDS[image.mode]
        # Band by band: every step below then runs over contiguous memory.
        flat = pixels.reshape(heat_map.size, -1)
        before = flat.take(places, axis=0)[:, :num_bands].T.copy()
        low, high = _value_range(pixels)
        region = _Region(
            values=before.astype(np.float32),
            weight=heat_map.take(places) if config.mask == "soft" else 1.0,
            low=low,
            high=high,
            colours=pixels.reshape(*heat_map.shape, -1)[..., :num_bands],
            places=places,
            config=config,
            rng=rng,
        )
        values = _MODES[config.mode](region)
        after = np.rint(np.clip(values, low, high, out=values), out=values).astype(pixels.dtype)
        if pixels.dtype == np.uint16:
            _keep_range(after[0], before[0], pixels)
        after = np.broadcast_to(after, before.shape)
        for band in range(num_bands):
            flat[:, band][places] = after[band]
        changed = int(np.count_nonzero((after != before).any(axis=0)))
    return Noised(pixels, places, _parameters(config, len(places), changed, heat_map.shape))


def lesion_places(heat_map: np.ndarray, area_share: float) -> np.ndarray:
    """The hottest ``area_share`` of the image without heat 0, as positions in raster order, int64 (n,).

    Equal values stay together. Where those at the threshold would exceed the share they are left out; the
    pixels of the highest value are kept whatever their number, so a ground-truth mask (0/1) is kept whole.

    Args:
        heat_map: float32 (H, W), 0 to 1, contiguous.
        area_share: 0 to 1.
    """
    values = heat_map.ravel()
    # The product may miss a whole number by a rounding error.
    count = int(area_share * len(values) + 1e-6)
    # A sorted sample gives bounds for the threshold: what is below them need not be looked at again.
    sample = np.sort(values[::_SAMPLE_STRIDE])
    expected, margin = int(len(sample) * (1 - count / len(values))), len(sample) // 32 + 2
    floor, ceiling = sample[max(0, expected - margin)], sample[min(len(sample) - 1, expected + margin)]
    places = np.flatnonzero(values >= floor if floor > 0 else values > 0)
    if floor > 0 and len(places) < count:
        places = np.flatnonzero(values > 0)
    heat = values[places]
    if len(places) <= count or heat.min() == (highest := heat.max()):
        return places
    threshold = _ranked(heat, count, ceiling) if count else highest
    kept = heat >= threshold
    if threshold < highest and np.count_nonzero(kept) > count:
        kept = heat > threshold
    return places[kept]


def released_places(heat_map: np.ndarray) -> np.ndarray:
    """The mask of the authors' script: the smoothed map above its mean minus its standard deviation."""
    smooth = ndimage.gaussian_filter(heat_map, _RELEASED_SIGMA, radius=_RELEASED_RADIUS, mode="mirror")
    return np.flatnonzero(smooth > smooth.mean() - smooth.std())


def plain_mode(image: Image.Image) -> Image.Image:
    """The image in a mode that noise and PNG both know, looking the same to a model.

    Palettes are resolved, 32-bit and float grey is scaled to 16 bits, and a colour that the file declares
    transparent (PNG's tRNS) becomes an alpha band: a noised pixel may take that colour, or leave it.
    """
    transparent = has_alpha(image)
    if image.mode in _COLOUR_BANDS and not (transparent and image.mode in ("L", "RGB")):
        return image
    if image.mode in ("I", "F", "I;16B", "I;16L"):
        pixels = finite(np.asarray(image).astype(np.float64))
        low, high = float(pixels.min()), float(pixels.max())
        if image.mode != "F" and low >= 0 and high <= 65535:
            return Image.fromarray(pixels.astype(np.uint16))
        scale = 65535 / (high - low) if high > low else 0.0
        return Image.fromarray(np.round((pixels - low) * scale).astype(np.uint16))
    if image.mode in ("1", "L"):
        return image.convert("LA" if transparent else "L")
    return image.convert("RGBA" if transparent else "RGB")


# ------------------------------------------------- the modes: _Region → float32 (C, n), or (1, n) for grey


def _diffused(region: _Region) -> np.ndarray:
    share = config_signal_share(region.config)
    noise = region.noise()
    middle, half = (region.low + region.high) / 2.0, (region.high - region.low) / 2.0
    # The paper's formula in pixel values: [-1, 1] is the middle grey plus and minus half the range. Done in
    # place: on large lesions new memory costs more than the arithmetic.
    x = region.values[: len(noise)]
    x -= middle
    rest = x * (1.0 - region.weight) if region.config.mask == "soft" else 0.0
    x *= math.sqrt(share)
    noise *= math.sqrt(1.0 - share) * half
    x += noise
    x *= region.weight
    x += rest
    x += middle
    return x


def _with_noise_added(region: _Region) -> np.ndarray:
    noise = region.noise()
    scale = region.config.std * (region.high - region.low)
    return region.values[: len(noise)] + region.weight * (scale * noise)


def _blurred(region: _Region) -> np.ndarray:
    h, blurred = region.weight, _blur(region.colours, region.places, region.config.blur_sigma)
    return h * blurred + (1.0 - h) * region.values


def _replaced(region: _Region) -> np.ndarray:
    noise = _RELEASED_STD * region.rng.standard_normal(region.values.shape, np.float32)
    # The script stores floats in 8 bits: cut towards zero, then modulo 256.
    stored = noise.astype(np.int16).astype(np.uint8).astype(np.float32)
    return region.low + stored * ((region.high - region.low) / 255.0)


_MODES: dict[str, Callable[[_Region], np.ndarray]] = {
    "diffusion": _diffused,
    "additive": _with_noise_added,
    "blur": _blurred,
    "released": _replaced,
}


# ---------------------------------------------------------------------- their parts


def grain_size(model_side: int | None, shape: tuple[int, int]) -> float:
    """Side of a grain of noise in pixels of an image (H, W): two pixels of what the model sees, at least 1.

    How much of the noise's variance CLIP's processor (bicubic, 336 pixels) leaves, by the shorter side of the
    image:

    ==================  =====  =====  =====  =====
    shorter side          336    512  1,024  2,048
    single pixels        1.00   0.28   0.07   0.02
    grains               1.00   0.82   0.78   0.77
    ==================  =====  =====  =====  =====

    Grains of one model pixel would leave 0.52 to 0.61: the processor's kernel is wider than that.
    """
    if model_side is None or min(shape) <= model_side:
        return 1.0
    return _GRAIN * min(shape) / model_side


def _grains_of(places: np.ndarray, shape: tuple[int, int], model_side: int) -> tuple[np.ndarray, int]:
    """The grain, numbered in raster order, of each of the rising ``places``; and the number of grains."""
    height, width = shape
    # Pixel centres in grains; whole numbers, so that no rounding moves an edge.
    down, across = (
        ((2 * np.arange(length) + 1) * model_side) // (2 * _GRAIN * min(shape)) for length in (height, width)
    )
    columns = int(across[-1]) + 1
    # Row by row, since dividing every position by the width takes longer than all the rest.
    starts = np.arange(height) * width
    lengths = np.diff(places.searchsorted(starts), append=len(places))
    cells = across.take(places - starts.repeat(lengths))
    cells += (down * columns).repeat(lengths)
    hit = np.zeros((int(down[-1]) + 1) * columns, bool)
    hit[cells] = True
    touched = np.flatnonzero(hit)
    number = np.empty(len(hit), np.int64)
    number[touched] = np.arange(len(touched))
    return number.take(cells), len(touched)


def config_signal_share(config: NoiseConfig) -> float:
    """ξ̄ as the settings give it: itself, or through steps and schedule."""
    return signal_share(config.steps, config.schedule) if config.signal_share is None else config.signal_share


def _blur(colours: np.ndarray, places: np.ndarray, sigma_share: float) -> np.ndarray:
    """The pixels at ``places`` of the blurred image, float32 (C, n); (1, n) for grey."""
    height, width = colours.shape[:2]
    sigma = sigma_share * min(height, width)
    # Nothing further away than the kernel's radius counts.
    radius = int(_BLUR_TRUNCATE * sigma + 0.5)
    rows, columns = np.divmod(places, width)
    top, left = max(0, rows[0] - radius), max(0, columns.min() - radius)
    box = colours[top : rows[-1] + radius + 1, left : columns.max() + radius + 1]
    grey = bool((box[..., 1:] == box[..., :1]).all())
    bands = [box[..., band].astype(np.float32) for band in range(1 if grey else box.shape[2])]
    blurred = [ndimage.gaussian_filter(band, sigma, radius=radius, mode="nearest") for band in bands]
    return np.stack([band[rows - top, columns - left] for band in blurred])


def _ranked(values: np.ndarray, count: int, ceiling: np.float32) -> np.float32:
    """The ``count``-th largest value, 1 ≤ count ≤ N; quick where it lies below ``ceiling``."""
    below = values[values < ceiling]
    rank = count - (len(values) - len(below))
    if rank < 1:
        below, rank = values, count
    return np.partition(below, len(below) - rank)[len(below) - rank]


def _value_range(pixels: np.ndarray) -> tuple[float, float]:
    """The values of black and white; 16-bit files rarely use all bits, so theirs are what occurs."""
    if pixels.dtype == np.uint8:
        return 0.0, 255.0
    low, high = float(pixels.min()), float(pixels.max())
    return low, max(high, low + 1)


def _keep_range(after: np.ndarray, before: np.ndarray, pixels: np.ndarray) -> None:
    """Gives one pixel its darkest or brightest value back where noise took the last of these.

    A model sees 16-bit values scaled by what occurs, so a new range would change every pixel outside the mask
    too.

    Args:
        after: the noised values, (n,), changed in place.
        before: the values that they replace, (n,).
        pixels: the whole original, (H, W).
    """
    for end in (pixels.min(), pixels.max()):
        here = before == end
        elsewhere = np.count_nonzero(pixels == end) > np.count_nonzero(here)
        if not elsewhere and not (after == end).any():
            after[np.argmax(here)] = end


def _parameters(config: NoiseConfig, masked: int, changed: int, shape: tuple[int, int]) -> dict[str, Any]:
    """What a pair keeps about its noise."""
    size = math.prod(shape)
    # Significant digits, so that one pixel of a large image is not rounded to none.
    shares = {
        "mask_share": float(f"{masked / size:.6g}"),
        "changed_share": float(f"{changed / size:.6g}"),
    }
    if config.mode == "released":
        return {"mode": config.mode, **shares}
    strength: dict[str, Any] = {}
    if config.mode == "diffusion":
        strength["signal_share"] = float(f"{config_signal_share(config):.6g}")
        if config.signal_share is None:
            strength |= {"steps": config.steps, "schedule": config.schedule}
    elif config.mode == "additive":
        strength["std"] = config.std
    else:
        strength["blur_sigma"] = config.blur_sigma
    if config.mode != "blur":
        strength["grain"] = float(f"{grain_size(config.model_side, shape):.6g}")
    return {"mode": config.mode, **strength, "mask": config.mask, "area_share": config.area_share, **shares}
