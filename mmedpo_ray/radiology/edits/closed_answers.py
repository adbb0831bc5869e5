"""Turns yes into no and back: "Yes, there is a nodule" → "No, there is no nodule"."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.edits.edit import Edit, like
from mmedpo_ray.radiology.edits.negation import THERE_IS, THERE_IS_NO

_POLARITY = re.compile(r"^(\W*)(yes|no)\b(.*)$", re.IGNORECASE | re.DOTALL)
# "No. 5 rib" numbers a rib.
_NUMBER_SIGN = re.compile(r"\W*no\. ?#?\d+(?! ?(?:mm|cm)\b)", re.IGNORECASE)
_AUXILIARY = re.compile(
    r"\b(is|are|was|were|does|do|has|have|appears?|shows?)\b(?! not\b)(?: no\b)?", re.IGNORECASE
)


def polarity_edits(answer: str) -> Iterator[Edit]:
    """ "Yes, there is …" → "No, there is no …", and back."""
    if lexicon.polarity(answer) is None or _NUMBER_SIGN.match(answer):
        return
    match = _POLARITY.match(answer)
    if match is None:
        return
    lead, word, rest = match.groups()
    if not rest.strip(" .") or rest.lstrip().startswith((",", ".", ";", ":", "-", "–")):
        other = like(word, "no" if word.lower() == "yes" else "yes")
        yield Edit(lead + other + _negate(rest, deny=word.lower() == "yes"), "polarity")


def _negate(statement: str, *, deny: bool) -> str:
    """Turns the statement after "Yes," or "No," round; the bare polarity where its grammar is not known."""
    if not statement.strip(" ."):
        return statement
    if deny:
        changed, count = THERE_IS.subn(r"\1 no ", statement, count=1)
        if not count:
            changed, count = _AUXILIARY.subn(r"\1 not", statement, count=1)
            if count and re.match(r".*\b(?:do|does|has|have|appears?|shows?) not\b", changed, re.I | re.S):
                count = 0
    else:
        changed, count = THERE_IS_NO.subn(r"\1 ", statement, count=1)
        if not count:
            changed, count = re.subn(
                r"\b(is|are|was|were) not\b", r"\1", statement, count=1, flags=re.IGNORECASE
            )
    if count:
        return changed
    return "." if statement.rstrip().endswith(".") else ""
