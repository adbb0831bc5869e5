"""What the figures say about one model compared with another, in words.

One rule for the report, the table at the terminal and ``mmedpo evaluate --answers``: :func:`judge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from mmedpo_ray.metrics import METRICS
from mmedpo_ray.metrics.statistics import holm

_WORDS = {
    "f1": "F1",
    "bleu": "BLEU",
    "meteor": "METEOR",
    "rouge": "ROUGE",
    "l": "L",
    "cider": "CIDEr",
    "radgraph": "RadGraph",
    "chexbert": "CheXbert",
    "ratescore": "RaTEScore",
    **{f"bleu{order}": f"BLEU-{order}" for order in range(1, 5)},
}

Call = Literal["better", "worse", "uncorrected", "tiny", "open"]
BETTER: Call = "better"
WORSE: Call = "worse"
# Beyond chance if it were the only metric.
UNCORRECTED: Call = "uncorrected"
# Beyond chance, and prints as 0.0 points.
TINY: Call = "tiny"
OPEN: Call = "open"


@dataclass(frozen=True)
class Comparison:
    """A model compared with another one.

    Attributes:
        headline: the finding in one sentence, without figures.
        details: one sentence per group of metrics, with figures.
        tone: better, worse, mixed or open.
    """

    headline: str
    details: list[str]
    tone: str


def label(metric: str) -> str:
    """A metric's key as words: ``report_rouge_l`` → "report ROUGE-L"."""
    official = metric.endswith("_official")
    parts = [_WORDS.get(part, part) for part in metric.removesuffix("_official").split("_")]
    # METEOR without WordNet is another score.
    text = " ".join(parts).replace("ROUGE L", "ROUGE-L").replace("METEOR exact", "meteor-exact")
    return text + (" (official rule)" if official else "")


def known(estimate: dict[str, Any] | None) -> bool:
    """Whether an estimate has a value and an interval."""
    return bool(estimate) and all(
        isinstance(estimate.get(key), int | float) and estimate[key] == estimate[key]  # type: ignore[union-attr, index]
        for key in ("value", "low", "high")
    )


def judge(difference: dict[str, Any], confidence: float) -> dict[str, Call]:
    """What each difference amounts to.

    "better" and "worse" need all three: a p-value below 1 − confidence after Holm's correction over the
    metrics compared, an interval without 0, and a value that does not print as 0.0 points.

    Args:
        difference: ``{metric: {"value", "low", "high", "p"}}``; where "p" is missing it is taken from the
            interval, as of a normal distribution (Altman and Bland, BMJ 2011;343:d2304).
        confidence: of the intervals.

    Returns:
        A call for each main metric with a known difference; official metrics and parts of others take no
        part.
    """
    measured = {name: item for name, item in difference.items() if known(item) and takes_part(name)}
    corrected = dict(
        zip(measured, holm([_p_value(item, confidence) for item in measured.values()]), strict=True)
    )
    return {name: _call(item, corrected[name], confidence) for name, item in measured.items()}


def _call(item: dict[str, Any], corrected: float, confidence: float) -> Call:
    if item["low"] <= 0 <= item["high"]:
        return OPEN
    if _points(item["value"]) == "0.0":
        return TINY
    if corrected >= 1 - confidence:
        return UNCORRECTED if _p_value(item, confidence) < 1 - confidence else OPEN
    return BETTER if item["value"] > 0 else WORSE


def takes_part(name: str) -> bool:
    """Whether differences of this metric are judged: not those of official metrics and of details."""
    return METRICS[name].role == "main" if name in METRICS else not name.endswith("_official")


def _p_value(item: dict[str, Any], confidence: float) -> float:
    if item.get("p") is not None:
        return float(item["p"])
    width = item["high"] - item["low"]
    if width <= 0:
        return 1.0 if item["value"] == 0 else 0.0
    errors = item["value"] / (width / (2 * NormalDist().inv_cdf((1 + confidence) / 2)))
    return 2 * NormalDist().cdf(-abs(errors))


def compare(difference: dict[str, Any], *, other: str, other_is: str, confidence: float) -> Comparison | None:
    """Puts the differences to another model into words; claims only what :func:`judge` finds.

    Args:
        difference: as for :func:`judge`, one model minus the other.
        other: name of the other model.
        other_is: what it is, such as "the base model"; "" if there is nothing to say.
        confidence: of the intervals.

    Returns:
        ``None`` where no difference was measured.
    """
    calls = judge(difference, confidence)
    if not calls:
        return None
    order = (BETTER, WORSE, UNCORRECTED, TINY, OPEN)
    named = {call: [name for name, found in calls.items() if found == call] for call in order}
    tone = "mixed" if named[BETTER] and named[WORSE] else next((c for c in (BETTER, WORSE) if named[c]), OPEN)
    words = {
        BETTER: "Better",
        WORSE: "Worse",
        UNCORRECTED: "Not decided (beyond chance if looked at alone, but not after Holm's correction over "
        f"{len(calls)} metrics)",
        TINY: "No difference worth naming (it prints as 0.0)",
        OPEN: "Not decided",
    }
    details = [
        f"{words[call]}: " + "; ".join(_figures(name, difference[name], confidence) for name in names) + "."
        for call, names in named.items()
        if names
    ]
    return Comparison(_headline(named, tone, f"{other_is} ({other})" if other_is else other), details, tone)


def _headline(named: dict[Call, list[str]], tone: str, whom: str) -> str:
    """Every metric once, in one sentence."""
    number = sum(len(names) for names in named.values())
    if tone == "mixed":
        parts = [f"Better than {whom} on {_list(named[BETTER])}, worse on {_list(named[WORSE])}"]
    elif tone != OPEN:
        parts = [f"{tone.capitalize()} than {whom} on {_list(named[BETTER] or named[WORSE])}"]
    elif len(named[OPEN]) == number:
        return f"No difference from {whom} is shown on any metric."
    else:
        parts = [f"No difference from {whom} is shown"]
    if named[UNCORRECTED]:
        parts.append(f"on {_list(named[UNCORRECTED])} only before the correction for {number} metrics")
    if named[TINY]:
        parts.append(f"on {_list(named[TINY])} no difference worth naming")
    if named[OPEN] and tone != OPEN:
        parts.append(f"on {_list(named[OPEN])} no difference is shown")
    return "; ".join(parts) + "."


def _figures(name: str, item: dict[str, Any], confidence: float) -> str:
    test = f", p = {_p_words(item['p_holm'])} corrected" if item.get("p_holm") is not None else ""
    return (
        f"{label(name)} {_points(item['value'])} points ({confidence:.0%} interval {_points(item['low'])} to "
        f"{_points(item['high'])}{test})"
    )


def _p_words(value: float) -> str:
    return "0.001 or less" if value <= 0.001 else f"{value:.3f}"


def _points(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return text.replace("-", "−") if text not in ("+0.0", "-0.0") else "0.0"


def _list(names: Sequence[str]) -> str:
    words = [label(name) for name in names]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
