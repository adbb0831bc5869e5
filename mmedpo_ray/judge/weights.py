"""Relevance scores → weights of the loss.

The paper states s' = (s − µ)/σ, clipped to [0.75, 1.25], with µ = 1 and σ² = 0.1 (MMedPO, section 3.2). Mode
``literal`` is that formula as written: as scores lie in [0, 1] it is never above 0, so every weight becomes
the lower clip
    bound. Mode ``match_moments``, the default, gives the scores mean 1 and variance 0.1 and then clips. Mode
    ``raw`` is the score itself, as in the released code.

Clipping can move the mean off 1 (skewed scores). It is not rescaled: rescaling would leave the clip bounds,
and the loss Σw·ℓ/Σw does not depend on the scale of all weights, only the balance between kinds does, by the
few percent that ``summary`` reports as ``mean``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmedpo_ray.judge.settings import WeightConfig

Floats = npt.NDArray[np.float64]

# Scores whose spread is below this are one and the same score.
_CONSTANT = 1e-9
_BINS = 20


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation (population) of the scores of one group."""

    mean: float
    std: float


class Fit:
    """The moments of each group, from scores that come batch by batch (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        # Group → rows, mean, sum of squared deviations from it.
        self._sums: dict[str, tuple[int, float, float]] = {}

    def add(self, scores: Floats, groups: Sequence[str]) -> None:
        """Adds a batch.

        Args:
            scores: [N], in [0, 1].
            groups: [N], see :func:`group_of`.
        """
        names = np.asarray(groups, dtype=object)
        for name in dict.fromkeys(groups):
            values = scores[names == name]
            fresh_mean = float(values.mean())
            fresh_squares = float(np.square(values - fresh_mean).sum())
            count, mean, squares = self._sums.get(str(name), (0, 0.0, 0.0))
            total, apart = count + values.size, fresh_mean - mean
            self._sums[str(name)] = (
                total,
                mean + apart * values.size / total,
                squares + fresh_squares + apart**2 * count * values.size / total,
            )

    def moments(self) -> dict[str, Moments]:
        """The moments of all that was added."""
        return {
            name: Moments(mean, math.sqrt(squares / count))
            for name, (count, mean, squares) in self._sums.items()
        }


def group_of(kind: str, dataset: str, settings: WeightConfig) -> str:
    """The group in which a pair's score is normalised."""
    return {"kind": kind, "dataset": dataset, "global": "all"}[settings.per]


def apply(
    scores: Floats, groups: Sequence[str], moments: dict[str, Moments], settings: WeightConfig
) -> Floats:
    """Weights of scores under moments fitted before.

    Args:
        scores: [N], in [0, 1].
        groups: [N], each a key of ``moments``.
        moments: those of the whole table (:class:`Fit`).
        settings: mode, variance and clip bounds.

    Returns:
        [N], not negative.
    """
    if settings.mode == "none":
        return np.ones_like(scores)
    if settings.mode == "raw":
        return scores.copy()
    low, high = settings.clip
    sigma = math.sqrt(settings.variance)
    if settings.mode == "literal":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.clip(np.nan_to_num((scores - 1.0) / sigma, nan=0.0), low, high)
    mean = np.array([moments[group].mean for group in groups], dtype=np.float64)
    std = np.array([moments[group].std for group in groups], dtype=np.float64)
    constant = std < _CONSTANT
    z = np.where(constant, 0.0, (scores - mean) / np.where(constant, 1.0, std))
    return np.where(constant, 1.0, np.clip(1.0 + sigma * z, low, high))


class Summary:
    """Figures for the manifest, from batches: per kind the mean, effective sample share and histograms.

    Args:
        settings: mode, variance and clip bounds.
    """

    def __init__(self, settings: WeightConfig) -> None:
        self._clips = settings.mode in ("match_moments", "literal")
        self._bounds = (
            settings.clip if self._clips else ((0.0, 1.0) if settings.mode == "raw" else (0.5, 1.5))
        )
        # A constant score has weight 1, which any clip bounds may leave out.
        self._range = (min(self._bounds[0], 1.0), max(self._bounds[1], 1.0))
        # Of each kind: rows, Σ score, Σ score², Σ weight, Σ weight², rows on a clip bound; counts of scores
        # and weights.
        self._sums: dict[str, Floats] = defaultdict(lambda: np.zeros(6))
        self._counts: dict[str, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros((2, _BINS), np.int64))

    def add(self, scores: Floats, weights: Floats, kinds: Sequence[str]) -> None:
        """Adds a batch: [N] scores in [0, 1], [N] weights, [N] kinds."""
        names = np.asarray(kinds, dtype=object)
        low, high = self._bounds
        for kind in dict.fromkeys(kinds):
            s, w = scores[names == kind], weights[names == kind]
            at_clip = (np.isclose(w, low) | np.isclose(w, high)).sum()
            self._sums[kind] += [len(w), s.sum(), np.square(s).sum(), w.sum(), np.square(w).sum(), at_clip]
            self._counts[kind] += [
                np.histogram(s, bins=_BINS, range=(0.0, 1.0))[0],
                np.histogram(w, bins=_BINS, range=self._range)[0],
            ]

    @property
    def any_weight(self) -> bool:
        """Whether some weight is above 0."""
        return any(sums[3] > 0 for sums in self._sums.values())

    def figures(self) -> dict[str, Any]:
        """The figures of all that was added.

        Returns:
            ``{kind: {"n", "score_mean", "score_std", "mean", "at_clip", "effective_share", "weights": H,
            "scores": H}}`` with ``H = {"edges": [21], "counts": [20]}``. ``at_clip`` is the share of rows on
            a clip bound, ``effective_share`` the effective sample size as a share of the rows: (Σw)² /
            (n·Σw²), 1 for equal weights.
        """
        found: dict[str, Any] = {}
        for kind in sorted(self._sums):
            n, score, score_squares, weight, weight_squares, at_clip = self._sums[kind].tolist()
            mean = score / n
            found[kind] = {
                "n": int(n),
                "score_mean": round(mean, 4),
                "score_std": round(math.sqrt(max(0.0, score_squares / n - mean**2)), 4),
                "mean": round(weight / n, 4),
                "at_clip": round(at_clip / n, 4) if self._clips else 0.0,
                "effective_share": round(weight**2 / (n * weight_squares), 4) if weight_squares > 0 else 0.0,
                "weights": _histogram(self._counts[kind][1], self._range),
                "scores": _histogram(self._counts[kind][0], (0.0, 1.0)),
            }
        return found


def _histogram(counts: npt.NDArray[np.int64], limits: tuple[float, float]) -> dict[str, list[float]]:
    edges = np.linspace(*limits, _BINS + 1)
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}
