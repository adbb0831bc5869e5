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
        question: as it was asked; closed questions between two options are read from it.
    """

    reference: str
    prediction: str
    question: str = ""


class UnavailableError(Exception):
    """A metric cannot be computed here; the message says what is missing. Empty: nothing to say."""


@dataclass(frozen=True)
class Metric:
    """A score.

    One of ``statistics`` and ``batch`` is given. Callers use :meth:`of`, which serves both.

    Attributes:
        name: its key in ``summary.json``.
        label: its name in tables.
        answer_type: closed, open or report: the answers it is about.
        statistics: one answer → (K,) float, for a metric that looks at one answer at a time.
        value: sums of statistics (…, K) → (…) values in [0, 1] (CIDEr: [0, 10]); NaN where nothing was
            counted.
        role: main, detail or official.
        batch: N answers and the references of the whole test set → (N, K) float, for a metric that needs the
            whole set (CIDEr) or runs a model. May raise :class:`UnavailableError`.
    """

    name: str
    label: str
    answer_type: str
    statistics: Callable[[Answer], Array] | None
    value: Callable[[Array], Array]
    role: Role = "main"
    batch: Callable[[Sequence[Answer], Sequence[str]], Array] | None = None

    @property
    def official(self) -> bool:
        """Whether it is kept for comparison with published figures only."""
        return self.role == "official"

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
        if self.batch is not None:
            return self.batch(
                answers, [answer.reference for answer in answers] if references is None else references
            )
        assert self.statistics is not None
        return np.stack([self.statistics(answer) for answer in answers])


def mean_of(score: Callable[[Answer], float]) -> Callable[[Answer], Array]:
    """Statistics of a score whose value is the mean over answers: (score, 1)."""
    return lambda answer: np.array([float(score(answer)), 1.0])


def as_means(scores: Sequence[float]) -> Array:
    """The same for the scores of N answers: (N, 2)."""
    return np.stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))], axis=1)


def mean_value(sums: Array) -> Array:
    """Sum / count; NaN without answers."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def is_empty(text: str) -> bool:
    """Whether an answer says nothing: no word, number or character is left of it ("", ".", a thought block alone)."""
    return not any(letter.isalnum() for letter in final_answer(text))
