"""Words that mean something else in their context: "was left in the ward", "body mass index".

Such a word is no mention: no edit changes it, and no reading of facts counts it. ``data/other_senses.yaml``
has the rules.
"""

from __future__ import annotations

from mmedpo_ray.radiology.context_rules import context_rules
from mmedpo_ray.radiology.word_lists import load

_RULES = context_rules(load("other_senses"))


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
    return any(rule.holds(low, start, end) for rule in rules)
