"""Checks of rows against rows and against the samples: duplicates, contradictions, ground truth, train against test."""

from __future__ import annotations

import numpy as np

from mmedpo_ray.audit.features import DIFFERS, OPPOSITE, Features
from mmedpo_ray.audit.finding import (
    Check,
    Finding,
    NotCheckedError,
    Severity,
    finding_of_rows,
    noun,
    percent,
    share_severity,
)
from mmedpo_ray.audit.settings import AuditConfig


def duplicate_id(features: Features, _: AuditConfig) -> Finding:
    """Rows whose pair_id another row already has."""
    if "pair_id" not in features.columns:
        raise NotCheckedError("the table has no column pair_id")
    mask, of = later_of_equal(features.pair_id), len(features)
    return finding_of_rows(
        "duplicate_id",
        mask,
        of,
        "high" if mask.any() else None,
        f"{noun(int(mask.sum()), 'row')} with the pair_id of an earlier row: reference log-probabilities would be mixed up",
        "give every pair an id of its own",
    )


def duplicate_pair(features: Features, _: AuditConfig) -> Finding:
    """Rows that repeat an earlier one: image, question and both answers."""
    mask, of = later_of_equal(np.where(features.asked == 0, 0, features.content)), len(features)
    _image_named(features)
    return finding_of_rows(
        "duplicate_pair",
        mask,
        of,
        share_severity(int(mask.sum()), of, high=0.05, medium=0.01),
        f"{noun(int(mask.sum()), 'row')} with the image, the question and both answers of an earlier row: that pair counts twice",
        "remove the later ones (--fix)",
        fixed=True,
    )


def repeated_question(features: Features, _: AuditConfig) -> Finding:
    """Rows that ask an earlier row's question of its image again, with another rejected side."""
    _image_named(features)
    asked = np.where(features.visual & (features.asked != 0), features.asked ^ 1, features.asked)
    content = np.where(features.asked == 0, 0, features.content)
    mask, of = later_of_equal(asked) & ~later_of_equal(content), len(features)
    return finding_of_rows(
        "repeated_question",
        mask,
        of,
        share_severity(int(mask.sum()), of, medium=0.2, least="low" if mask.sum() >= 0.05 * of else "info"),
        f"{noun(int(mask.sum()), 'row')} with the image and the question of an earlier row but another rejected side: that question counts more",
        "keep one pair a question, unless several rejected answers are meant",
    )


def contradicting_chosen(features: Features, _: AuditConfig) -> Finding:
    """One image and question with chosen answers that differ."""
    _image_named(features)
    # A leaked prompt is a finding of its own, not another answer.
    mask, opposite = contradictions(features, features.leak == 0)
    of = len(features)
    questions = len(np.unique(features.asked[mask]))
    return finding_of_rows(
        "contradicting_chosen",
        mask,
        of,
        share_severity(int(mask.sum()), of, high=0.01, medium=0.001),
        f"{noun(questions, 'question')} about one image with different chosen answers ({noun(int(mask.sum()), 'pair')}; yes against no in "
        f"{opposite:,})",
        "look at them and keep the right answer; --fix removes all of them",
        fixed=True,
        details={"questions": questions, "opposite_polarity": opposite},
    )


def contradictions(features: Features, alive: np.ndarray) -> tuple[np.ndarray, int]:
    """Pairs whose image and question occur with another chosen answer, and how many questions have a yes and a no.

    Two answers that both begin with yes, or both with no, agree.

    Args:
        features: the table.
        alive: (N,) bool, rows to look at.

    Returns:
        (N,) bool, and the count.
    """
    rows = np.flatnonzero(alive & (features.asked != 0))
    _, group = np.unique(features.asked[rows], return_inverse=True)
    polarity = features.polarity[rows]
    answer = np.where(polarity != 0, polarity, features.answer[rows])
    size = int(group.max()) + 1 if len(rows) else 0
    first = np.zeros(size, np.int64)
    first[group[::-1]] = answer[::-1]
    mixed = np.zeros(size, bool)
    mixed[group[answer != first[group]]] = True
    says = [np.bincount(group[polarity == sign], minlength=size) > 0 for sign in (1, -1)]
    mask = np.zeros(len(features), bool)
    mask[rows[mixed[group]]] = True
    return mask, int((says[0] & says[1]).sum())


def later_of_equal(keys: np.ndarray) -> np.ndarray:
    """(N,) bool: an earlier row has the same key; key 0 stands for none."""
    later = np.ones(len(keys), bool)
    later[np.unique(keys, return_index=True)[1]] = False
    return later & (keys != 0)


def _image_named(features: Features) -> None:
    if not features.asked.any():
        raise NotCheckedError("the table names no image")


def confounded_pair(features: Features, _: AuditConfig) -> Finding:
    """Pairs that change the image and the answer at once."""
    if not {"kind", "image_uri", "rejected_image_uri"} <= features.columns:
        raise NotCheckedError("the table has no columns kind, image_uri and rejected_image_uri")
    mask = (features.text & ~features.same_image) | (features.visual & ~features.equal)
    of = len(features)
    return finding_of_rows(
        "confounded_pair",
        mask,
        of,
        share_severity(int(mask.sum()), of, high=0.01, least="medium"),
        f"{noun(int(mask.sum()), 'pair')} that change image and answer at once: which of them is preferred?",
        "give text pairs one image and visual pairs one answer",
    )


# ---------------------------------------------------------------------- against the samples

_HOLD_OUT = (
    "remove them (--fix); a split that shares no image is drawn by `mmedpo ingest` into a new run.folder where the data states no "
    "test part: all rows in one data.train_file, data.test_file unset, data.test_share above 0"
)


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


def _held_out(features: Features, split: str) -> None:
    if features.has_samples and split not in features.held_out:
        raise NotCheckedError(f"the samples table has no row of split {split}")


def unknown_sample(features: Features, _: AuditConfig) -> Finding:
    """Pairs whose sample is not in the samples table."""
    unknown, of = ~_known(features), len(features)
    named = "sample_id" in features.columns
    return finding_of_rows(
        "unknown_sample",
        unknown,
        of,
        share_severity(int(unknown.sum()), of, high=0.5, medium=0.01),
        f"{noun(int(unknown.sum()), 'pair')} of no row of the samples table: their answer and split cannot be checked",
        "the samples table is another one, or was ingested anew after the pairs were made: give the one that they were made of "
        "(--samples), or make them again (`mmedpo curate`, `mmedpo score`)"
        if named
        else "give the samples table of these images and questions (--samples); a question that it has twice with different answers "
        "is found for neither",
    )


def chosen_against_truth(features: Features, _: AuditConfig) -> Finding:
    """Chosen answers that are not the reference answer."""
    known = _matched(features)
    differs, opposite = features.truth >= DIFFERS, features.truth == OPPOSITE
    of, count = int(known.sum()), int(opposite.sum())
    severity = share_severity(int(differs.sum()), of, medium=0.05)
    if count:
        severity = "high" if count >= 0.01 * of else "medium"
    rows = np.concatenate([np.flatnonzero(opposite), np.flatnonzero(differs & ~opposite)])
    return Finding(
        check="chosen_against_truth",
        severity=severity,
        figure=int(differs.sum()) / of,
        says=f"{noun(int(differs.sum()), 'chosen answer')} ({percent(float(differs.sum()) / of)}) other than the sample's reference answer, {count:,} of them "
        "yes for no or no for yes",
        count=int(differs.sum()),
        of=of,
        rows=rows,
        remedy="restore the reference answer as chosen and make the pair again",
        details={"opposite_polarity": count},
    )


def pairs_of_test_samples(features: Features, _: AuditConfig) -> Finding:
    """Pairs made of samples that evaluation uses."""
    _held_out(features, "test")
    of = int(_matched(features).sum())
    return finding_of_rows(
        "pairs_of_test_samples",
        features.of_test,
        of,
        "high" if features.of_test.any() else None,
        f"{noun(int(features.of_test.sum()), 'pair')} made of samples of split test: evaluation would measure memory",
        "remove them (--fix)",
        fixed=True,
    )


def images_shared_with_test(features: Features, _: AuditConfig) -> Finding:
    """Pairs with an image that is also one of the test split, whatever sample they name."""
    return _shared_images(features, "test", "images_shared_with_test", features.image_in_test, "high")


def images_shared_with_validation(features: Features, _: AuditConfig) -> Finding:
    """Pairs with an image that is also one of split validate, and not of split test."""
    name = "images_shared_with_validation"
    return _shared_images(features, "validate", name, features.image_in_validation, "medium")


def _shared_images(
    features: Features, split: str, name: str, shared: np.ndarray, severity: Severity
) -> Finding:
    _known(features)
    _held_out(features, split)
    return finding_of_rows(
        name,
        shared,
        len(features),
        severity if shared.any() else None,
        f"{noun(int(shared.sum()), 'pair')} with an image (same content, id or file) that split {split} has too",
        _HOLD_OUT,
        fixed=True,
    )


ROW_CHECKS: dict[str, Check] = {
    "duplicate_id": duplicate_id,
    "duplicate_pair": duplicate_pair,
    "repeated_question": repeated_question,
    "contradicting_chosen": contradicting_chosen,
    "confounded_pair": confounded_pair,
    "unknown_sample": unknown_sample,
    "chosen_against_truth": chosen_against_truth,
    "pairs_of_test_samples": pairs_of_test_samples,
    "images_shared_with_test": images_shared_with_test,
    "images_shared_with_validation": images_shared_with_validation,
}
