"""Checks: what tells chosen from rejected without the image. A model learns that instead of the medicine."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from mmedpo_ray.audit.check import CHANCE, Audited, Check, Measured, Severity, percent
from mmedpo_ray.audit.statistics import Separation, separation

_STRONG = 0.9
_WEAK = 0.6
_TRIM = "trim both sides (--fix)"
_BALANCE = "balance the answers: as many pairs that prefer yes as no, for each question form"


def _severity(found: Separation, shortcut_accuracy: float) -> Severity | None:
    if found.p_value >= CHANCE:
        return None
    if found.strength >= max(_STRONG, shortcut_accuracy):
        return "high"
    if found.strength >= shortcut_accuracy:
        return "medium"
    return "low" if found.strength >= _WEAK else None


def _length(audited: Audited) -> Measured:
    """One length threshold, in words or characters, tells the sides apart."""
    features = audited.features
    text = features.text
    measured = {
        "words": separation(features.words_chosen[text], features.words_rejected[text]),
        "characters": separation(features.chars_chosen[text], features.chars_rejected[text]),
    }
    unit = max(measured, key=lambda name: measured[name].accuracy)
    best = measured[unit]
    difference = features.chars_rejected.astype(np.int64) - features.chars_chosen
    told = text & ((difference > 0) if best.rejected_is == "more" else (difference < 0))
    medians = {
        "median_words_chosen": float(np.median(features.words_chosen[text])),
        "median_words_rejected": float(np.median(features.words_rejected[text])),
    }
    return Measured(
        np.flatnonzero(told)[np.argsort(-np.abs(difference[told]), kind="stable")],
        best.pairs,
        figure=best.accuracy,
        severity=_severity(
            max(measured.values(), key=lambda item: item.strength), audited.settings.shortcut_accuracy
        ),
        values={
            "threshold": best.threshold,
            "unit": unit,
            "told": percent(best.accuracy),
            "auc": best.auc,
            "longer": "longer" if best.rejected_is == "more" else "shorter",
            "within": percent(best.pair_accuracy),
        },
        details={name: _rounded(item) for name, item in measured.items()} | medians,
    )


def _format(name: str, audited: Audited) -> Measured:
    """One property of the form tells the sides apart.

    Args:
        name: key of `mmedpo_ray.audit.features.FORMATS`.
        audited: the table.
    """
    text = audited.features.text
    chosen, rejected = audited.features.has_format(name)
    found = separation(chosen[text].astype(np.int8), rejected[text].astype(np.int8))
    told = text & (chosen != rejected) & (rejected if found.rejected_is == "more" else chosen)
    return Measured(
        np.flatnonzero(told),
        found.pairs,
        figure=found.accuracy,
        severity=_severity(found, audited.settings.shortcut_accuracy),
        values={
            "chosen": percent(float(chosen[text].mean())),
            "rejected": percent(float(rejected[text].mean())),
            "told": percent(found.accuracy),
            "auc": found.auc,
        },
        details=_rounded(found),
    )


def _rounded(found: Separation) -> dict[str, Any]:
    figures = asdict(found)
    del figures["pairs"]
    return figures | {key: round(figures[key], 6) for key in ("accuracy", "auc", "pair_accuracy")}


# Format → what such answers do, what to do about it, and whether --fix does it.
_FORMATS = {
    "leading_space": ("begin with a space", _TRIM, True),
    "trailing_space": ("end with a space", _TRIM, True),
    "capital": ("begin with a capital", "write both sides with the same capitalisation", False),
    "final_period": ("end with a period", "end both sides alike: add or drop the final period", False),
    "newline": (
        "have several lines",
        "write both sides as one paragraph, or drop what follows the answer",
        False,
    ),
    "quotes": ("contain quotation marks", "drop the quotation marks, or the pairs", False),
    "says_yes": ("begin with yes", _BALANCE, False),
    "says_no": ("begin with no", _BALANCE, False),
}
CHECKS = (
    Check(
        "length_shortcut",
        "one threshold ({threshold:.0f} {unit}) tells {told} of the responses apart (AUC {auc:.3f}); the "
        "rejected one is {longer} in {within} of the pairs",
        "match lengths: rewrite the rejected side as a minimal edit (curate.text.method=rewrite or "
        "curate.text.method=rule_edit), or lower curate.text.max_length_ratio",
        _length,
        kind="text",
    ),
    *(
        Check(
            f"{name}_shortcut",
            f"{{chosen}} of the chosen and {{rejected}} of the rejected answers {words}: {{told}} told apart "
            "(AUC {auc:.3f})",
            remedy,
            partial(_format, name),
            kind="text",
            fixable=fixable,
        )
        for name, (words, remedy, fixable) in _FORMATS.items()
    ),
)
