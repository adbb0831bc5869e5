"""The vocabulary of the radiology lexicon: concepts, their spellings and how much they matter.

A concept belongs to an axis (what kind of fact it is) and to a group (what an edit may write in its place:
"right" for "left", one chest finding for another, never a brain finding for a chest finding).
``data/concepts.yaml`` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

from mmedpo_ray.radiology.lexicon.senses import is_other_sense
from mmedpo_ray.radiology.word_lists import load

Axis = Literal[
    "finding",
    "side",
    "zone",
    "size",
    "state",
    "anatomy",
    "modality",
    "sequence",
    "plane",
    "contrast",
    "appearance",
    "acuity",
    "sex",
]


@dataclass(frozen=True)
class Concept:
    """One thing that a radiological text can state.

    Attributes:
        name: canonical name, unique.
        axis: kind of fact.
        group: concepts that can replace one another; those of a group exclude each other, except findings and
            anatomy.
        forms: spellings in lower case.
        relevance: clinical relevance of an error about it, 0 to 1.
        mass_noun: takes no article ("consolidation", not "a consolidation").
        aligned: number of forms that correspond to those of the group's other concepts in the same order, so
            that "left-sided" becomes "right-sided".
    """

    name: str
    axis: Axis
    group: str
    forms: tuple[str, ...]
    relevance: float
    mass_noun: bool = False
    aligned: int = 0


class Mention(NamedTuple):
    """A concept at a place of a text: ``text[start:end]`` spells form number ``form``."""

    concept: Concept
    start: int
    end: int
    form: int


def _read_concepts() -> Iterable[Concept]:
    lists = load("concepts")
    for group, findings in lists["findings"].items():
        for name, entry in findings.items():
            forms = tuple(entry["spellings"])
            yield Concept(name, "finding", group, forms, entry["relevance"], entry.get("mass_noun", False))
    for group, entry in lists["others"].items():
        for forms in map(tuple, entry["concepts"]):
            axis, relevance, aligned = entry["axis"], entry["relevance"], entry.get("aligned", 0)
            yield Concept(forms[0], axis, group, forms, relevance, aligned=aligned)


CONCEPTS: dict[str, Concept] = {concept.name: concept for concept in _read_concepts()}
_FORMS: dict[str, tuple[Concept, int]] = {
    form: (concept, index) for concept in CONCEPTS.values() for index, form in enumerate(concept.forms)
}
# "R kidney", "L lung": only as single capitals.
_CAPITALS = {"L": ("left", 0), "R": ("right", 0)}
_CAPITAL = re.compile(r"[LR](?=\s+[a-z])")


def _pattern(forms: Iterable[str]) -> str:
    """A regular expression that matches the longest of some words.

    Built letter by letter: plain alternatives would cost ten times as much.
    """
    tree: dict[str, Any] = {}
    for form in forms:
        node = tree
        for letter in form:
            node = node.setdefault(letter, {})
        node[""] = {}

    def spelled(node: dict[str, Any]) -> str:
        options = [re.escape(letter) + spelled(rest) for letter, rest in sorted(node.items()) if letter]
        if not options:
            return ""
        return f"(?:{'|'.join(options)})" + ("?" if "" in node else "")

    return spelled(tree)


# Regular plurals need no form of their own. Sides have none ("the patient's rights"), and pets are animals.
_PLURALS = [
    form + "s"
    for form, (concept, _) in _FORMS.items()
    if form[-1] not in "s0123456789" and concept.axis != "side" and form != "pet"
]
_PATTERN = re.compile(rf"(?<![\w-])(?:{_pattern([*_FORMS, *_PLURALS])}|[lr](?=\s))(?!\w)")


@lru_cache(maxsize=4096)
def mentions(text: str) -> tuple[Mention, ...]:
    """Every concept named in ``text``, in order; the longest spelling wins, mentions never overlap.

    A word in another sense ("was left in the ward") names none.
    """
    found = []
    low = lowered(text)
    for match in _PATTERN.finditer(low):
        start, end = match.span()
        spelled = match.group()
        if end - start == 1:
            if not _CAPITAL.match(text, start):
                continue
            name, form = _CAPITALS[text[start]]
            concept = CONCEPTS[name]
        elif is_other_sense(text, low, start, end):
            continue
        else:
            concept, form = _FORMS[spelled] if spelled in _FORMS else _FORMS[spelled[:-1]]
        found.append(Mention(concept, start, end, form))
    return tuple(found)


def lowered(text: str) -> str:
    """The text in small letters, each in its place: a capital whose small form has two letters stays."""
    small = text.lower()
    if len(small) == len(text):
        return small
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)


def concepts_of(names: Iterable[str]) -> frozenset[str]:
    """The names of a list of concepts, in which ``@group`` stands for all concepts of that group."""
    groups = {name[1:] for name in names if name.startswith("@")}
    members = {concept.name for concept in CONCEPTS.values() if concept.group in groups}
    return frozenset(members.union(name for name in names if not name.startswith("@")))


@cache
def group_of(concept: Concept) -> tuple[Concept, ...]:
    """The other concepts that can stand in for this one."""
    return tuple(
        other for other in CONCEPTS.values() if other.group == concept.group and other is not concept
    )
