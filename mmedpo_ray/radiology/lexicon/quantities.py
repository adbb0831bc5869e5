"""Counts and measurements as intervals: "several" agrees with 3, "<5 mm" with 3 mm, not with ">5 mm"."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from mmedpo_ray.radiology.lexicon.synonyms import canonical, sense
from mmedpo_ray.radiology.lexicon.words import numbers

_COUNTED = re.compile(r"\bhow many\b|\bnumber of\b", re.IGNORECASE)
_NONE = re.compile(r"^\W*(?:there (?:is|are) )?(?:no|none|nil|zero|not any)\b", re.IGNORECASE)
_ONE = re.compile(r"\b(?:single|solitary)\b", re.IGNORECASE)
_SEVERAL = re.compile(
    r"\b(?:multiple|several|many|numerous|(?:a )?few|couple|pair|both|bilateral)\b", re.IGNORECASE
)
_SOME = re.compile(r"^\W*(?:there is )?an?\b", re.IGNORECASE)
_ABOUT = re.compile(r"\b(?:about|around|approximately|roughly|nearly|almost)\b|~", re.IGNORECASE)
_SIGN = re.compile(r"(?<![-=])[<>]=?")
_MEASURE = re.compile(
    r"(?:(?<![-=])([<>])=?)?\s*(\d+(?:\.\d+)?)\s*-?\s*(mm\b|cm\b|millimet(?:er|re)s?\b|centimet(?:er|re)s?\b|%|percent\b)",
    re.IGNORECASE,
)
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*-?(mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)\b", re.IGNORECASE)
_FRACTION = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")
# Rounding, and two readers' measurements, differ by less.
_SAME = 1.5


class Interval(NamedTuple):
    """What a quantity may be: low <= value <= high, both >= 0."""

    low: float
    high: float


def asks_count(question: str) -> bool:
    """Whether a question asks how many there are."""
    return bool(_COUNTED.search(question))


def count(text: str) -> Interval | None:
    """How many an answer to such a question says there are; None where it names no number, or several."""
    text = canonical(text)
    named = numbers(text)
    if len(named) > 1:
        return None
    if named:
        value = next(iter(named))
        sign = _SIGN.search(text)
        if sign is None:
            return Interval(value - 1, value + 1) if _ABOUT.search(text) else Interval(value, value)
        beyond = 0 if sign.group().endswith("=") else 1
        return Interval(0, value - beyond) if sign.group()[0] == "<" else Interval(value + beyond, math.inf)
    if sense(text) == "none" or _NONE.search(text):
        return Interval(0, 0)
    if _ONE.search(text):
        return Interval(1, 1)
    if _SEVERAL.search(text):
        return Interval(2, math.inf)
    return Interval(1, math.inf) if _SOME.search(text) else None


def is_compared(text: str) -> bool:
    """Whether a text names a bound."""
    return _SIGN.search(text) is not None


def disjoint(one: Interval, other: Interval) -> bool:
    """Whether no count is in both."""
    return one.high < other.low or other.high < one.low


def lengths(text: str) -> list[Interval]:
    """The lengths that a text names, in millimetres; zero is none."""
    return [interval for unit, interval in _measures(text) if unit == "mm"]


def shares(text: str) -> list[Interval]:
    """The percentages that a text names."""
    return [interval for unit, interval in _measures(text) if unit == "%"]


def _measures(text: str) -> list[tuple[str, Interval]]:
    found = []
    for sign, number, unit in _MEASURE.findall(canonical(text)):
        value = float(number) * _millimetres(unit)
        if value:
            low, high = (0.0 if sign == "<" else value), (math.inf if sign == ">" else value)
            found.append(("%" if unit[0] in "%pP" else "mm", Interval(low, high)))
    return found


def in_millimetres(text: str) -> str:
    """The text with its lengths in millimetres, and its numbers without empty decimals."""
    text = _LENGTH.sub(lambda match: f"{float(match[1]) * _millimetres(match[2]):g} mm", text)
    return _FRACTION.sub(lambda match: f"{float(match[0]):g}", text)


def _millimetres(unit: str) -> int:
    return 10 if unit[0] in "cC" else 1


def is_bounded(interval: Interval) -> bool:
    """Whether only a bound is named."""
    return interval.low != interval.high


def are_apart(expected: Iterable[Interval], stated: Iterable[Interval]) -> bool:
    """Whether no stated quantity can be one of those expected; exact values may differ by rounding."""
    return all(_apart(want, got) for want in expected for got in stated)


def _apart(one: Interval, other: Interval) -> bool:
    margin = 1.0 if is_bounded(one) and is_bounded(other) else _SAME
    return one.high * margin <= other.low or other.high * margin <= one.low


def shown(intervals: Iterable[Interval], unit: str = "") -> str:
    """The intervals in words, in order: "<5 mm, 12 mm"."""
    return ", ".join(_shown(interval) + unit for interval in sorted(intervals))


def _shown(interval: Interval) -> str:
    if interval.low == interval.high:
        return f"{interval.low:g}"
    return f">{interval.low:g}" if math.isinf(interval.high) else f"<{interval.high:g}"
