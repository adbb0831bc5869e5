"""Checks of visual pairs. The table tells of all of them; their images are looked at for a seeded sample.

Decoding every image of a large table would take hours, so the findings say how many images stand for them. One pair's
images are in memory at a time. Whether the noise hits the lesion `curate` records with every pair; the sample checks that.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from mmedpo_ray.audit.features import AREA_SHARE, EVEN_MAP, GIVEN_MASK, RELEASED_SCRIPT, Features
from mmedpo_ray.audit.finding import (
    Check,
    Finding,
    NotCheckedError,
    finding_of_rows,
    noun,
    percent,
    share_severity,
)
from mmedpo_ray.audit.samples import Samples
from mmedpo_ray.audit.settings import AuditConfig
from mmedpo_ray.datasets.pair_table import PairTable
from mmedpo_ray.io import images
from mmedpo_ray.io.masks import marked_pixels
from mmedpo_ray.radiology.labelled_boxes import asked_region

SAMPLE = 64
# A pixel counts as changed above this difference of 8-bit levels, which lossy files reach by themselves.
_LEVELS = 4
# Noise that changes less of the lesion than this leaves it as it is. Clipping at black hides about half of the noise
# on a dark lesion, so that a half-changed lesion is no fault.
_LEAST_COVER = 0.1
# By what decides how much of the image the noise covers, as recorded with the pair.
_LESS_NOISE = {
    AREA_SHARE: "a smaller curate.visual.noise.area_share",
    GIVEN_MASK: "the data set's masks are noised whole (curate.visual.noise.area_share is for other tools): look at them with "
    "`mmedpo curate --preview 8`, mend those that mark more than the lesion, or take another curate.visual.tool; where lesions are as "
    "large as that, raise audit.max_noise_share",
    EVEN_MAP: "the tool marks one even region, which is noised whole whatever curate.visual.noise.area_share is: take another "
    "curate.visual.tool; where lesions are as large as that, raise audit.max_noise_share",
    RELEASED_SCRIPT: "curate.visual.noise.mode=diffusion: mode released noises most of any image",
}
_ON_THE_LESION = {
    AREA_SHARE: "a larger curate.visual.noise.area_share, or another curate.visual.tool",
    GIVEN_MASK: "the noise lies on the mask and changes little: more of it (curate.visual.noise.steps; of mode additive "
    "curate.visual.noise.std, of blur curate.visual.noise.blur_sigma)",
    EVEN_MAP: "another curate.visual.tool",
    RELEASED_SCRIPT: "another curate.visual.tool",
}
# What a heat map marks: at least half of its highest value.
_HOT = 0.5


def _visual_pairs(features: Features) -> np.ndarray:
    if not features.visual.any():
        raise NotCheckedError("the table has no visual pair")
    return features.visual


def same_image(features: Features, _: AuditConfig) -> Finding:
    """Visual pairs whose rejected image is the original."""
    visual = _visual_pairs(features)
    if "rejected_image_uri" not in features.columns:
        raise NotCheckedError("the table has no column rejected_image_uri")
    mask, of = visual & features.same_image, int(visual.sum())
    return finding_of_rows(
        "same_image",
        mask,
        of,
        share_severity(int(mask.sum()), of, high=0.01, least="medium"),
        f"{noun(int(mask.sum()), 'visual pair')} with the original as the rejected image: nothing to prefer",
        "remove them (--fix)",
        fixed=True,
    )


def finding_not_asked(features: Features, _: AuditConfig) -> Finding:
    """Visual pairs whose answer the lesion does not decide."""
    visual = _visual_pairs(features)
    mask, of = visual & ~features.finding_named, int(visual.sum())
    return finding_of_rows(
        "finding_not_asked",
        mask,
        of,
        share_severity(int(mask.sum()), of, medium=0.25, least="info" if mask.sum() < of / 20 else "low"),
        f"question and answer of {noun(int(mask.sum()), 'visual pair')} name no finding (modality, plane, organ): noise on a "
        "lesion leaves their answer right, and training turns from it all the same",
        "curate.visual.questions=finding",
    )


def noise_area(features: Features, settings: AuditConfig) -> Finding:
    """Visual pairs whose noise covers most of the image."""
    visual = _visual_pairs(features)
    known = visual & ~np.isnan(features.noise_share)
    if not known.any():
        raise NotCheckedError("the visual pairs have no noise parameters")
    mask, of = known & (features.noise_share > settings.max_noise_share), int(known.sum())
    median = float(np.median(features.noise_share[known]))
    return finding_of_rows(
        "noise_area",
        mask,
        of,
        share_severity(int(mask.sum()), of, high=0.5, medium=0.1),
        f"the noise of {noun(int(mask.sum()), 'visual pair')} covers more than {percent(settings.max_noise_share)} of the image (median {percent(median)}): "
        "any model sees it without reading the lesion",
        _remedies(_LESS_NOISE, features, mask),
        details={"median_share": round(median, 6)},
    )


def _remedies(remedies: dict[int, str], features: Features, mask: np.ndarray) -> str:
    """What to do about the pairs of a mask, (N,) bool, given what bounded their noise."""
    return "; ".join(
        dict.fromkeys(remedies[bound] for bound in np.unique(features.noise_bound[mask]).tolist())
    )


VISUAL_CHECKS: dict[str, Check] = {
    "same_image": same_image,
    "finding_not_asked": finding_not_asked,
    "noise_area": noise_area,
}
# Findings of `image_findings`.
IMAGE_CHECKS = ("unreadable_image", "unchanged_image", "noise_beside_lesion")


# ---------------------------------------------------------------------- images


@dataclass(frozen=True)
class Measured:
    """What one visual pair's images show.

    Attributes:
        problem: why they could not be compared ("image_missing", "image_undecodable", "image_too_large", "image_unreadable",
            "size_differs"), or None.
        changed: share of the image that differs by more than 4 levels of 255, 0 to 1.
        identical: every pixel is the same.
        cover: share of the lesion that differs; NaN where no lesion is known.
        region: what stands for the lesion: the data set's mask, the tool's heat map, or None.
    """

    problem: str | None
    changed: float = float("nan")
    identical: bool = False
    cover: float = float("nan")
    region: Literal["mask", "heat map"] | None = None


def image_findings(
    pairs: PairTable, features: Features, samples: Samples | None, *, seed: int, max_pixels: int
) -> tuple[list[Finding], dict[str, str]]:
    """Measures a sample of the visual pairs.

    Args:
        pairs: the table.
        features: its numbers.
        samples: gives the lesion masks; without it the heat maps stand for them.
        seed: of the draw.
        max_pixels: larger images are not decoded.

    Returns:
        The findings, and for the checks of `IMAGE_CHECKS` that could not be made why.
    """
    reason = None
    candidates = np.flatnonzero(features.visual & ~features.same_image)
    if not {"image_uri", "rejected_image_uri"} <= pairs.columns:
        reason = "the table has no columns image_uri and rejected_image_uri"
    elif len(candidates) == 0:
        reason = "the table has no visual pair with a second image"
    if reason is not None:
        unchecked = dict.fromkeys(IMAGE_CHECKS, reason)
        nothing = np.zeros(0, np.int64)
        if not _recorded(features).any():
            return [], unchecked
        del unchecked["noise_beside_lesion"]
        return [_beside_lesion(features, nothing, [])], unchecked
    size = min(SAMPLE, len(candidates))
    drawn = np.sort(np.random.default_rng(seed).choice(candidates, size, replace=False))
    measured = [_measure(place, max_pixels) for place in _places(pairs, features, samples, drawn)]
    findings = [
        _unreadable(drawn, measured),
        _unchanged(drawn, measured),
        _beside_lesion(features, drawn, measured),
    ]
    return findings, {}


@dataclass(frozen=True)
class _Place:
    """Where a visual pair's files are, and what was asked about them."""

    original: str
    noised: str
    mask: str | None
    heat: str | None
    question: str
    answer: str


def _places(pairs: PairTable, features: Features, samples: Samples | None, drawn: np.ndarray) -> list[_Place]:
    names = ("image_uri", "rejected_image_uri", "question", "chosen")
    original, noised, question, answer = (pairs.values(name, drawn) for name in names)
    heat = pairs.values("heat_map_uri", drawn) if "heat_map_uri" in pairs.columns else [None] * len(drawn)
    masks: list[str | None] = [None] * len(drawn)
    if samples is not None and "mask_uri" in samples.table.column_names:
        column = samples.table["mask_uri"]
        masks = [column[int(row)].as_py() if row >= 0 else None for row in features.sample_row[drawn]]
    found = zip(original, noised, masks, heat, question, answer, strict=True)
    return [
        _Place(before, after, mask, map_uri, asked or "", answered or "")
        for before, after, mask, map_uri, asked, answered in found
    ]


def _measure(place: _Place, max_pixels: int) -> Measured:
    try:
        before, after = (images.load_image(uri, max_pixels) for uri in (place.original, place.noised))
    except images.ImageError as error:
        return Measured(error.reason)
    except OSError:
        return Measured("image_unreadable")
    if before.size != after.size:
        return Measured("size_differs")
    pixels = [np.asarray(images.to_rgb(image), np.int16) for image in (before, after)]
    changed = np.abs(pixels[0] - pixels[1]).max(axis=2) > _LEVELS
    identical = before.mode == after.mode and np.array_equal(np.asarray(before), np.asarray(after))
    region, kind = _lesion(place, before.size, max_pixels)
    cover = float(changed[region].mean()) if region is not None else float("nan")
    return Measured(None, float(changed.mean()), identical, cover, kind)


def _lesion(
    place: _Place, size: tuple[int, int], max_pixels: int
) -> tuple[np.ndarray | None, Literal["mask", "heat map"] | None]:
    """(H, W) bool of the lesion and what it comes from; None where nothing readable marks one."""
    sources: tuple[tuple[str | None, Literal["mask", "heat map"]], ...] = (
        (place.mask, "mask"),
        (place.heat, "heat map"),
    )
    for uri, kind in sources:
        if not uri:
            continue
        try:
            image = images.load_image(uri, max_pixels)
        except (images.ImageError, OSError):
            continue
        region = marked_pixels(image) if kind == "mask" else _hot(image)
        if image.size != size:
            region = np.asarray(Image.fromarray(region).resize(size, Image.Resampling.NEAREST))
        if kind == "mask":
            with contextlib.suppress(OSError):
                region, _ = asked_region(region, uri, place.question, place.answer)
        if region.any():
            return region, kind
    return None, None


def _hot(heat_map: Image.Image) -> np.ndarray:
    """(H, W) bool: the hottest places of a stored heat map."""
    grey = heat_map if heat_map.mode in ("L", "1", "I;16", "I", "F") else images.to_rgb(heat_map).convert("L")
    values = np.asarray(grey).astype(np.float64)
    return values >= max(_HOT * values.max(), 1e-9)


def _unreadable(drawn: np.ndarray, measured: list[Measured]) -> Finding:
    bad = np.array([item.problem is not None for item in measured])
    reasons = sorted({item.problem for item in measured if item.problem})
    return Finding(
        check="unreadable_image",
        severity=share_severity(int(bad.sum()), len(drawn), high=0.05, least="medium"),
        figure=float(bad.mean()),
        says=f"the images of {int(bad.sum())} of {noun(len(drawn), 'visual pair')} looked at cannot be compared"
        + (f" ({', '.join(reasons)})" if reasons else ""),
        count=int(bad.sum()),
        of=len(drawn),
        rows=drawn[bad],
        remedy="put the images back where the table names them, or make the pairs again in a new run.folder",
        details={"reasons": {reason: sum(item.problem == reason for item in measured) for reason in reasons}},
    )


def _unchanged(drawn: np.ndarray, measured: list[Measured]) -> Finding:
    readable = np.array([item.problem is None for item in measured])
    if not readable.any():
        return _not_seen("unchanged_image")
    identical = np.array([item.identical for item in measured])
    median = float(np.median([item.changed for item in measured if item.problem is None]))
    return Finding(
        check="unchanged_image",
        severity=share_severity(int(identical.sum()), int(readable.sum()), high=0.01, least="medium"),
        figure=float(identical.sum() / readable.sum()),
        says=f"{int(identical.sum())} of {noun(int(readable.sum()), 'rejected image')} looked at have the original's pixels (median "
        f"changed {percent(median)} of the image)",
        count=int(identical.sum()),
        of=int(readable.sum()),
        rows=drawn[identical],
        remedy="more noise (curate.visual.noise.steps; of mode additive curate.visual.noise.std, of blur curate.visual.noise.blur_sigma), or leave out pairs whose tool was not sure "
        "(curate.visual.min_confidence)",
        details={"median_changed_share": round(median, 6)},
    )


def _recorded(features: Features) -> np.ndarray:
    """(N,) bool, visual pairs that record how much of the lesion lies under the noise."""
    return features.visual & ~np.isnan(features.lesion_covered)


def _beside_lesion(features: Features, drawn: np.ndarray, measured: list[Measured]) -> Finding:
    """All pairs by what they record, the drawn ones by their images; the worse of the two shares counts."""
    recorded = _recorded(features)
    known = np.array([item.region is not None for item in measured], bool)
    if not known.any() and not recorded.any():
        return _not_seen("noise_beside_lesion")
    cover = np.array([item.cover for item in measured], np.float64)
    of_recorded = recorded & (np.nan_to_num(features.lesion_covered) < _LEAST_COVER)
    of_measured = known & (np.nan_to_num(cover) < _LEAST_COVER)
    missed, checked = of_recorded.copy(), recorded.copy()
    missed[drawn[of_measured]] = True
    checked[drawn[known]] = True
    shares = [(int(of_recorded.sum()), int(recorded.sum())), (int(of_measured.sum()), int(known.sum()))]
    count, of = max((share for share in shares if share[1]), key=lambda share: share[0] / share[1])
    sources = {kind: sum(item.region == kind for item in measured) for kind in ("mask", "heat map")}
    medians = {
        "median_recorded": round(float(np.median(features.lesion_covered[recorded])), 6)
        if recorded.any()
        else None,
        "median_cover": round(float(np.median(cover[known])), 6) if known.any() else None,
    }
    said = []
    if medians["median_recorded"] is not None:
        said.append(
            f"{noun(shares[0][1], 'pair')} by their noise parameters, median {percent(medians['median_recorded'])} covered"
        )
    if medians["median_cover"] is not None:
        named = ", ".join(f"{kind} {number}" for kind, number in sources.items() if number)
        said.append(
            f"{shares[1][1]} by their images ({named}), median {percent(medians['median_cover'])} changed"
        )
    return Finding(
        check="noise_beside_lesion",
        severity=share_severity(count, of, high=0.25, medium=0.05),
        figure=count / of,
        says=f"the noise of {int(missed.sum())} of {noun(int(checked.sum()), 'visual pair')} leaves the lesion as it is: "
        + "; ".join(said),
        count=int(missed.sum()),
        of=int(checked.sum()),
        rows=np.flatnonzero(missed),
        remedy=_remedies(_ON_THE_LESION, features, missed),
        details={"recorded": shares[0][1], **medians, "regions": sources},
    )


def _not_seen(check: str) -> Finding:
    """A check that no drawn pair allowed; the unreadable images are their own finding."""
    return Finding(check, None, 0.0, "no image to look at", 0, 0, np.zeros(0, np.int64), "")
