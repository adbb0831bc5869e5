"""What a metric is: statistics of one answer that add up, and the value of their sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


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


@dataclass(frozen=True)
class Metric:
    """A score.

    Attributes:
        name: its key in ``summary.json``.
        label: its name in tables.
        answer_type: closed, open or report: the answers it is about.
        statistics: one answer → (K,) float.
        value: sums of statistics (…, K) → (…) values in [0, 1]; NaN where nothing was counted.
        official: kept for comparison with published figures only.
    """

    name: str
    label: str
    answer_type: str
    statistics: Callable[[Answer], Array]
    value: Callable[[Array], Array]
    official: bool = False


def mean_of(score: Callable[[Answer], float]) -> Callable[[Answer], Array]:
    """Statistics of a score whose value is the mean over answers: (score, 1)."""
    return lambda answer: np.array([float(score(answer)), 1.0])


def mean_value(sums: Array) -> Array:
    """Sum / count; NaN without answers."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)
