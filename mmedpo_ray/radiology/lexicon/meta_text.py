"""Finds text about the task instead of the image: leaked prompts, role tags, refusals, notes.

One definition for the filter of text pairs and for the audit; ingest drops reference answers only for its
surest part, :func:`is_leaked_prompt`. ``data/meta_text.yaml`` and ``data/meta_text_chinese.yaml`` have the
patterns, which both Python and RE2 read: Arrow searches whole columns with RE2.
"""

from __future__ import annotations

import re

from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS, lowered
from mmedpo_ray.radiology.word_lists import load, pattern_of

# What an answer begins with after a role tag; an operation's report names an assistant ("Assistant: Dr.
# Smith").
_NAMED_AXES = ("finding", "side", "zone", "size", "state", "anatomy", "modality", "acuity")
_NAMED = [
    re.escape(form)
    for concept in CONCEPTS.values()
    if concept.axis in _NAMED_AXES
    for form in concept.forms
    if form == "ct" or len(form) > 2
]
_ENGLISH, _CHINESE = load("meta_text"), load("meta_text_chinese")
_PIECES = {**_ENGLISH["pieces"], "NAMED": _NAMED}
# Of each part: per rule the pieces of text of which one must occur, and the pattern.
_PARTS: tuple[list[tuple[list[str], str]], ...] = tuple(
    [(rule["needed"], pattern_of(rule["pattern"], pieces)) for rule in rules]
    for rules, pieces in (
        (_ENGLISH["about_the_task"], _PIECES),
        (_ENGLISH["about_the_source"], _PIECES),
        (_ENGLISH["about_the_edit"], _PIECES),
        (_CHINESE["rules"], _CHINESE["pieces"]),
    )
)
# Lines of the prompt that made the pair, or of a chat template, repeated in an answer.
LEAKED_PROMPT = pattern_of(_ENGLISH["leaked_prompt"], _PIECES)
# In one pattern RE2 runs out of memory for its states and takes fifty times as long.
COMMENTARY_PARTS = tuple("|".join(pattern for _, pattern in rules) for rules in _PARTS)
COMMENTARY = "|".join(COMMENTARY_PARTS)


def _compiled(pattern: str) -> re.Pattern[str]:
    """The end of the text is written as in RE2."""
    return re.compile(pattern.replace(r"\z", r"\Z"), re.MULTILINE)


_LEAK = _compiled(LEAKED_PROMPT)
_COMMENTS = [(needed, _compiled(pattern)) for rules in _PARTS for needed, pattern in rules]


def is_leaked_prompt(text: str) -> bool:
    """Whether the text repeats lines of the prompt that made it, or marks of a chat template."""
    return _LEAK.search(lowered(text)) is not None


def is_meta_text(text: str) -> bool:
    """Whether the text is about the task, not the image: leaked prompts, role tags, refusals, notes."""
    low = lowered(text)
    if _LEAK.search(low):
        return True
    return any(
        any(piece in low for piece in needed) and pattern.search(low) is not None
        for needed, pattern in _COMMENTS
    )
