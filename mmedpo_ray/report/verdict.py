"""What the figures allow one to say about the aligned model, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_WORDS = {"f1": "F1", "bleu": "BLEU", "meteor": "METEOR", "rouge": "ROUGE", "l": "L"}


@dataclass(frozen=True)
class Comparison:
    """The aligned model beside another one.

    Attributes:
        headline: the finding in one sentence.
        details: one sentence a group of metrics, with figures.
        tone: better, worse, mixed or open.
    """

    headline: str
    details: list[str]
    tone: str


def label(metric: str) -> str:
    """A metric's key as words: ``report_rouge_l`` → "report ROUGE-L"."""
    official = metric.endswith("_official")
    parts = [_WORDS.get(part, part) for part in metric.removesuffix("_official").split("_")]
    return " ".join(parts).replace("ROUGE L", "ROUGE-L") + (" (official rule)" if official else "")


def known(estimate: dict[str, Any] | None) -> bool:
    """Whether an estimate has a value and an interval."""
    return bool(estimate) and all(
        isinstance(estimate.get(key), int | float) and estimate[key] == estimate[key]  # type: ignore[union-attr, index]
        for key in ("value", "low", "high")
    )


def compare(difference: dict[str, Any], *, other: str, other_is: str, confidence: float) -> Comparison | None:
    """Puts the differences to another model into words; claims only what the intervals show.

    Args:
        difference: ``{metric: {"value", "low", "high", "n"}}``, aligned minus other; ``*_official`` metrics take no part.
        other: name of the other model.
        other_is: what it is, such as "the base model".
        confidence: of the intervals.

    Returns:
        ``None`` where no difference was measured.
    """
    measured = {
        name: item for name, item in difference.items() if known(item) and not name.endswith("_official")
    }
    if not measured:
        return None
    better = [name for name, item in measured.items() if item["low"] > 0]
    worse = [name for name, item in measured.items() if item["high"] < 0]
    undecided = [name for name in measured if name not in better and name not in worse]
    whom = f"{other_is} ({other})"
    if better and worse:
        tone, headline = "mixed", f"Better than {whom} on {_list(better)}, worse on {_list(worse)}."
    elif better:
        tone = "better"
        headline = f"Better than {whom} on {_list(better)}"
        headline += f"; on {_list(undecided)} no difference is shown." if undecided else "."
    elif worse:
        tone = "worse"
        headline = f"Worse than {whom} on {_list(worse)}"
        headline += f"; on {_list(undecided)} no difference is shown." if undecided else "."
    else:
        tone, headline = "open", f"No difference from {whom} is shown on any metric."
    details = []
    for names, words in (
        (better, "Better"),
        (worse, "Worse"),
        (undecided, "Not decided (the interval holds 0)"),
    ):
        if names:
            details.append(
                f"{words}: " + "; ".join(_figures(name, measured[name], confidence) for name in names) + "."
            )
    return Comparison(headline, details, tone)


def _figures(name: str, item: dict[str, float], confidence: float) -> str:
    return (
        f"{label(name)} {_points(item['value'])} points ({confidence:.0%} interval "
        f"{_points(item['low'])} to {_points(item['high'])})"
    )


def _points(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return text.replace("-", "−") if text not in ("+0.0", "-0.0") else "0.0"


def _list(names: Sequence[str]) -> str:
    words = [label(name) for name in names]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
