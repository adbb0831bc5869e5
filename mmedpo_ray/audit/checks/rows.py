"""Checks of whole rows and of rows against rows: malformed, repeated, contradicting, and confounded ones."""

from __future__ import annotations

import numpy as np

from mmedpo_ray.audit.check import Audited, Check, Count, Measured, NotCheckedError, count_rows
from mmedpo_ray.audit.features import Features


def later_of_equal(keys: np.ndarray) -> np.ndarray:
    """(N,) bool: an earlier row has the same key; key 0 stands for none."""
    later = np.ones(len(keys), bool)
    later[np.unique(keys, return_index=True)[1]] = False
    return later & (keys != 0)


def repeated_pairs(features: Features) -> np.ndarray:
    """(N,) bool: an earlier row has the same kind, images, question and answers.

    Raises:
        NotCheckedError: no row names an image.
    """
    return later_of_equal(np.where(_asked(features) == 0, 0, features.content))


def contradictions(features: Features, alive: np.ndarray) -> tuple[np.ndarray, int]:
    """Pairs whose image and question occur with another chosen answer, and how many are yes against no.

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


def _asked(features: Features) -> np.ndarray:
    if not features.asked.any():
        raise NotCheckedError("the table names no image")
    return features.asked


def _repeated_question(audited: Audited) -> np.ndarray:
    features = audited.features
    repeated = repeated_pairs(features)
    # A visual pair and a text pair of one question are different questions.
    asked = np.where(features.visual & (features.asked != 0), features.asked ^ 1, features.asked)
    return later_of_equal(asked) & ~repeated


def _contradicting_chosen(audited: Audited) -> Measured:
    features = audited.features
    asked = _asked(features)
    # A leaked prompt is a finding of its own, not another answer.
    mask, opposite = contradictions(features, features.leak == 0)
    questions = len(np.unique(asked[mask]))
    values = {"questions": Count(questions), "opposite": Count(opposite)}
    details = {"questions": questions, "opposite_polarity": opposite}
    return count_rows(mask, values=values, details=details)


def _confounded(audited: Audited) -> np.ndarray:
    features = audited.features
    return np.where(features.visual, ~features.equal, ~features.same_image)


def _malformed(audited: Audited) -> Measured:
    malformed = audited.pairs.malformed
    places = ", ".join(map(str, malformed[:5])) + (", …" if len(malformed) > 5 else "")
    return Measured(
        np.zeros(0, np.int64),
        audited.pairs.num_rows + len(malformed),
        count=len(malformed),
        values={"places": f" (positions {places})" if malformed else ""},
    )


CHECKS = (
    Check(
        "duplicate_id",
        "{n:row} with the pair_id of an earlier row: reference log-probabilities would be mixed up",
        "give every pair an id of its own",
        lambda audited: later_of_equal(audited.features.pair_id),
        {"high": 0},
        columns=("pair_id",),
    ),
    Check(
        "duplicate_pair",
        "{n:row} with the image, the question and both answers of an earlier row: that pair counts twice",
        "remove the later ones (--fix)",
        lambda audited: repeated_pairs(audited.features),
        {"high": 0.05, "medium": 0.01, "low": 0},
        fixable=True,
    ),
    Check(
        "repeated_question",
        "{n:row} with the image and the question of an earlier row but another rejected side: that question "
        "counts more",
        "keep one pair per question, unless several rejected answers are meant",
        _repeated_question,
        {"medium": 0.2, "low": 0.05, "info": 0},
    ),
    Check(
        "contradicting_chosen",
        "{questions:question} about one image with different chosen answers ({n:pair}; yes against no in "
        "{opposite})",
        "look at them and keep the right answer; --fix removes all of them",
        _contradicting_chosen,
        {"high": 0.01, "medium": 0.001, "low": 0},
        fixable=True,
    ),
    Check(
        "confounded_pair",
        "{n:pair} that change image and answer at once: which of them is preferred?",
        "give text pairs one image and visual pairs one answer",
        _confounded,
        {"high": 0.01, "medium": 0},
        columns=("kind", "image_uri", "rejected_image_uri"),
    ),
    Check(
        "malformed_row",
        "{n:row} that are no preference pair and were not audited{places}",
        "correct the rows, or leave them out (--fix)",
        _malformed,
        {"high": 0.05, "medium": 0.01, "low": 0},
        fixable=True,
    ),
)
