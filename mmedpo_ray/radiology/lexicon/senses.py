"""Words of the vocabulary that mean something else where they stand: "was left in the ward", "body mass index".

Such a word is no mention: no edit changes it, and no reading of facts counts it. ``data/other_senses.yaml`` has the rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from mmedpo_ray.radiology.word_lists import load

# How far back the words before a place are looked at.
_NEAR = 40


class _Rule(NamedTuple):
    """What stands right around a word in another sense; None: anything."""

    before: re.Pattern[str] | None
    after: re.Pattern[str] | None
    unless_before: re.Pattern[str] | None

    def holds(self, before: str, text: str, end: int) -> bool:
        """Whether the rule holds for a word that ends at ``end`` of a text, behind the words ``before``."""
        return (
            (self.after is None or self.after.match(text, end) is not None)
            and (self.before is None or self.before.search(before) is not None)
            and (self.unless_before is None or self.unless_before.search(before) is None)
        )


def _before(alternatives: Iterable[str] | None) -> re.Pattern[str] | None:
    return re.compile(rf"(?<!\w)(?:{'|'.join(alternatives)})[ -]$") if alternatives else None


def _after(alternatives: Iterable[str] | None) -> re.Pattern[str] | None:
    return re.compile(rf"(?:{'|'.join(alternatives)})(?!\w)") if alternatives else None


_RULES: dict[str, list[_Rule]] = {}
for _entry in load("other_senses"):
    _rule = _Rule(
        _before(_entry.get("before")), _after(_entry.get("after")), _before(_entry.get("unless_before"))
    )
    for _word in _entry["words"]:
        _RULES.setdefault(_word, []).append(_rule)


def is_other_sense(text: str, low: str, start: int, end: int) -> bool:
    """Whether a word of the vocabulary means something else at its place.

    Args:
        text: as it is written.
        low: the same in small letters, each in its place.
        start: where the word begins.
        end: where it ends.
    """
    rules = _RULES.get(low[start:end])
    if rules is None:
        # "Mr Smith", not "MR".
        return text[start:end] == "Mr"
    before = low[max(0, start - _NEAR) : start]
    return any(rule.holds(before, low, end) for rule in rules)
