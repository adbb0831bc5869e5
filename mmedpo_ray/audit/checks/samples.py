"""Checks against the samples table: reference answers, and images that are held out for evaluation."""

from __future__ import annotations

import numpy as np

from mmedpo_ray.audit.check import (
    Audited,
    Check,
    Count,
    Measured,
    NotCheckedError,
    Severity,
    count_rows,
    percent,
)
from mmedpo_ray.audit.features import DIFFERS, OPPOSITE, Features

_HOLD_OUT = (
    "remove them (--fix); a split that shares no image is drawn by `mmedpo ingest` into a new run.folder "
    "where the data states no test part: all rows in one data.train_file, data.test_file unset, "
    "data.test_share above 0"
)
_SHARED = "{{n:pair}} with an image (same content, id or file) that split {split} has too"


def _known(features: Features) -> np.ndarray:
    """(N,) bool, the pair's sample is in the samples table."""
    if not features.has_samples:
        raise NotCheckedError("no samples table (give one with --samples)")
    if "sample_id" not in features.columns and not features.asked.any():
        raise NotCheckedError("the table names neither samples (sample_id) nor images (image_uri)")
    return features.sample_row >= 0


def _matched(features: Features) -> np.ndarray:
    """The same where there is any."""
    known = _known(features)
    if not known.any():
        raise NotCheckedError("no pair is of a row of the samples table (see unknown_sample)")
    return known


def _require_split(features: Features, split: str) -> None:
    _known(features)
    if split not in features.held_out:
        raise NotCheckedError(f"the samples table has no row of split {split}")


def _unknown_sample(audited: Audited) -> Measured:
    named_by = "id" if "sample_id" in audited.features.columns else "image"
    return count_rows(~_known(audited.features), causes=(named_by,))


def _chosen_against_truth(audited: Audited) -> Measured:
    features = audited.features
    of = int(_matched(features).sum())
    differs, opposite = np.flatnonzero(features.truth == DIFFERS), np.flatnonzero(features.truth == OPPOSITE)
    count = len(differs) + len(opposite)
    severity: Severity | None = "low" if count else None
    if len(opposite):
        severity = "high" if len(opposite) >= 0.01 * of else "medium"
    elif count / of >= 0.05:
        severity = "medium"
    return Measured(
        np.concatenate([opposite, differs]),
        of,
        severity=severity,
        values={"share": percent(count / of), "opposite": Count(len(opposite))},
        details={"opposite_polarity": len(opposite)},
    )


def _of_test_samples(audited: Audited) -> Measured:
    features = audited.features
    _require_split(features, "test")
    return count_rows(features.of_test, _matched(features))


def _shared_with_test(audited: Audited) -> np.ndarray:
    _require_split(audited.features, "test")
    return audited.features.image_in_test


def _shared_with_validation(audited: Audited) -> np.ndarray:
    _require_split(audited.features, "validate")
    return audited.features.image_in_validation


CHECKS = (
    Check(
        "unknown_sample",
        "{n:pair} of no row of the samples table: their answer and split cannot be checked",
        {
            "id": "the samples table is another one, or was ingested again after the pairs were made: give "
            "the one that they were made of (--samples), or make them again (`mmedpo curate`, `mmedpo "
            "score`)",
            "image": "give the samples table of these images and questions (--samples); a question that it "
            "has twice with different answers is found for neither",
        },
        _unknown_sample,
        {"high": 0.5, "medium": 0.01, "low": 0},
    ),
    Check(
        "chosen_against_truth",
        "{n:chosen answer} ({share}) other than the sample's reference answer, {opposite} of them yes for no "
        "or no for yes",
        "restore the reference answer as chosen and make the pair again",
        _chosen_against_truth,
    ),
    Check(
        "pairs_of_test_samples",
        "{n:pair} made of samples of split test: evaluation would measure memory",
        "remove them (--fix)",
        _of_test_samples,
        {"high": 0},
        fixable=True,
    ),
    Check(
        "images_shared_with_test",
        _SHARED.format(split="test"),
        _HOLD_OUT,
        _shared_with_test,
        {"high": 0},
        fixable=True,
    ),
    Check(
        "images_shared_with_validation",
        _SHARED.format(split="validate"),
        _HOLD_OUT,
        _shared_with_validation,
        {"medium": 0},
        fixable=True,
    ),
)
