"""Whether an answer says something else than the reference, or only less.

contradictions("Right lung", "Left lung")    -> (Conflict("side", "swapped", …),)
contradictions("Right lung", "Lung")         -> ()
contradictions("Pneumonia", "An opacity")    -> ()          the wider word
names_another("Psoas major", "Psoas minor")  -> True        by its words, beyond the vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import pairwise

from mmedpo_ray.radiology.lexicon.answers import UNDECIDED, denied_items
from mmedpo_ray.radiology.lexicon.conflicts import Conflict, conflicts
from mmedpo_ray.radiology.lexicon.facts import (
    Fact,
    absent_subjects,
    facts,
    is_negated,
    negated_spans,
    relevance_of,
    restated,
    stated,
    stated_mentions,
)
from mmedpo_ray.radiology.lexicon.polarity import polarity, stated_polarity
from mmedpo_ray.radiology.lexicon.quantities import are_apart, asks_count, count, lengths, shares, shown
from mmedpo_ray.radiology.lexicon.synonyms import abbreviates, canonical
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS, Axis, concepts_of, mentions
from mmedpo_ray.radiology.lexicon.words import INTRODUCING, Term, folded, terms, words
from mmedpo_ray.radiology.word_lists import IMAGE, load, word_set

_RELATIONS = load("relations")
# A finding in a wider word and those that it may stand for; a place and those that lie in it.
_NARROWER = {name: concepts_of(names) for name, names in _RELATIONS["narrower"].items()}
_PARTS = {name: concepts_of(names) for name, names in _RELATIONS["parts"].items()}
_ADJECTIVES: dict[str, str] = _RELATIONS["place_adjectives"]
# Findings of every kind.
_ANY_FINDING = frozenset({"abnormality", "lung abnormality"})
_SIDES = frozenset({"left", "right", "bilateral"})
_ALL_WELL = re.compile(
    rf"^\W*(?:(?:it|this|everything) (?:is|looks|appears) |(?:the|this) (?:\w+ "
    rf")?(?:{IMAGE}|chest|brain|abdomen|patient) "
    r"(?:is|looks|appears) )?(?:nothing|normal|unremarkable|clear)\b",
    re.IGNORECASE,
)
# "The right upper lobe", "zone" and "lung" are one place.
_LUNG_PARTS = frozenset({"lobe", "zone", "field", "lung"})
_UNKNOWN_RELEVANCE = 0.5
# "Type I", "Le Fort I fracture": a number, unlike the "I" of "I see" and "and I think".
_ROMAN_ONE = re.compile(
    r"(?<=[a-z] )(?<!\band )(?<!\bbut )(?<!\bthat )(?<!\bas )I\b"
    r"(?! (?:see|think|can|cannot|am|would|do|don|have|could|believe)\b)"
)
# Words of place and kind, and of caution, that name nothing.
_VAGUE = word_set("vague") | INTRODUCING


@lru_cache(maxsize=4096)
def contradictions(
    reference: str, answer: str, question: str = "", *, is_complete: bool = False
) -> tuple[Conflict, ...]:
    """The conflicts of an answer with its reference; to say less, or the same in a wider word, is none.

    Besides those of :func:`~mmedpo_ray.radiology.lexicon.conflicts.conflicts` these count: a place of another
    kind ("liver" for "lung", unless one lies in the other), another study ("CT" for "T2"), another length, a
    side where only the reference names its finding, a bare "Normal" where the reference has a finding, and
    that what was asked for is not there.

    Args:
        reference: reference answer.
        answer: answer to judge.
        question: what was asked.
        is_complete: whether the answer claims to name every finding, as a report does: one that it leaves out
            is then denied.
    """
    written = reference, answer
    reference, answer = canonical(reference), canonical(answer)
    present = [fact for fact in facts(reference) if fact.present]
    expected = {fact.finding for fact in present}
    stated = {fact.finding: fact for fact in facts(answer) if fact.present}
    asked = {fact.finding for fact in facts(question)}
    found: list[Conflict] = []
    for conflict in conflicts(reference, answer, question):
        if conflict.kind == "invented":
            there = {
                fact.finding
                for fact in present
                if not _are_elsewhere(fact, stated.get(conflict.subject, fact))
            }
            if are_kin(conflict.subject, there if present else asked):
                continue
        if conflict.kind == "swapped" and _is_part(conflict.stated, conflict.expected):
            continue
        if conflict.axis == "side" and conflict.expected == "bilateral" and _is_one_of_two(*written):
            continue
        if conflict.kind == "missed" and not (
            is_complete and conflict.axis == "finding" and not are_kin(conflict.subject, set(stated))
        ):
            continue
        found.append(conflict)
    if not found:
        found += _denied(reference, expected, answer, question)
        found += _other_place(reference, answer, question, compares_sides=not _is_one_of_two(*written))
        found += _other_study(reference, answer, question)
        found += _other_quantity(reference, answer)
    return tuple(found)


def names_another(reference: str, answer: str, question: str = "") -> bool:
    """Whether an unknown word replaces one of the reference: "psoas minor" for "psoas major".

    Words are compared in order, without those of the question. A word that is only left out, or added, is no
    other one; nor is what an undecided answer says, or what one denies ("Axial, not coronal"). Where both
    sides are words of the lexicon, :func:`contradictions` has the say.
    """
    if UNDECIDED.search(answer) or _are_quantities(reference, answer, question):
        return False
    reference, answer = (restated(canonical(text)) for text in (reference, answer))
    asked = {term.name for term in terms(canonical(question))}
    positive, said_of_it = stated(reference), stated(answer)
    wanted = _telling(positive, asked) or _telling(positive, set()) or _telling(reference, set())
    given = _telling(said_of_it, asked - {term.name for term in wanted})
    names, said = [term.name for term in wanted], [term.name for term in given]
    known = {*names, *map(folded, words(reference))}
    if known & _LUNG_PARTS:
        known |= _LUNG_PARTS
    for kind, first, last, start, stop in SequenceMatcher(None, names, said, autojunk=False).get_opcodes():
        lacking = [term for term in wanted[first:last] if term.name not in said]
        other = [term for term in given[start:stop] if term.name not in known]
        if kind != "replace" or not lacking or not other:
            continue
        if abbreviates(_spanned(positive, wanted[first:last]), _spanned(said_of_it, given[start:stop])):
            continue
        is_whole = len(lacking) == len(wanted)
        if is_whole and not all(term.is_concept for term in lacking + other):
            return True
        if not all(term.is_concept for term in lacking) and len(other) <= len(lacking) + 1:
            return True
    return False


def _spanned(text: str, span: list[Term]) -> str:
    """What a text says from the first of some terms to the last, as it is written."""
    return (
        text[span[0].start :][: span[-1].start - span[0].start]
        + re.split(r"[^\w/-]", text[span[-1].start :], maxsplit=1)[0]
    )


def _telling(text: str, asked: set[str]) -> list[Term]:
    return [
        term
        for term in terms(text)
        if term.name not in asked
        and (term.name not in _VAGUE or (term.name == "i" and _ROMAN_ONE.match(text, term.start)))
    ]


def are_kin(finding: str, others: set[str]) -> bool:
    """Whether one of the other findings is this one, or a wider or narrower word for it."""
    if others and (finding in _ANY_FINDING or others & _ANY_FINDING):
        return True
    nothing: frozenset[str] = frozenset()
    return any(
        finding == other
        or finding in _NARROWER.get(other, nothing)
        or other in _NARROWER.get(finding, nothing)
        for other in others
    )


def _is_one_of_two(reference: str, answer: str) -> bool:
    """Whether the answer names one side of "left and right", which is not the value "both"."""
    return _sides(reference) == {"left", "right"} and len(_sides(answer)) == 1


def without_wider(reference: str, answer: str, found: Sequence[Conflict]) -> tuple[Conflict, ...]:
    """The conflicts without findings that the answer names in a wider word at the same place.

    Such a finding would count twice: the narrower one missed and the wider one invented.
    """
    missed, invented = (
        [
            fact
            for fact in facts(text)
            if any(conflict.kind == kind and conflict.subject == fact.finding for conflict in found)
        ]
        for text, kind in ((reference, "missed"), (answer, "invented"))
    )
    nothing: frozenset[str] = frozenset()
    told = {
        (kind, name)
        for narrow in missed
        for wide in invented
        if wide.finding in _ANY_FINDING or narrow.finding in _NARROWER.get(wide.finding, nothing)
        if not _are_elsewhere(narrow, wide)
        for kind, name in (("missed", narrow.finding), ("invented", wide.finding))
    }
    return tuple(conflict for conflict in found if (conflict.kind, conflict.subject) not in told)


def _are_elsewhere(one: Fact, other: Fact) -> bool:
    """Whether two findings are on opposite sides, or in different zones; "left" is part of "bilateral"."""
    return {one.side, other.side} == {"left", "right"} or (
        None not in (one.zone, other.zone) and one.zone != other.zone
    )


def _is_part(stated: str | None, expected: str | None) -> bool:
    """Whether the answer names some of the reference's things and nothing else: "left" of "left, right"."""
    some, every = (set((names or "").split(", ")) for names in (stated, expected))
    return some < every


def _denied(reference: str, expected: set[str], answer: str, question: str) -> list[Conflict]:
    """ "Normal" where the reference has a finding; "The liver is not visible" where it is located."""
    if expected and not facts(answer) and (_ALL_WELL.search(answer) or stated_polarity(answer) == "no"):
        name = max(sorted(expected), key=relevance_of)
        return [Conflict("finding", "contradicted", name, "present", "absent", relevance_of(name))]
    if polarity(reference) == "no" or is_negated(reference):
        return []
    asked = {mention.concept.name: mention.concept.relevance for mention in mentions(question)}
    for mention in (mention for subject in absent_subjects(answer) for mention in mentions(subject)):
        name = mention.concept.name
        if name in asked and mention.concept.axis in ("finding", "anatomy"):
            return [Conflict(mention.concept.axis, "contradicted", name, "present", "absent", asked[name])]
    denied = _denied_word(reference, answer, question)
    if denied is None:
        return []
    return [
        Conflict(
            "polarity", "contradicted", denied, "present", "absent", asked.get(denied, _UNKNOWN_RELEVANCE)
        )
    ]


def _denied_word(reference: str, answer: str, question: str) -> str | None:
    """A word of the question, or the whole reference, that the answer denies; else None."""
    if not is_negated(answer) or (asks_count(question) and count(reference) == (0, 0)):
        return None
    kept = {term.name for term in terms(stated(answer))}
    wanted = {term.name for term in _telling(reference, set())}
    if wanted and wanted <= kept:
        return None
    heads = [item[0].name for item in denied_items(answer)]
    asked = {term.name for term in terms(canonical(question))} - _VAGUE
    for head in heads:
        if head not in kept and (head in asked or {head} == wanted):
            return head
    return None


def _other_place(reference: str, answer: str, question: str, *, compares_sides: bool) -> list[Conflict]:
    if compares_sides and not facts(answer):
        expected, stated = _sides(reference), _sides(answer) - _sides(question)
        if expected and stated and not expected & stated:
            return [_swapped("side", expected, stated)]
    expected, stated = _places(reference), _places(answer) - _places(question)
    # The "chest" of a "chest X-ray" names a study where the answer goes on to name a place.
    stated = stated - _studied(answer) or stated
    if not expected or not stated or any(_overlap(want, got) for want in expected for got in stated):
        return []
    return [_swapped("anatomy", expected, stated)]


def _other_study(reference: str, answer: str, question: str) -> list[Conflict]:
    expected, stated = _modalities(reference), _modalities(answer) - _modalities(question)
    return [_swapped("modality", expected, stated)] if expected and stated and not expected & stated else []


def _modalities(text: str) -> set[str]:
    """The kinds of study that a text names; a sequence is one of MRI."""
    concepts = [mention.concept for mention in stated_mentions(text)]
    named = {concept.name for concept in concepts if concept.axis == "modality"}
    return named | ({"mri"} if any(concept.axis == "sequence" for concept in concepts) else set())


def _other_quantity(reference: str, answer: str) -> list[Conflict]:
    for subject, unit, read in (("length", " mm", lengths), ("share", "%", shares)):
        expected, given = read(reference), read(answer)
        if expected and given and are_apart(expected, given):
            want, got = shown(expected, unit), shown(given, unit)
            return [Conflict("number", "swapped", subject, want, got, 0.5)]
    return []


def _are_quantities(reference: str, answer: str, question: str) -> bool:
    """Whether both answers are measurements of one kind, or counts: then numbers decide, not words."""
    if asks_count(question) and count(reference) is not None and count(answer) is not None:
        return True
    return bool((lengths(reference) and lengths(answer)) or (shares(reference) and shares(answer)))


def _swapped(axis: Axis, expected: set[str], stated: set[str]) -> Conflict:
    want, got = ", ".join(sorted(expected)), ", ".join(sorted(stated))
    return Conflict(axis, "swapped", want, want, got, max(CONCEPTS[name].relevance for name in expected))


def _sides(text: str) -> set[str]:
    return {mention.concept.name for mention in stated_mentions(text)} & _SIDES


def _places(text: str) -> set[str]:
    """Parts of the body that a text names and does not deny."""
    denied = negated_spans(text) if is_negated(text) else ()
    named = [(item.concept.name, item.start) for item in mentions(text) if item.concept.axis == "anatomy"]
    named += [(_ADJECTIVES[term.name], term.start) for term in terms(text) if term.name in _ADJECTIVES]
    return {name for name, place in named if not any(start <= place < end for start, end in denied)}


def _studied(text: str) -> set[str]:
    """Parts of the body right before a kind of study, as in "chest X-ray"."""
    return {
        mention.concept.name
        for mention, after in pairwise(mentions(text))
        if mention.concept.axis == "anatomy"
        and after.concept.axis == "modality"
        and not text[mention.end : after.start].strip()
    }


def _overlap(one: str, other: str) -> bool:
    nothing: frozenset[str] = frozenset()
    return one == other or one in _PARTS.get(other, nothing) or other in _PARTS.get(one, nothing)
