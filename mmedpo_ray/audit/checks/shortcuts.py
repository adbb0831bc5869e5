"""Checks: what tells chosen from rejected without the image. A model learns that instead of the medicine."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mmedpo_ray.audit.features import FORMATS, Features
from mmedpo_ray.audit.finding import CHANCE, Check, Finding, Severity, percent, text_pairs
from mmedpo_ray.audit.settings import AuditConfig
from mmedpo_ray.audit.statistics import Separation, separation

_STRONG_SHORTCUT = 0.9
_WEAK_SHORTCUT = 0.6


def _shortcut_severity(found: Separation, settings: AuditConfig) -> Severity | None:
    if found.p_value >= CHANCE:
        return None
    limit = settings.shortcut_accuracy
    if found.strength >= max(_STRONG_SHORTCUT, limit):
        return "high"
    if found.strength >= limit:
        return "medium"
    return "low" if found.strength >= _WEAK_SHORTCUT else None


def length_shortcut(features: Features, settings: AuditConfig) -> Finding:
    """One length threshold tells the sides apart."""
    text = text_pairs(features)
    measured: dict[str, Separation] = {}
    for unit in ("words", "characters"):
        short = "words" if unit == "words" else "chars"
        chosen, rejected = (getattr(features, f"{short}_{side}")[text] for side in ("chosen", "rejected"))
        found = separation(chosen, rejected)
        assert found is not None  # there is a text pair
        measured[unit] = found
    unit = max(measured, key=lambda name: measured[name].accuracy)
    best = measured[unit]
    strongest = max(measured.values(), key=lambda item: item.strength)
    longer = "longer" if best.rejected_is == "more" else "shorter"
    difference = features.chars_rejected.astype(np.int64) - features.chars_chosen
    told = text & ((difference > 0) if best.rejected_is == "more" else (difference < 0))
    order = np.flatnonzero(told)[np.argsort(-np.abs(difference[told]), kind="stable")]
    return Finding(
        check="length_shortcut",
        severity=_shortcut_severity(strongest, settings),
        figure=round(best.accuracy, 6),
        says=(
            f"one threshold ({best.threshold:.0f} {unit}) tells {percent(best.accuracy)} of the responses apart (AUC "
            f"{best.auc:.3f}); the rejected one is {longer} in {percent(best.pair_accuracy)} of the pairs"
        ),
        count=len(order),
        of=best.pairs,
        rows=order,
        remedy="match lengths: rewrite the rejected side as a minimal edit (curate.text.method=rewrite or "
        "curate.text.method=rule_edit), or lower curate.text.max_length_ratio",
        details={name: _separation_dict(item) for name, item in measured.items()}
        | {
            "median_words_chosen": float(np.median(features.words_chosen[text])),
            "median_words_rejected": float(np.median(features.words_rejected[text])),
        },
    )


# Format → how it is said, and what to do about it.
_FORMAT_WORDS = {
    "leading_space": ("begin with a space", "trim both sides (--fix)"),
    "trailing_space": ("end with a space", "trim both sides (--fix)"),
    "capital": ("begin with a capital", "write both sides with the same capitalisation"),
    "final_period": ("end with a period", "end both sides alike: add or drop the final period"),
    "newline": ("have several lines", "write both sides as one paragraph, or drop what follows the answer"),
    "quotes": ("contain quotation marks", "drop the quotation marks, or the pairs"),
    "says_yes": (
        "begin with yes",
        "balance the answers: as many pairs that prefer yes as no, for each question form",
    ),
    "says_no": (
        "begin with no",
        "balance the answers: as many pairs that prefer yes as no, for each question form",
    ),
}


def format_shortcut(name: str, features: Features, settings: AuditConfig) -> Finding:
    """One property of the form tells the sides apart.

    Args:
        name: key of `FORMATS`.
        features: the table.
        settings: thresholds.
    """
    text = text_pairs(features)
    chosen, rejected = features.has_format(name)
    found = separation(chosen[text].astype(np.int8), rejected[text].astype(np.int8))
    assert found is not None  # there is a text pair
    words, remedy = _FORMAT_WORDS[name]
    told = text & (chosen != rejected) & (rejected if found.rejected_is == "more" else chosen)
    return Finding(
        check=f"{name}_shortcut",
        severity=_shortcut_severity(found, settings),
        figure=round(found.accuracy, 6),
        says=(
            f"{percent(float(chosen[text].mean()))} of the chosen and {percent(float(rejected[text].mean()))} of the rejected "
            f"answers {words}: {percent(found.accuracy)} told apart (AUC {found.auc:.3f})"
        ),
        count=int(told.sum()),
        of=found.pairs,
        rows=np.flatnonzero(told),
        remedy=remedy,
        fixed=name in ("leading_space", "trailing_space"),
        details=_separation_dict(found),
    )


def _separation_dict(found: Separation) -> dict[str, Any]:
    return {
        "accuracy": round(found.accuracy, 6),
        "threshold": found.threshold,
        "auc": round(found.auc, 6),
        "pair_accuracy": round(found.pair_accuracy, 6),
        "rejected_is": found.rejected_is,
        "p_value": found.p_value,
    }


SHORTCUT_CHECKS: dict[str, Check] = {
    "length_shortcut": length_shortcut,
    **{f"{name}_shortcut": partial(format_shortcut, name) for name in FORMATS},
}
