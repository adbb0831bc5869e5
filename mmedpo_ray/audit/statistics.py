"""How well one feature tells chosen from rejected: accuracy, AUC, a Kolmogorov-Smirnov test.

Half of the responses are chosen, so 0.5 is chance everywhere. A threshold's best accuracy is (1 + D)/2 with D
the two-sample Kolmogorov-Smirnov statistic, whose p-value says how often shuffled labels would do as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Separation:
    """What one feature gives away.

    Attributes:
        pairs: pairs measured.
        threshold: the best rule calls a response rejected where its value is above this (below, if
            ``rejected_is`` is "less").
        accuracy: share of the 2·pairs responses that this rule gets right, 0.5 to 1.
        auc: probability that a rejected response has more of the feature than a chosen one (ties half), 0 to
            1.
        pair_accuracy: share of the pairs told apart by which side has more (ties half), in the better
            direction, 0.5 to 1.
        rejected_is: "more" or "less": which side the rejected response usually is on.
        p_value: probability of such an ``accuracy`` or ``pair_accuracy`` by chance, the smaller one doubled.
    """

    pairs: int
    threshold: float
    accuracy: float
    auc: float
    pair_accuracy: float
    rejected_is: str
    p_value: float

    @property
    def strength(self) -> float:
        """The better of the two accuracies."""
        return max(self.accuracy, self.pair_accuracy)


def separation(chosen: np.ndarray, rejected: np.ndarray) -> Separation:
    """Measures one feature.

    Args:
        chosen: (N,) values of the chosen responses, counts of something (integers >= 0); N is at least 1.
        rejected: (N,) values of the rejected responses, in the same order.
    """
    size = len(chosen)
    values, of_chosen, of_rejected = _counts(chosen, rejected)
    below_chosen, below_rejected = np.cumsum(of_chosen) / size, np.cumsum(of_rejected) / size
    gap = below_chosen - below_rejected
    best = int(np.argmax(np.abs(gap)))
    auc = float(np.sum(of_rejected * (np.cumsum(of_chosen) - of_chosen / 2)) / (float(size) * size))
    more, less = int(np.sum(rejected > chosen)), int(np.sum(rejected < chosen))
    return Separation(
        pairs=size,
        threshold=float(values[best]),
        accuracy=float((1 + abs(gap[best])) / 2),
        auc=auc,
        pair_accuracy=0.5 + abs(more - less) / (2 * size),
        rejected_is="more" if gap[best] > 0 or (gap[best] == 0 and more >= less) else "less",
        p_value=min(1.0, 2 * min(_threshold_p(float(abs(gap[best])), size), _sign_p(more, less))),
    )


def _counts(chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values that occur, ascending, and how often on each side."""
    highest = int(max(chosen.max(), rejected.max()))
    sides = [np.bincount(side, minlength=highest + 1) for side in (chosen, rejected)]
    values = np.flatnonzero(sides[0] + sides[1])
    return values, sides[0][values], sides[1][values]


def _threshold_p(statistic: float, size: int) -> float:
    return float(stats.kstwobign.sf(statistic * math.sqrt(size / 2)))


def _sign_p(more: int, less: int) -> float:
    return float(stats.binomtest(more, more + less).pvalue) if more + less else 1.0


@dataclass(frozen=True)
class Explained:
    """How much of the weights' variance groups explain.

    Attributes:
        rows: rows measured.
        groups: groups with a row.
        eta_squared: between-group sum of squares over the total, 0 to 1.
        epsilon_squared: the same corrected for the number of groups (0 expected without any effect), at least
            0.
        p_value: one-way F test.
        means: mean weight of each group code that occurs.
    """

    rows: int
    groups: int
    eta_squared: float
    epsilon_squared: float
    p_value: float
    means: dict[int, float]


def explained(values: np.ndarray, codes: np.ndarray) -> Explained | None:
    """One-way analysis of variance.

    Args:
        values: (N,) weights, finite.
        codes: (N,) group of each, >= 0.

    Returns:
        The figures; None where there are fewer than two groups, no more rows than groups, or no variance.
    """
    counts = np.bincount(codes) if len(codes) else np.zeros(0, int)
    present = np.flatnonzero(counts)
    size, groups = len(values), len(present)
    if groups < 2 or size <= groups:
        return None
    means = np.bincount(codes, values)[present] / counts[present]
    total = float(np.sum((values - values.mean()) ** 2))
    if total <= 1e-12 * size:
        return None
    between = min(float(np.sum(counts[present] * (means - values.mean()) ** 2)), total)
    within = total - between
    free = size - groups
    eta = between / total
    p_value = (
        float(stats.f.sf((between / (groups - 1)) / (within / free), groups - 1, free)) if within > 0 else 0.0
    )
    return Explained(
        rows=size,
        groups=groups,
        eta_squared=eta,
        epsilon_squared=max(0.0, (between - (groups - 1) * within / free) / total),
        p_value=p_value,
        means=dict(zip(present.tolist(), means.tolist(), strict=True)),
    )
