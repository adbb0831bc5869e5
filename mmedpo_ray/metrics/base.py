"""What a metric is: statistics of each answer that add up, and the value of their sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmedpo_ray.radiology.lexicon import final_answer

Array = np.ndarray

# main: compared and judged. detail: a part of a main metric, shown but not judged. official: for comparison
# with published figures.
Role = Literal["main", "detail", "official"]


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Attributes:
        reference: reference answer.
        prediction: the model's answer.
        question: as it was asked; the options of a closed question are read from it.
    """

    reference: str
    prediction: str
    question: str = ""


class UnavailableError(Exception):
    """A metric cannot be computed here; the message says what is missing. Empty: nothing to say."""


# N answers and the reference of every question of the test set → statistics (N, K). May raise an
# UnavailableError.
Statistics = Callable[[Sequence[Answer], Sequence[str]], Array]


def mean_value(sums: Array) -> Array:
    """Sum / count; NaN without answers."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


@dataclass(frozen=True)
class Metric:
    """A score.

    Attributes:
        name: its key in ``summary.json``.
        label: its name in tables.
        answer_type: closed, open or report: the answers it is about.
        statistics: answers → their statistics, see :func:`mean_of` and :func:`per_answer`.
        value: sums of statistics (…, K) → (…) values in [0, 1] (CIDEr: [0, 10]); NaN if nothing was counted.
        role: main, detail or official.
    """

    name: str
    label: str
    answer_type: str
    statistics: Statistics
    value: Callable[[Array], Array] = mean_value
    role: Role = "main"

    def of(self, answers: Sequence[Answer], references: Sequence[str] | None = None) -> Array:
        """Statistics of each answer.

        Args:
            answers: N answers, at least one.
            references: the reference of every question of the test set, each question once; default: those of
                ``answers``.

        Returns:
            (N, K)

        Raises:
            UnavailableError: something that the metric needs is not installed.
        """
        if references is None:
            references = [answer.reference for answer in answers]
        return self.statistics(answers, references)


def per_answer(statistics: Callable[[Answer], Array]) -> Statistics:
    """Statistics of a metric that looks at one answer at a time: one answer → (K,)."""
    return lambda answers, _: np.stack([statistics(answer) for answer in answers])


def mean_of(score: Callable[[Answer], float]) -> Statistics:
    """Statistics of a score whose value is the mean over answers."""
    return lambda answers, _: as_means([float(score(answer)) for answer in answers])


def as_means(scores: Sequence[float]) -> Array:
    """Statistics (score, 1) of the scores of N answers: (N, 2)."""
    return np.stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))], axis=1)


def micro_f1(sums: Array, *, empty: float) -> Array:
    """Micro-averaged F1 of things that both sides, the answer alone and the reference alone have.

    Args:
        sums: (…, 4): numbers of these three, and the number of answers.
        empty: the value if neither side has any.

    Returns:
        (…); NaN without answers.
    """
    shared, invented, missed, count = np.moveaxis(sums, -1, 0)
    total = 2 * shared + invented + missed
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(total > 0, 2 * shared / total, empty)
    return np.where(count > 0, value, np.nan)


def is_empty(text: str) -> bool:
    """Whether an answer says nothing: no letter or digit is left of it ("", ".", a thought block alone)."""
    return not any(letter.isalnum() for letter in final_answer(text))
