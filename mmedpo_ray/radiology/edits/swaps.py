"""Swaps a concept for another: the other side, another zone, a finding that looks alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.context_rules import context_rules
from mmedpo_ray.radiology.edits.edit import NEAR, Edit
from mmedpo_ray.radiology.edits.substitution import FAMILY, Slot
from mmedpo_ray.radiology.lexicon.vocabulary import (
    CONCEPTS,
    Axis,
    Concept,
    Mention,
    group_of,
    lowered,
    mentions,
)
from mmedpo_ray.radiology.word_lists import load

_LISTS = load("edits")
MIDLINE = frozenset(_LISTS["midline"])
_FIXED = context_rules(_LISTS["fixed"], _LISTS["pieces"])
_EXCLUSIVE_OPPOSITE = {"normal": ("abnormal", "enlarged"), "enlarged": ("normal",), "abnormal": ("normal",)}
# Findings that stand in only for a whole answer: "two cancers" is no radiologist's phrase.
_ONLY_ALONE = frozenset({"cancer"})
# "The lungs are clear", "the lungs show …": what is said of one organ makes no sense of another.
_SUBJECT_OF = re.compile(
    r"\s+(?:fields?\s+)?(?:is|are|was|were|has|have|appears?|remains?|shows?|demonstrates?|reveals?)\b",
    re.IGNORECASE,
)
# An anatomy can change only where it stands alone: neither has it a modifier of its own ("thoracic spine")
# nor is it one ("lung base", "head of the pancreas", "heart size").
_STANDS_ALONE_BEFORE = re.compile(
    r"(?:^|[.,;:(/\n*]\s*|(?:^|\s)-\s*|\b(?:the|a|an|this|of|in|on|at|to|from|for|within|into|near|through|over|and|or|is|are|both|left|right|"
    r"bilateral|ct|mri|mr|pet|enlarged|normal|abnormal|entire|whole|scan|see|shows?)[\s:]+)$",
    re.IGNORECASE,
)
_STANDS_ALONE_AFTER = re.compile(
    r"\s*(?:$|[.,;:)/?!]|(?:and|or|is|are|was|in|on|at|to|with|without|from|by|due|ct|mri|mr|x-ray|xray|x "
    r"ray|radiograph|scan|"
    r"image|imaging|film|ultrasound)\b)",
    re.IGNORECASE,
)
_PART_OF = re.compile(
    r"\b(?:lobes?|head|tail|neck|body|base|apex|dome|segments?|poles?|wall|horn|margin|border|aspect|half|tip|surface|uncinate|"
    r"side|part|portions?|cortex|hilum|arch|root)\s+of\s+(?:the\s+)?(?:left\s+|right\s+)?$",
    re.IGNORECASE,
)
_ADJECTIVES = frozenset(_LISTS["adjectives"])
# Groups of findings that belong to one part of the body, so that no other part can have them.
_PLACED_GROUPS = frozenset({"chest", "brain", "bleeding", "abdomen", "device"})
_MOVABLE_ANATOMY = frozenset({"lobe", "brain part", "matter"})
_PRONOUN = re.compile(r"\b(?:he|she|his|her|hers|him|himself|herself)\b", re.IGNORECASE)
# In running text other words hold sentences together ("the heart is …"), so only these are exchanged.
_SWAPPED_IN_REPORTS = frozenset({"finding", "side", "zone", "size"})
_SHORT_WORDS = 12
# "The effusion is no longer seen" denies what stands before it.
_NO_LONGER = re.compile(r"[^.;:]* no longer\b", re.IGNORECASE)
_COMPOUND = re.compile(r"-\w|/\w")


def swap_edits(answer: str, question: str, vocabulary: frozenset[str]) -> dict[Axis, Iterator[Edit]]:
    """Edits that replace one mention, by kind of fact, each made when it is asked for.

    Args:
        answer: reference answer.
        question: what was asked; of its two options, the other is the only edit of the one.
        vocabulary: concepts to prefer.
    """
    found = mentions(answer)
    is_short = len(lexicon.words(answer)) <= _SHORT_WORDS
    denied = lexicon.negated_spans(answer)
    is_normal_study = {"state", "modality"} <= {mention.concept.axis for mention in found}
    places: dict[Axis, list[int]] = {}
    for index, mention in enumerate(found):
        axis = mention.concept.axis
        if not is_short and axis not in _SWAPPED_IN_REPORTS:
            continue
        if any(start <= mention.start < end for start, end in denied):
            continue
        if is_normal_study and axis in ("modality", "anatomy"):
            continue
        places.setdefault(axis, []).append(index)
    options = lexicon.choices(question)
    return {axis: _exchanges(answer, found, indices, options, vocabulary) for axis, indices in places.items()}


def _exchanges(
    answer: str,
    found: tuple[Mention, ...],
    indices: list[int],
    options: tuple[str, str] | None,
    vocabulary: frozenset[str],
) -> Iterator[Edit]:
    named = {mention.concept.name for mention in found}
    placed = any(mention.concept.axis in ("side", "zone") for mention in found)
    ends = "no longer" in answer.lower()
    for index in indices:
        mention = found[index]
        if not _is_fact_of_its_own(answer, mention, found):
            continue
        if ends and _NO_LONGER.match(answer, mention.end, mention.end + NEAR):
            continue
        slot = Slot(answer, found, index)
        for target in _targets(mention.concept, vocabulary, options, named, slot):
            if target.name in named or (placed and target.name in MIDLINE):
                continue
            changed = slot.filled(target)
            if changed is not None and mention.concept.axis == "plane":
                changed = _filled_again(changed, mention.concept, target)
            if changed is not None:
                yield Edit(changed, mention.concept.axis)


def _filled_again(text: str, concept: Concept, target: Concept) -> str | None:
    """Replaces further mentions of the concept too: "Transverse plane (axial)" has one plane, not two."""
    found = mentions(text)
    index = next((index for index, mention in enumerate(found) if mention.concept is concept), None)
    return text if index is None else Slot(text, found, index).filled(target)


def _is_fact_of_its_own(answer: str, mention: Mention, found: tuple[Mention, ...]) -> bool:
    """Whether a mention can change alone; the names of views, vessels and parts have words that cannot."""
    concept, low = mention.concept, lowered(answer)
    if _COMPOUND.match(answer, mention.end) and concept.axis != "modality":
        return False
    # "The woman hurt his leg": other words would have to follow.
    if concept.axis == "sex" and _PRONOUN.search(answer):
        return False
    if concept.axis == "anatomy" and not _stands_alone(answer, mention, found):
        return False
    rules = chain(_FIXED.get(concept.axis, ()), _FIXED.get(concept.name, ()))
    return not any(rule.holds(low, mention.start, mention.end) for rule in rules)


def _stands_alone(answer: str, mention: Mention, found: tuple[Mention, ...]) -> bool:
    if answer[mention.start : mention.end].lower() in _ADJECTIVES or _SUBJECT_OF.match(answer, mention.end):
        return False
    if mention.concept.group not in _MOVABLE_ANATOMY and any(
        other.concept.axis == "finding" and other.concept.group in _PLACED_GROUPS for other in found
    ):
        return False
    return bool(
        _STANDS_ALONE_AFTER.match(answer, mention.end)
        and _STANDS_ALONE_BEFORE.search(answer, max(0, mention.start - NEAR), mention.start)
        and not _PART_OF.search(answer, max(0, mention.start - NEAR), mention.start)
    )


def _targets(
    concept: Concept,
    vocabulary: frozenset[str],
    options: tuple[str, str] | None,
    named: set[str],
    slot: Slot,
) -> tuple[Concept, ...]:
    """What may replace a concept: the question's other option, else words of the data set, else anything."""
    if options and concept.name in options:
        other = options[1 - options.index(concept.name)]
        return (CONCEPTS[other],) if other in CONCEPTS else ()
    usual = _usual(concept.name, vocabulary)
    if concept.axis != "finding" or slot.is_whole:
        return usual
    if concept.name == "cyst" and slot.is_fitted:
        return ()
    kin = FAMILY.get(concept.name, frozenset()) - _ONLY_ALONE - named
    alike = tuple(target for target in usual if target.name in kin)
    if not alike and concept.group == "device":
        alike = tuple(target for target in group_of(concept) if target.name in kin)
    if alike or slot.is_fitted or concept.group in ("device", "general") or vocabulary >= CONCEPTS.keys():
        return alike
    return tuple(target for target in usual if target.name in vocabulary)


@lru_cache(maxsize=1024)
def _usual(name: str, vocabulary: frozenset[str]) -> tuple[Concept, ...]:
    concept = CONCEPTS[name]
    others = group_of(concept)
    if concept.axis == "state":
        others = tuple(other for other in others if other.name in _EXCLUSIVE_OPPOSITE.get(name, ()))
    return tuple(other for other in others if other.name in vocabulary) or others
