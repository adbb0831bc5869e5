"""Noise confined to the lesion region: the dispreferred image of a visual pair.

The paper's form (arXiv 2412.06141, section 3.1), with x the image, h the heat map in [0, 1], ε standard normal and ξ̄ the
share of signal left after k of 1,000 diffusion steps:

    x* = √ξ̄ · (x ⊙ h) + √(1 − ξ̄) · (ε ⊙ h) + x ⊙ (1 − h)

on pixel values scaled to [-1, 1], as in diffusion models. The authors' script does something else, kept as mode
``released``: pixels where the map exceeds its mean minus its standard deviation (most of the image) become N(0, 10) on the scale
of 0 to 255, which is nearly black.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from mmedpo_ray.config import NoiseConfig

_TOTAL_STEPS = 1000
_RELEASED_STD = 10.0
_ALPHA_BANDS = {"RGBA": 3, "LA": 1}
_KEPT_MODES = ("L", "RGB", "RGBA", "LA", "I;16")


@dataclass(frozen=True)
class Noised:
    """A noised image.

    Attributes:
        image: same size and (where PNG has it) same mode as the original.
        mask: float32 (H, W) in [0, 1], where noise was laid: 0/1 for a hard mask.
        parameters: what was done, JSON-able.
    """

    image: Image.Image
    mask: np.ndarray
    parameters: dict[str, Any]


@lru_cache(maxsize=64)
def signal_share(steps: int, schedule: str) -> float:
    """ξ̄: the share of the signal's variance that is left after ``steps`` of 1,000 diffusion steps, 1 to 0.

    Args:
        steps: 1 to 1,000.
        schedule: ``linear`` (Ho et al. 2020: β from 1e-4 to 0.02), ``sigmoid`` (β from 1e-5 to 5e-3 along a sigmoid, the one
            used with contrastive decoding of LVLMs, arXiv 2311.16922), or ``cosine`` (Nichol & Dhariwal 2021).

    Raises:
        ValueError: an argument is out of range.
    """
    if not 1 <= steps <= _TOTAL_STEPS:
        raise ValueError(f"steps must be 1 to {_TOTAL_STEPS}, not {steps}")
    if schedule == "cosine":
        offset = 0.008
        t = np.array([0.0, steps / _TOTAL_STEPS])
        start, now = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
        return float(max(now / start, 0.0))
    if schedule == "linear":
        beta = np.linspace(1e-4, 0.02, _TOTAL_STEPS)
    elif schedule == "sigmoid":
        beta = 1 / (1 + np.exp(-np.linspace(-6, 6, _TOTAL_STEPS))) * (0.5e-2 - 1e-5) + 1e-5
    else:
        raise ValueError(f"unknown schedule {schedule!r}: use sigmoid, linear or cosine")
    return float(np.prod(1 - beta[:steps]))


def add_lesion_noise(
    image: Image.Image, heat_map: np.ndarray, config: NoiseConfig, rng: np.random.Generator
) -> Noised:
    """Lays noise where the heat map says the lesion is. Outside a hard mask every pixel stays bit for bit.

    Args:
        image: L, RGB, RGBA, LA or 16-bit grey; other modes are converted to one of these first. Alpha is never touched; an
            RGB image without colour stays without colour.
        heat_map: (H, W) of the image's size, in [0, 1].
        config: mode, steps, schedule, mask and its largest area.
        rng: source of the noise; the same state gives the same image.

    Raises:
        ValueError: the heat map has another size, or values outside [0, 1].
    """
    image = plain_mode(image)
    heat_map = np.asarray(heat_map, dtype=np.float32)
    if heat_map.shape != (image.height, image.width):
        raise ValueError(f"the heat map is {heat_map.shape}, the image {(image.height, image.width)}")
    if not (np.isfinite(heat_map).all() and heat_map.min() >= 0 and heat_map.max() <= 1):
        raise ValueError("a heat map must lie in [0, 1]")
    pixels = np.asarray(image)
    if config.mode == "released":
        mask = (heat_map > heat_map.mean() - heat_map.std()).astype(np.float32)
    else:
        mask = hard_mask(heat_map, config.area_share) if config.mask == "hard" else heat_map
    low, high = _value_range(pixels)
    noised = pixels.copy()
    for bands, grey in _colour_bands(image.mode, pixels):
        shape = pixels.shape[:2] if grey else pixels[..., bands].shape
        noise = rng.standard_normal(shape)
        values = pixels[..., bands] if pixels.ndim == 3 else pixels
        changed = _change(values, noise, mask, config, low, high)
        if pixels.ndim == 3:
            noised[..., bands] = changed
        else:
            noised = changed
    parameters: dict[str, Any] = {"mode": config.mode, "mask_share": round(float((mask > 0).mean()), 6)}
    if config.mode == "diffusion":
        parameters |= {
            "steps": config.steps,
            "schedule": config.schedule,
            "signal_share": round(signal_share(config.steps, config.schedule), 6),
            "mask": config.mask,
            "area_share": config.area_share,
        }
    return Noised(Image.fromarray(noised), mask, parameters)


def hard_mask(heat_map: np.ndarray, area_share: float) -> np.ndarray:
    """The hottest ``area_share`` of the image as 0/1, float32 (H, W); pixels of heat 0 never belong to it.

    Equal values stay together, so a ground-truth mask (0/1) is kept whole whatever its area.
    """
    count = max(1, round(area_share * heat_map.size))
    threshold = np.partition(heat_map, heat_map.size - count, axis=None)[heat_map.size - count]
    return ((heat_map >= threshold) & (heat_map > 0)).astype(np.float32)


def plain_mode(image: Image.Image) -> Image.Image:
    """The image in a mode that noise and PNG both know: palettes resolved, 32-bit and float grey scaled to 16 bits."""
    if image.mode in _KEPT_MODES:
        return image
    if image.mode in ("I", "F", "I;16B", "I;16L"):
        pixels = np.asarray(image).astype(np.float64)
        low, high = float(pixels.min()), float(pixels.max())
        if image.mode != "F" and low >= 0 and high <= 65535:
            return Image.fromarray(pixels.astype(np.uint16))
        scale = 65535 / (high - low) if high > low else 0.0
        return Image.fromarray(np.round((pixels - low) * scale).astype(np.uint16))
    if image.mode == "1":
        return image.convert("L")
    has_alpha = image.mode in ("PA", "RGBa", "La") or "transparency" in image.info
    return image.convert("RGBA" if has_alpha else "RGB")


def _value_range(pixels: np.ndarray) -> tuple[float, float]:
    """The values between black and white; 16-bit files rarely use all bits, so theirs is what occurs."""
    if pixels.dtype == np.uint8:
        return 0.0, 255.0
    low, high = float(pixels.min()), float(pixels.max())
    return low, max(high, low + 1)


def _colour_bands(mode: str, pixels: np.ndarray) -> list[tuple[slice, bool]]:
    """The bands to change together, and whether they show grey, so that one noise serves all of them."""
    if pixels.ndim == 2:
        return [(slice(None), True)]
    colours = slice(0, _ALPHA_BANDS.get(mode, pixels.shape[2]))
    values = pixels[..., colours]
    return [(colours, bool((values == values[..., :1]).all()))]


def _change(
    values: np.ndarray, noise: np.ndarray, mask: np.ndarray, config: NoiseConfig, low: float, high: float
) -> np.ndarray:
    if values.ndim == 3:
        mask = mask[..., None]
        noise = noise if noise.ndim == 3 else noise[..., None]
    if config.mode == "released":
        replaced = low + noise * (_RELEASED_STD * (high - low) / 255.0)
        changed = np.where(mask > 0, replaced, values)
    else:
        signal = signal_share(config.steps, config.schedule)
        x = (values.astype(np.float64) - low) * (2.0 / (high - low)) - 1.0
        x = np.sqrt(signal) * x * mask + np.sqrt(1 - signal) * noise * mask + x * (1 - mask)
        changed = (x + 1.0) * ((high - low) / 2.0) + low
    changed = np.round(np.clip(changed, low, high)).astype(values.dtype)
    # Rounding must not touch what the mask leaves out.
    return np.where(mask > 0, changed, values)
