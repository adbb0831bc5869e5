"""Checks of the weights: invalid, zero or constant ones, a few that carry all, and weights that only follow the question."""

from __future__ import annotations

import numpy as np

from mmedpo_ray.audit.features import QUESTION_FORMS, Features
from mmedpo_ray.audit.finding import (
    CHANCE,
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
from mmedpo_ray.audit.statistics import Explained, explained


def _weights(features: Features) -> np.ndarray:
    if "weight" not in features.columns:
        raise NotCheckedError("the table has no weights yet")
    return features.weight


def invalid_weight(features: Features, _: AuditConfig) -> Finding:
    """Weights that are missing, negative or no finite number."""
    weight = _weights(features)
    mask = bad_weight(weight)
    return finding_of_rows(
        "invalid_weight",
        mask,
        len(features),
        "high" if mask.any() else None,
        f"{noun(int(mask.sum()), 'weight')} missing, negative or no finite number",
        "remove these rows (--fix), or give the pairs weights (`mmedpo score`)",
        fixed=True,
    )


def bad_weight(weight: np.ndarray) -> np.ndarray:
    """(N,) bool: the weight cannot be used in a loss."""
    return ~(np.isfinite(weight) & (np.nan_to_num(weight, nan=-1.0) >= 0))


def zero_weight(features: Features, _: AuditConfig) -> Finding:
    """Rows that weigh nothing."""
    mask, of = _weights(features) == 0, len(features)
    return finding_of_rows(
        "zero_weight",
        mask,
        of,
        share_severity(int(mask.sum()), of, medium=0.05),
        f"{noun(int(mask.sum()), 'pair')} of weight 0: they cost computation and teach nothing",
        "score.weights.mode=match_moments gives every pair a weight; or leave the pairs out",
    )


def constant_weight(features: Features, _: AuditConfig) -> Finding:
    """All weights of a kind are the same."""
    weight = _weights(features)
    constant = [
        name
        for name, rows in (("text", features.text), ("visual", features.visual))
        if rows.sum() > 1 and np.ptp(np.nan_to_num(weight[rows])) == 0
    ]
    present = int(features.text.any()) + int(features.visual.any())
    severity: Severity | None = None
    if constant:
        severity = "low" if len(constant) == present else "info"
    remedies = {
        "text": "Judge the pairs (score.agents) and let the scores count (score.weights.mode).",
        "visual": "A tool that is always equally sure (as dataset_mask) gives no other weights; that is fine if it is meant.",
    }
    mask = np.zeros(len(features), bool)
    for name in constant:
        mask |= features.visual if name == "visual" else features.text
    return finding_of_rows(
        "constant_weight",
        mask,
        len(features),
        severity,
        f"all {' and all '.join(constant)} pairs weigh the same: nothing is known of their relevance"
        if constant
        else "weights vary",
        " ".join(remedies[name] for name in constant),
        details={"kinds": constant},
    )


def effective_sample_size(features: Features, _: AuditConfig) -> Finding:
    """A few rows carry most of the weight."""
    weight = _weights(features)
    usable = weight[~bad_weight(weight)]
    square = float(np.sum(usable**2))
    if square == 0:
        raise NotCheckedError("no pair has a positive weight")
    share = float(np.sum(usable)) ** 2 / (len(usable) * square)
    severity: Severity | None = "medium" if share < 0.5 else "low" if share < 0.8 else None
    return Finding(
        check="effective_sample_size",
        severity=severity,
        figure=round(share, 6),
        says=f"the weights leave {percent(share)} of the pairs in effect: (Σw)²/(n·Σw²)",
        count=len(usable),
        of=len(features),
        rows=np.argsort(-np.nan_to_num(weight), kind="stable")[:100],
        remedy="clip the weights (score.weights.clip) or use score.weights.mode=match_moments",
    )


def weights_by_question(features: Features, _: AuditConfig) -> Finding:
    """The weights follow the kind of question instead of the pair."""
    weight = _weights(features)
    usable = features.text & ~bad_weight(weight)
    answer_types = features.answer_type
    factors: dict[str, tuple[np.ndarray, tuple[str, ...]]] = {
        "question form": (features.question_form, tuple(QUESTION_FORMS)),
        "first word of the question": (features.first_word, features.first_words),
        "chosen answer is yes, no or neither": (features.polarity + 1, ("no", "neither", "yes")),
        "answer type": (answer_types, features.answer_types),
    }
    measured: dict[str, Explained] = {}
    for name, (codes, _names) in factors.items():
        found = explained(weight[usable], codes[usable].astype(np.int64))
        if found is not None:
            measured[name] = found
    if not measured:
        raise NotCheckedError("the text pairs' weights do not vary, or all questions are of one form")
    best = max(measured, key=lambda name: measured[name].epsilon_squared)
    found = measured[best]
    severity: Severity | None = None
    if found.p_value < CHANCE:
        for level, limit in (("medium", 0.5), ("low", 0.14), ("info", 0.06)):
            if found.epsilon_squared >= limit:
                severity = level  # type: ignore[assignment]
                break
    means = {factors[best][1][code]: round(mean, 4) for code, mean in found.means.items()}
    forms = factors["question form"]
    by_form = (
        {forms[1][c]: round(m, 4) for c, m in measured["question form"].means.items()}
        if "question form" in measured
        else {}
    )
    return Finding(
        check="weights_by_question",
        severity=severity,
        figure=round(found.epsilon_squared, 6),
        says=f"the {best} explains {percent(found.epsilon_squared)} of the weights' variance ({found.groups} groups, p {_p(found.p_value)})",
        count=found.rows,
        of=found.rows,
        rows=np.zeros(0, np.int64),
        remedy="relevance may differ by question; where it should not, take other judges (score.agents), or set score.weights.mode=none",
        details={
            "factor": best,
            # A first word could name a person; the forms are ours.
            "mean_weight": by_form if best.startswith("first word") else means,
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


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {value:.4f}"


WEIGHT_CHECKS: dict[str, Check] = {
    "invalid_weight": invalid_weight,
    "zero_weight": zero_weight,
    "constant_weight": constant_weight,
    "effective_sample_size": effective_sample_size,
    "weights_by_question": weights_by_question,
}
