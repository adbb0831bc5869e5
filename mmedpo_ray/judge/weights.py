"""Relevance scores → weights of the loss.

The paper states s' = (s − µ)/σ, clipped to [0.75, 1.25], with µ = 1 and σ² = 0.1 (MMedPO, section 3.2). Mode ``literal`` is
that formula as written: as scores lie in [0, 1] it is never above 0, so every weight becomes the lower clip bound. Mode
``match_moments``, the default, gives the scores mean 1 and variance 0.1 and then clips. Mode ``raw`` is the score itself, as in
the released code.

Clipping can move the mean off 1 (skewed scores). It is not rescaled: rescaling would leave the clip bounds, and the loss
Σw·ℓ/Σw does not depend on the scale of all weights, only the balance between kinds does, by the few percent that
``summary`` reports as ``mean``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmedpo_ray.config import WeightConfig

Floats = npt.NDArray[np.float64]

# Scores whose spread is below this are one and the same score.
_CONSTANT = 1e-9
_BINS = 20


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation (population) of the scores of one group."""

    mean: float
    std: float


def group_of(kind: str, dataset: str, settings: WeightConfig) -> str:
    """The group in which a pair's score is normalised."""
    return {"kind": kind, "dataset": dataset, "global": "all"}[settings.per]


def fit(scores: Floats, groups: Sequence[str]) -> dict[str, Moments]:
    """The moments of each group.

    Args:
        scores: [N], in [0, 1].
        groups: [N], see :func:`group_of`.
    """
    names = np.asarray(groups, dtype=object)
    return {
        str(name): Moments(float(scores[names == name].mean()), float(scores[names == name].std()))
        for name in dict.fromkeys(groups)
    }


def apply(
    scores: Floats, groups: Sequence[str], moments: dict[str, Moments], settings: WeightConfig
) -> Floats:
    """Weights of scores under moments fitted before.

    Args:
        scores: [N], in [0, 1].
        groups: [N], each a key of ``moments``.
        moments: what :func:`fit` returned for the whole table.
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


def weigh(scores: Floats, groups: Sequence[str], settings: WeightConfig) -> Floats:
    """Weights of a whole table: :func:`fit`, then :func:`apply`."""
    return apply(scores, groups, fit(scores, groups), settings)


def effective_share(weights: Floats) -> float:
    """Effective sample size as a share of the rows: (Σw)² / (n·Σw²), 1 for equal weights, 0 where all are 0."""
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / (weights.size * squares) if squares > 0 else 0.0


def summary(scores: Floats, weights: Floats, kinds: Sequence[str], settings: WeightConfig) -> dict[str, Any]:
    """Figures for the manifest: per kind the mean, effective sample share and histograms of scores and weights.

    Returns:
        ``{kind: {"n", "score_mean", "score_std", "mean", "at_clip", "effective_share", "weights": H, "scores": H}}`` with
        ``H = {"edges": [21], "counts": [20]}``; ``at_clip`` is the share of rows on a clip bound.
    """
    names = np.asarray(kinds, dtype=object)
    clips = settings.mode in ("match_moments", "literal")
    low, high = settings.clip if clips else ((0.0, 1.0) if settings.mode == "raw" else (0.5, 1.5))
    found: dict[str, Any] = {}
    for kind in sorted(set(kinds)):
        chosen, values = weights[names == kind], scores[names == kind]
        at_bound = np.isclose(chosen, low) | np.isclose(chosen, high)
        found[kind] = {
            "n": int(chosen.size),
            "score_mean": round(float(values.mean()), 4),
            "score_std": round(float(values.std()), 4),
            "mean": round(float(chosen.mean()), 4),
            "at_clip": round(float(at_bound.mean()), 4) if clips else 0.0,
            "effective_share": round(effective_share(chosen), 4),
            # A constant score has weight 1, which any clip bounds may leave out.
            "weights": _histogram(chosen, min(low, float(chosen.min())), max(high, float(chosen.max()))),
            "scores": _histogram(values, 0.0, 1.0),
        }
    return found


def _histogram(values: Floats, low: float, high: float) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=_BINS, range=(low, high))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": [int(count) for count in counts]}
