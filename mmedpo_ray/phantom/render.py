"""Draws a frontal chest radiograph phantom and the ground-truth mask of its findings.

Everything is drawn in normalised coordinates (x to the right of the image, y downwards, both in [-1, 1]) with
soft edges, so any image size works. The patient's left side is on the right of the image, as on a real
radiograph. Anatomy, texture and noise each have their own random generator, so rendering the same seed
without findings gives the same patient with the lesions truly removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mmedpo_ray.phantom.findings import Finding, Side, Zone

Array = np.ndarray

_ANATOMY_STREAM, _TEXTURE_STREAM, _LESION_STREAM, _NOISE_STREAM = 11, 12, 13, 14
_ZONE_CENTRE: dict[Zone, float] = {"upper": -0.44, "middle": -0.06, "lower": 0.30}
_KIND_STREAM = {"effusion": 0, "pneumothorax": 1, "consolidation": 2, "nodule": 3}


@dataclass(frozen=True)
class _Anatomy:
    """Where this patient's organs lie, in normalised coordinates."""

    shift_x: float
    shift_y: float
    lung_x: float
    lung_y: float
    lung_rx: float
    lung_ry: float
    diaphragm: dict[Side, float]
    heart_ratio: float
    large_heart_ratio: float
    rib_phase: float
    gain: float
    offset: float
    soft_tissue: float


def render(seed: int, findings: tuple[Finding, ...], size: int = 64) -> tuple[Array, Array]:
    """Render one patient with the given findings.

    Args:
        seed: The patient. The same seed has the same anatomy, texture and noise whatever the findings.
        findings: What to draw; an empty tuple gives the lesion-removed image.
        size: Height and width in pixels, at least 32.

    Returns:
        image: uint8 of shape (size, size), grey values.
        mask: bool of shape (size, size), union of the lesions' pixels.

    Raises:
        ValueError: If `size` is below 32.
    """
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, not {size}")
    anatomy = _sample_anatomy(np.random.default_rng([_ANATOMY_STREAM, seed]))
    y, x = np.mgrid[0:size, 0:size].astype(np.float64) * 2 / (size - 1) - 1
    x, y = x - anatomy.shift_x, y - anatomy.shift_y
    soft = 1.6 / size
    mask = np.zeros((size, size), dtype=bool)

    lungs = {side: _lung(anatomy, side, x, y, soft) for side in ("left", "right")}
    image = _body(anatomy, x, y, soft)
    texture = _vessels(np.random.default_rng([_TEXTURE_STREAM, seed]), size)
    for lung in lungs.values():
        image = image * (1 - lung) + (0.20 + 0.07 * texture) * lung

    enlarged = any(f.kind == "cardiomegaly" for f in findings)
    heart = _heart(anatomy, enlarged, x, y, soft)
    great_vessels = _step(np.maximum(np.abs(x) - 0.13, np.abs(y + 0.25) - 0.45), soft)
    centre = np.maximum(heart, great_vessels)
    image = np.maximum(image, 0.72 * centre + image * (1 - centre))
    if enlarged:
        mask |= heart > 0.5
    for finding in findings:
        if finding.side is None:
            continue
        rng = np.random.default_rng([_LESION_STREAM, seed, _KIND_STREAM[finding.kind]])
        lung, sign = lungs[finding.side], _sign(finding.side)
        site = _Site(rng, anatomy, finding, sign, anatomy.diaphragm[finding.side], lung, x, y, soft)
        image, lesion = _DRAW[finding.kind](site, image)
        mask |= lesion > 0.5
    image = image + _ribs(anatomy, x, y)
    return _expose(image, anatomy, np.random.default_rng([_NOISE_STREAM, seed])), mask


def _sample_anatomy(rng: np.random.Generator) -> _Anatomy:
    dome = rng.uniform(0.44, 0.54)
    return _Anatomy(
        shift_x=rng.uniform(-0.05, 0.05),
        shift_y=rng.uniform(-0.06, 0.06),
        lung_x=rng.uniform(0.41, 0.45),
        lung_y=rng.uniform(-0.08, -0.02),
        lung_rx=rng.uniform(0.30, 0.35),
        lung_ry=rng.uniform(0.68, 0.76),
        diaphragm={"right": dome - 0.05, "left": dome},
        heart_ratio=rng.uniform(0.39, 0.46),
        large_heart_ratio=rng.uniform(0.56, 0.66),
        rib_phase=rng.uniform(0, 2 * np.pi),
        gain=rng.uniform(0.85, 1.1),
        offset=rng.uniform(-0.05, 0.05),
        soft_tissue=rng.uniform(0.48, 0.58),
    )


def _step(distance: Array, soft: float) -> Array:
    """Soft edge: 1 inside (distance < 0), 0 outside, a width of about `soft` between."""
    return 0.5 * (1 - np.tanh(distance / soft))


def _body(anatomy: _Anatomy, x: Array, y: Array, soft: float) -> Array:
    trunk = _step(np.abs(x) - 0.90 - 0.05 * np.sin(2 * y), soft)
    spine = np.exp(-((x / 0.12) ** 2))
    return 0.03 + trunk * (anatomy.soft_tissue + 0.16 * spine)


def _sign(side: Side) -> int:
    return 1 if side == "left" else -1


def _lung(anatomy: _Anatomy, side: Side, x: Array, y: Array, soft: float) -> Array:
    u = (x - _sign(side) * anatomy.lung_x) / anatomy.lung_rx
    v = (y - anatomy.lung_y) / anatomy.lung_ry
    outline = (np.abs(u) ** 2.4 + np.abs(v) ** 2.4 - 1) * 0.3
    dome = y - (anatomy.diaphragm[side] + 0.10 * u**2)
    return _step(np.maximum(outline, dome), soft)


def _heart(anatomy: _Anatomy, enlarged: bool, x: Array, y: Array, soft: float) -> Array:
    """Cardiothoracic ratio below 0.5 is a normal heart, above it an enlarged one."""
    ratio = anatomy.large_heart_ratio if enlarged else anatomy.heart_ratio
    thorax = 2 * (anatomy.lung_x + anatomy.lung_rx)
    half = ratio * thorax / 2
    u = (x - 0.28 * half) / half
    v = (y - 0.26) / (0.30 + 0.15 * (half - 0.3))
    return _step((u**2 + v**2 - 1) * 0.25, soft)


def _vessels(rng: np.random.Generator, size: int) -> Array:
    """Lung markings: smooth random texture of mean 0 and about unit spread."""
    noise = ndimage.gaussian_filter(rng.standard_normal((size, size)), size / 40)
    return noise / noise.std()


def _ribs(anatomy: _Anatomy, x: Array, y: Array) -> Array:
    wave = np.sin(13 * (y + 0.35 * np.abs(x) ** 1.5) + anatomy.rib_phase)
    clavicle = np.exp(-(((y + 0.70 + 0.12 * np.abs(x)) / 0.04) ** 2)) * (np.abs(x) > 0.12)
    inside = (np.abs(x) < 0.85) & (np.abs(x) > 0.1)
    return 0.045 * np.clip(wave, 0.2, 1) * inside + 0.10 * clavicle * inside


@dataclass(frozen=True)
class _Site:
    """What drawing one finding needs: the patient, the finding's lung and the pixel coordinates."""

    rng: np.random.Generator
    anatomy: _Anatomy
    finding: Finding
    sign: int
    diaphragm: float
    lung: Array
    x: Array
    y: Array
    soft: float


def _effusion(site: _Site, image: Array) -> tuple[Array, Array]:
    """Fluid at the base with a meniscus that rises towards the chest wall."""
    # Negative towards the heart, positive towards the chest wall.
    u = np.clip((site.sign * site.x - site.anatomy.lung_x) / site.anatomy.lung_rx, -1, 1)
    low, high = (0.16, 0.22) if site.finding.size == "small" else (0.42, 0.55)
    level = site.diaphragm - site.rng.uniform(low, high) - 0.14 * u**2 * np.sign(u)
    fluid = _step(level - site.y, site.soft) * site.lung
    return image * (1 - fluid) + 0.66 * fluid, fluid


def _pneumothorax(site: _Site, image: Array) -> tuple[Array, Array]:
    """Air without lung markings above and beside the visceral pleura, which shows as a thin bright line."""
    low, high = (0.70, 0.76) if site.finding.size == "small" else (0.44, 0.54)
    shrink = site.rng.uniform(low, high)
    lung_rx, lung_height = site.anatomy.lung_rx, site.diaphragm - site.anatomy.lung_y + site.anatomy.lung_ry
    u = (site.sign * site.x - site.anatomy.lung_x + lung_rx * (1 - shrink)) / (lung_rx * shrink)
    v = (site.y - site.diaphragm) / (lung_height * shrink)
    outline = (np.abs(u) ** 2.4 + np.abs(v) ** 2.4 - 1) * 0.25
    air = (1 - _step(outline, site.soft)) * site.lung
    pleura = np.exp(-((outline / (1.2 * site.soft)) ** 2)) * site.lung
    return image * (1 - air) + 0.06 * air + 0.30 * pleura, air


def _consolidation(site: _Site, image: Array) -> tuple[Array, Array]:
    """Patchy opacity with an irregular, blurred edge."""
    dx, dy = _from_centre(site, spread=0.25)
    angle = np.arctan2(dy, dx)
    phases = site.rng.uniform(0, 2 * np.pi, 2)
    edge = 1 + 0.18 * np.sin(3 * angle + phases[0]) + 0.10 * np.sin(5 * angle + phases[1])
    radius = site.rng.uniform(0.17, 0.22)
    opacity = _step(np.hypot(dx / 1.1, dy) - radius * edge, 3 * site.soft) * site.lung
    patchy = 0.56 + 0.04 * _vessels(site.rng, image.shape[0])
    return np.maximum(image, image * (1 - opacity) + patchy * opacity), opacity


def _nodule(site: _Site, image: Array) -> tuple[Array, Array]:
    """Small round opacity with a sharp edge."""
    dx, dy = _from_centre(site, spread=0.45)
    disc = _step(np.hypot(dx, dy) - site.rng.uniform(0.07, 0.09), site.soft)
    return np.maximum(image, image * (1 - disc) + 0.62 * disc), disc


def _from_centre(site: _Site, spread: float) -> tuple[Array, Array]:
    """Distance in x and y from a random centre inside the finding's zone."""
    assert site.finding.zone is not None
    x = site.anatomy.lung_x + site.rng.uniform(-spread, spread) * site.anatomy.lung_rx
    y = site.anatomy.lung_y + _ZONE_CENTRE[site.finding.zone] + site.rng.uniform(-0.06, 0.06)
    if site.finding.zone == "lower":  # keep clear of the heart
        x += 0.06
    return site.x - site.sign * x, site.y - y


_DRAW = {
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "consolidation": _consolidation,
    "nodule": _nodule,
}


def _expose(image: Array, anatomy: _Anatomy, rng: np.random.Generator) -> Array:
    """Blur, exposure and detector noise; to 8 bits."""
    size = image.shape[0]
    image = ndimage.gaussian_filter(image, 0.5 * size / 64)
    image = anatomy.gain * image + anatomy.offset + 0.035 * rng.standard_normal(image.shape)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
