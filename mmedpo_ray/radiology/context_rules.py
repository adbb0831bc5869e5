"""Rules about the words around a word: when it has another sense, when it is part of a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mmedpo_ray.radiology.word_lists import pattern_of

# How far back the words before a place are looked at.
_NEAR = 64
# Between a word and the words before it lies one character; after a word the rules name it themselves.
_FRAMES = {
    "before": r"(?<!\w)(?:{})[ /-]$",
    "after": r"(?:{})(?!\w)",
    "unless_before": r"(?<!\w)(?:{})[ /-]$",
}


class ContextRule(NamedTuple):
    """What stands right before and right after a word, and what does not stand before it; None: anything."""

    before: re.Pattern[str] | None = None
    after: re.Pattern[str] | None = None
    unless_before: re.Pattern[str] | None = None

    def holds(self, text: str, start: int, end: int) -> bool:
        """Whether the rule holds for the word at ``text[start:end]`` of a text in small letters."""
        near = max(0, start - _NEAR)
        return (
            (self.after is None or self.after.match(text, end) is not None)
            and (self.before is None or self.before.search(text, near, start) is not None)
            and (self.unless_before is None or self.unless_before.search(text, near, start) is None)
        )


def context_rules(
    entries: Iterable[Mapping[str, Any]], pieces: Mapping[str, str | list[str]] | None = None
) -> dict[str, list[ContextRule]]:
    """The rules of a data file by each name in their ``of`` (see ``data/other_senses.yaml``)."""
    rules: dict[str, list[ContextRule]] = {}
    for entry in entries:
        patterns = {
            part: re.compile(frame.format(pattern_of(entry[part], pieces or {})))
            for part, frame in _FRAMES.items()
            if part in entry
        }
        for name in entry["of"]:
            rules.setdefault(name, []).append(ContextRule(**patterns))
    return rules
