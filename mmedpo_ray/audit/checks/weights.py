"""Checks of the weights: invalid, zero, constant, concentrated, or explained by the question alone."""

from __future__ import annotations

import numpy as np

from mmedpo_ray.audit.check import CHANCE, Audited, Check, Measured, NotCheckedError, Severity, percent
from mmedpo_ray.audit.features import QUESTION_FORMS
from mmedpo_ray.audit.statistics import explained


def bad_weight(weight: np.ndarray) -> np.ndarray:
    """(N,) bool: the weight cannot be used in a loss."""
    return ~(np.isfinite(weight) & (np.nan_to_num(weight, nan=-1.0) >= 0))


def _constant(audited: Audited) -> Measured:
    features = audited.features
    kinds = {
        name: rows for name, rows in (("text", features.text), ("visual", features.visual)) if rows.any()
    }
    constant = [
        name
        for name, rows in kinds.items()
        if rows.sum() > 1 and np.ptp(np.nan_to_num(features.weight[rows])) == 0
    ]
    mask = (
        np.logical_or.reduce([kinds[name] for name in constant])
        if constant
        else np.zeros(len(features), bool)
    )
    severity: Severity | None = "low" if len(constant) == len(kinds) else "info"
    return Measured(
        np.flatnonzero(mask),
        len(features),
        severity=severity if constant else None,
        values={"which": f"all {' and all '.join(constant)}" if constant else "not all"},
        causes=tuple(constant),
        details={"kinds": constant},
    )


def _effective(audited: Audited) -> Measured:
    """Kish's effective sample size: (Σw)²/(n·Σw²)."""
    weight = audited.features.weight
    usable = weight[~bad_weight(weight)]
    square = float(np.sum(usable**2))
    if square == 0:
        raise NotCheckedError("no pair has a positive weight")
    share = float(np.sum(usable)) ** 2 / (len(usable) * square)
    severity: Severity | None = "medium" if share < 0.5 else "low" if share < 0.8 else None
    return Measured(
        np.argsort(-np.nan_to_num(weight), kind="stable")[:100],
        len(weight),
        count=len(usable),
        figure=share,
        severity=severity,
        values={"share": percent(share)},
    )


def _by_question(audited: Audited) -> Measured:
    """Which property of the question explains most of the variance of the text pairs' weights."""
    features = audited.features
    usable = features.text & ~bad_weight(features.weight)
    factors: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {
        "question form": (features.question_form, tuple(QUESTION_FORMS)),
        "first word of the question": (features.first_word, features.first_words),
        "chosen answer is yes, no or neither": (features.polarity + 1, ("no", "neither", "yes")),
        "answer type": (features.answer_type, features.answer_types),
    }
    measured = {
        name: found
        for name, (codes, _) in factors.items()
        if (found := explained(features.weight[usable], codes[usable].astype(np.int64))) is not None
    }
    if not measured:
        raise NotCheckedError("the text pairs' weights do not vary, or all questions are of one form")
    best = max(measured, key=lambda name: measured[name].epsilon_squared)
    found = measured[best]
    levels: dict[Severity, float] = {"medium": 0.5, "low": 0.14, "info": 0.06}
    reached = (level for level, least in levels.items() if found.epsilon_squared >= least)
    # A first word could name a person; the forms of questions are ours.
    shown = "question form" if best.startswith("first word") else best
    means = measured[shown].means if shown in measured else {}
    return Measured(
        np.zeros(0, np.int64),
        found.rows,
        count=found.rows,
        figure=found.epsilon_squared,
        severity=next(reached, None) if found.p_value < CHANCE else None,
        values={
            "factor": best,
            "share": percent(found.epsilon_squared),
            "groups": found.groups,
            "p": "< 0.0001" if found.p_value < 1e-4 else f"= {found.p_value:.4f}",
        },
        details={
            "factor": best,
            "mean_weight": {factors[shown][1][code]: round(mean, 4) for code, mean in means.items()},
            "factors": {
                name: {
                    "groups": item.groups,
                    "eta_squared": round(item.eta_squared, 6),
                    "epsilon_squared": round(item.epsilon_squared, 6),
                    "p_value": item.p_value,
                }
                for name, item in measured.items()
            },
        },
    )


CHECKS = (
    Check(
        "invalid_weight",
        "{n:weight} missing, negative or no finite number",
        "remove these rows (--fix), or give the pairs weights (`mmedpo score`)",
        lambda audited: bad_weight(audited.features.weight),
        {"high": 0},
        columns=("weight",),
        fixable=True,
    ),
    Check(
        "zero_weight",
        "{n:pair} of weight 0: they cost computation and teach nothing",
        "score.weights.mode=match_moments gives every pair a weight; or leave the pairs out",
        lambda audited: audited.features.weight == 0,
        {"medium": 0.05, "low": 0},
        columns=("weight",),
    ),
    Check(
        "constant_weight",
        "{which} pairs weigh the same: nothing is known of their relevance",
        {
            "text": "judge the pairs (score.agents) and let the scores count (score.weights.mode)",
            "visual": "a tool that is always equally sure (as dataset_mask) gives no other weights; that is "
            "fine if it is meant",
        },
        _constant,
        columns=("weight",),
    ),
    Check(
        "effective_sample_size",
        "the weights leave {share} of the pairs in effect: (Σw)²/(n·Σw²)",
        "clip the weights (score.weights.clip) or use score.weights.mode=match_moments",
        _effective,
        columns=("weight",),
    ),
    Check(
        "weights_by_question",
        "the {factor} explains {share} of the weights' variance ({groups} groups, p {p})",
        "relevance may differ by question; where it should not, take other judges (score.agents), or set "
        "score.weights.mode=none",
        _by_question,
        columns=("weight",),
    ),
)
