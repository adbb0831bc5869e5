"""Checks of the images of visual pairs, of which a sample is read.

`curate` records with every pair how much of the lesion lies under the noise; the sample checks that record.
"""

from __future__ import annotations

import numpy as np

from mmedpo_ray.audit.check import Audited, Check, Count, Measured, NotCheckedError, percent
from mmedpo_ray.audit.checks.visual import noise_causes
from mmedpo_ray.audit.features import AREA_SHARE, EVEN_MAP, GIVEN_MASK, RELEASED_SCRIPT
from mmedpo_ray.audit.image_sample import ImageSample

# Noise that changes less of the lesion than this leaves it as it is. Clipping at black hides about half of
# the noise on a dark lesion, so that a half-changed lesion is no fault.
_LEAST_CHANGED = 0.1


def _unreadable(audited: Audited) -> Measured:
    sample = audited.images
    problems = [pair.problem for pair in sample.pairs if pair.problem is not None]
    reasons = {reason: problems.count(reason) for reason in sorted(set(problems))}
    return Measured(
        sample.rows[[pair.problem is not None for pair in sample.pairs]],
        len(sample.rows),
        values={
            "looked_at": Count(len(sample.rows)),
            "reasons": f" ({', '.join(reasons)})" if reasons else "",
        },
        details={"reasons": reasons},
    )


def _unchanged(audited: Audited) -> Measured:
    sample = audited.images
    readable = [pair for pair in sample.pairs if pair.problem is None]
    if not readable:
        raise NotCheckedError("none of the images that were looked at can be compared (see unreadable_image)")
    median = float(np.median([pair.changed for pair in readable]))
    return Measured(
        sample.rows[[pair.identical for pair in sample.pairs]],
        len(readable),
        values={"looked_at": Count(len(readable)), "median": percent(median)},
        details={"median_changed_share": round(median, 6)},
    )


def _beside_lesion(audited: Audited) -> Measured:
    """Counts by the recorded shares and by the sampled images; the worse of the two counts."""
    features = audited.features
    recorded = features.visual & ~np.isnan(features.lesion_covered)
    try:
        sample = audited.images
    except NotCheckedError:
        if not recorded.any():
            raise
        sample = ImageSample(np.zeros(0, np.int64), ())
    lesion_changed = np.array([pair.lesion_changed for pair in sample.pairs], np.float64)
    known = ~np.isnan(lesion_changed)
    if not known.any() and not recorded.any():
        raise NotCheckedError("no lesion is known of the visual pairs that were looked at")
    missed = recorded & (features.lesion_covered < _LEAST_CHANGED)
    is_beside = known & (lesion_changed < _LEAST_CHANGED)
    shares = [
        float(shown.sum() / of.sum()) for shown, of in ((missed, recorded), (is_beside, known)) if of.any()
    ]
    sources = {source: sum(pair.source == source for pair in sample.pairs) for source in ("mask", "heat map")}
    medians: dict[str, float | None] = {"median_recorded": None, "median_cover": None}
    said = []
    count = int(recorded.sum())
    if count:
        medians["median_recorded"] = median = round(float(np.median(features.lesion_covered[recorded])), 6)
        said.append(f"{Count(count):pair} by their noise parameters, median {percent(median)} covered")
    if known.any():
        medians["median_cover"] = median = round(float(np.median(lesion_changed[known])), 6)
        named = ", ".join(f"{source} {number}" for source, number in sources.items() if number)
        said.append(f"{known.sum()} by their images ({named}), median {percent(median)} changed")
    checked = recorded.copy()
    checked[sample.rows[known]] = True
    missed[sample.rows[is_beside]] = True
    return Measured(
        np.flatnonzero(missed),
        int(checked.sum()),
        figure=max(shares),
        values={"checked": Count(checked.sum()), "how": "; ".join(said)},
        causes=noise_causes(features, missed),
        details={"recorded": count, **medians, "regions": sources},
    )


CHECKS = (
    Check(
        "unreadable_image",
        "the images of {n} of {looked_at:visual pair} looked at cannot be compared{reasons}",
        "put the images back where the table names them, or make the pairs again in a new run.folder",
        _unreadable,
        {"high": 0.05, "medium": 0},
    ),
    Check(
        "unchanged_image",
        "{n} of {looked_at:rejected image} looked at have the original's pixels (median changed {median} of "
        "the image)",
        "more noise (curate.visual.noise.steps; of mode additive curate.visual.noise.std, of blur "
        "curate.visual.noise.blur_sigma), or leave out pairs whose tool was not sure "
        "(curate.visual.min_confidence)",
        _unchanged,
        {"high": 0.01, "medium": 0},
    ),
    Check(
        "noise_beside_lesion",
        "the noise of {n} of {checked:visual pair} leaves the lesion as it is: {how}",
        {
            AREA_SHARE: "a larger curate.visual.noise.area_share, or another curate.visual.tool",
            GIVEN_MASK: "the noise lies on the mask and changes little: more of it "
            "(curate.visual.noise.steps; of mode additive curate.visual.noise.std, of blur "
            "curate.visual.noise.blur_sigma)",
            EVEN_MAP: "another curate.visual.tool",
            RELEASED_SCRIPT: "another curate.visual.tool",
        },
        _beside_lesion,
        {"high": 0.25, "medium": 0.05, "low": 0},
    ),
)
