"""Questions about a property of a finding: "Is the lesion malignant?" is not answered by naming the lesion.

property_polarity("Is the lesion malignant?", "The lesion is benign.")  -> "no"
property_polarity("Is the effusion large?", "There is an effusion.")    -> None
asks_property("Is there an effusion?")                                  -> False
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from mmedpo_ray.radiology.lexicon.facts import is_negated, stated
from mmedpo_ray.radiology.lexicon.polarity import Polarity
from mmedpo_ray.radiology.lexicon.quantities import are_apart, asks_count, count, disjoint, lengths
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS
from mmedpo_ray.radiology.lexicon.words import INTRODUCING, terms
from mmedpo_ray.radiology.word_lists import NUMBER_WORDS, load

_DEFINITE = re.compile(
    r"^\W*(?:is|are|was|were|has|have|had|does|do|did)\s+(?:the|this|that|these|those|his|her)\b",
    re.IGNORECASE,
)
_FINDINGS = frozenset({"lesion", "finding", "abnormality", "tumor", "tumour", "growth", "structure"})
_AUXILIARIES = frozenset({"does", "do", "did", "had", "been", "being", "any", "more", "than"})
_OPPOSITES = tuple(map(frozenset, load("relations")["opposites"]))
_CHANGES = re.compile(
    r"\b(?:chang\w*|gr[eo]wn?|increas\w*|decreas\w*|progress\w*|worse\w*|improv\w*|larger|bigger|smaller|shrunk)\b",
    re.IGNORECASE,
)
_UNCHANGED = re.compile(
    r"\b(?:no|without) (?:\w+ ){0,3}changes?\b|\bunchanged\b|\bstable\b|\bnot changed\b", re.IGNORECASE
)
# A question that counts: two, multiple, more than one.
_COUNTS = re.compile(
    rf"\b(?:{'|'.join(list(NUMBER_WORDS)[2:])}|multiple|several|many|single|solitary|more than|at "
    rf"least|fewer than|"
    r"only one)\b|[<>]=?\s?(?:\d|one|two|three|four|five)",
    re.IGNORECASE,
)
_FEWEST_LETTERS = 5


@lru_cache(maxsize=4096)
def asks_property(question: str) -> bool:
    """Whether a question presupposes a finding and asks for a property or a change of it."""
    return bool(_properties(question)) or bool(re.search(r"\bchanges?\b", question, re.IGNORECASE))


def quantity_polarity(question: str, answer: str) -> Polarity | None:
    """The yes or no of a size or count to a question with one: "larger than 3 cm", "two nodules"; or None."""
    asked, said = lengths(question), lengths(answer)
    if asked and said:
        return "no" if are_apart(asked, said) else "yes"
    if _COUNTS.search(question) and not asks_count(question) and not asked:
        wanted, given = count(question), count(answer)
        if wanted is not None and given is not None and disjoint(wanted, given):
            return "no"
    return None


def property_polarity(question: str, answer: str) -> Polarity | None:
    """Whether an answer states the asked property of a finding, or one that excludes it; else None.

    Args:
        question: one that :func:`asks_property`.
        answer: without a yes or no of its own.
    """
    if _CHANGES.search(question) and _UNCHANGED.search(answer):
        return "no"
    properties = _properties(question)
    said = [term.name for term in terms(answer)]
    affirmed = [term.name for term in terms(stated(answer))]
    if not properties:
        return None
    if set(properties) <= set(affirmed):
        return "yes"
    for wanted in properties:
        if any({wanted, other} in _OPPOSITES for other in affirmed if wanted not in affirmed):
            return "no"
        if wanted == "bilateral" and len({"left", "right"} & set(affirmed)) == 1:
            return "no"
        if f"non{wanted}" in said or f"non-{wanted}" in said or f"un{wanted}" in said:
            return "no"
    return _by_stem(properties, said, answer)


def _by_stem(properties: Sequence[str], said: Sequence[str], answer: str) -> Polarity | None:
    """ "Does not enhance" denies enhancing: the same word in another form."""
    if len(properties) != 1 or len(properties[0]) < _FEWEST_LETTERS:
        return None
    stem = properties[0][: max(_FEWEST_LETTERS, len(properties[0]) - 3)]
    if not any(word.startswith(stem) for word in said):
        return None
    return "no" if is_negated(answer) else "yes"


@lru_cache(maxsize=4096)
def _properties(question: str) -> tuple[str, ...]:
    """The property that a question asks of its first finding; empty if it asks for the finding itself."""
    if not _DEFINITE.match(question):
        return ()
    asked = [
        term.name
        for term in terms(question)
        if term.name not in INTRODUCING and term.name not in _AUXILIARIES
    ]
    if not asked or not _is_finding(asked[0]):
        return ()
    return tuple(asked[1:])


def _is_finding(name: str) -> bool:
    return name in _FINDINGS or (name in CONCEPTS and CONCEPTS[name].axis == "finding")
