"""Checks of what the table tells of visual pairs."""

from __future__ import annotations

import numpy as np

from mmedpo_ray.audit.check import Audited, Check, Measured, NotCheckedError, count_rows, percent
from mmedpo_ray.audit.features import AREA_SHARE, EVEN_MAP, GIVEN_MASK, RELEASED_SCRIPT, Features


def noise_causes(features: Features, mask: np.ndarray) -> tuple[int, ...]:
    """How the noise of the rows in a mask (N,) bool was bounded: values of `noise_bound`."""
    return tuple(np.unique(features.noise_bound[mask]).tolist())


def _noise_area(audited: Audited) -> Measured:
    features, limit = audited.features, audited.settings.max_noise_share
    known = features.visual & ~np.isnan(features.noise_share)
    if not known.any():
        raise NotCheckedError("the visual pairs have no noise parameters")
    mask = known & (features.noise_share > limit)
    median = float(np.median(features.noise_share[known]))
    return count_rows(
        mask,
        known,
        values={"limit": percent(limit), "median": percent(median)},
        causes=noise_causes(features, mask),
        details={"median_share": round(median, 6)},
    )


_LARGE_LESIONS = "where lesions are as large as that, raise audit.max_noise_share"
CHECKS = (
    Check(
        "same_image",
        "{n:visual pair} with the original as the rejected image: nothing to prefer",
        "remove them (--fix)",
        lambda audited: audited.features.same_image,
        {"high": 0.01, "medium": 0},
        kind="visual",
        columns=("rejected_image_uri",),
        fixable=True,
    ),
    Check(
        "finding_not_asked",
        "question and answer of {n:visual pair} name no finding (modality, plane, organ): noise on a lesion "
        "leaves their answer right, and training turns from it all the same",
        "curate.visual.questions=finding",
        lambda audited: ~audited.features.finding_named,
        {"medium": 0.25, "low": 0.05, "info": 0},
        kind="visual",
    ),
    Check(
        "noise_area",
        "the noise of {n:visual pair} covers more than {limit} of the image (median {median}): any model "
        "sees it without reading the lesion",
        {
            AREA_SHARE: "a smaller curate.visual.noise.area_share",
            GIVEN_MASK: "the masks of the data set are noised whole (curate.visual.noise.area_share is for "
            "other tools): look at them with `mmedpo curate --preview 8`, correct those that mark more than "
            f"the lesion, or take another curate.visual.tool; {_LARGE_LESIONS}",
            EVEN_MAP: "the tool marks one even region, which is noised whole whatever "
            f"curate.visual.noise.area_share is: take another curate.visual.tool; {_LARGE_LESIONS}",
            RELEASED_SCRIPT: "curate.visual.noise.mode=diffusion: mode released noises most of any image",
        },
        _noise_area,
        {"high": 0.5, "medium": 0.1, "low": 0},
        kind="visual",
    ),
)
