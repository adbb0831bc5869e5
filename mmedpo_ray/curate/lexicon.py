"""Reads radiological answers: polarity, choices, findings with side, zone and size, and where two answers conflict.

    polarity("No, the lungs are clear.")                    -> "no"
    facts("There is a large left pleural effusion.")        -> (Fact("pleural effusion", True, "left", None, "large"),)
    conflicts("Left lower zone", "In the right lower zone") -> (Conflict("side", "swapped", "left", "left", "right", 0.9),)

Rules and a vocabulary (``terms.py``), no model: fast, explainable, English, and blind to what the vocabulary lacks. Severities are
ours and rank conflicts by what they would mean for a patient; they are no calibrated probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mmedpo_ray.curate.terms import CONCEPTS, Concept, Mention, mentions

Polarity = Literal["yes", "no"]
ConflictAxis = Literal[
    "polarity",
    "choice",
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
    "number",
]

# What leaving a fact out weighs, relative to stating its opposite.
_MISSED_SHARE = 0.6
_INVENTED_SHARE = 0.8
_DEFAULT_POLARITY_SEVERITY = 0.7

_YES = re.compile(r"^\W*(yes|yeah|yep|true|correct)\b", re.IGNORECASE)
_NO = re.compile(r"^\W*(no|nope|none|false|incorrect)\b", re.IGNORECASE)
# A quantity after "no" makes it a statement about that thing ("No pneumothorax."), still a negative answer.
_NEGATION = re.compile(
    r"\b(no|not|without|absent|absence of|negative for|free of|never|neither|nor|cannot|isn't|aren't|doesn't|don't)\b",
    re.IGNORECASE,
)
_AFTER_NEGATION = re.compile(
    r"\b(?:is|are|was|were)?\s*(?:absent|not (?:seen|present|identified|visible|evident|noted|visualized|enlarged)|ruled out|"
    r"excluded|resolved)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.;:!?\n]+(?:\s+|$)|\b(?:but|however|although|except)\b", re.IGNORECASE)
_JOINT = re.compile(r",|\band\b|\bwith\b", re.IGNORECASE)
_WORD = re.compile(r"[a-z0-9]+(?:[./-][a-z0-9]+)*", re.IGNORECASE)
# Statements about the heart and the lungs that amount to a finding or to its absence.
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (
            r"\b(?:heart|cardiac|cardio-?mediastinal)(?: size| silhouette| shadow| contours?)*"
            r"(?: and (?:the )?mediastin\w+(?: contours?| silhouette)?)?(?: (?:is|are|appears?|remains?))?"
            r"(?: (?:of|within))? (?:normal(?: size| limits)?|not enlarged|unremarkable)(?: in size)?\b",
            "no cardiomegaly",
        ),
        (r"\bnormal (?:heart|cardiac|cardiomediastinal)(?: size| silhouette)*\b", "no cardiomegaly"),
        (
            r"\b(?:heart|cardiac|cardio-?mediastinal)(?: size| silhouette| shadow| contours?)*"
            r"(?: and (?:the )?mediastin\w+(?: contours?| silhouette)?)?(?: (?:is|are|appears?|remains?))?"
            r"(?: (?:mildly|moderately|severely|markedly))? enlarged\b",
            "cardiomegaly",
        ),
        (r"\benlarged (?:heart|cardiac silhouette)\b", "cardiomegaly"),
        (
            r"\blungs?(?: fields?)?(?: (?:is|are|appear|remain))? (?:clear|normal)(?: bilaterally)?\b",
            "no lung abnormality",
        ),
        (r"\b(?:clear|normal) lungs?\b", "no lung abnormality"),
        (
            r"\b(?:normal|unremarkable) (?:chest )?(?:radiograph|x-ray|xray|film|study|image|scan)\b",
            "no abnormality",
        ),
        (
            r"\b(?:chest )?(?:radiograph|x-ray|image|scan|study) (?:is|appears|looks) (?:normal|unremarkable)\b",
            "no abnormality",
        ),
        (
            r"\bno (?:acute )?(?:cardiopulmonary )?(?:abnormality|abnormalities|process|disease|findings?)\b",
            "no abnormality",
        ),
        (
            r"\bacute (?:cardiopulmonary |cardiac |pulmonary |osseous |bony |intracranial )?"
            r"(?:process|disease|findings?)\b",
            "abnormality",
        ),
    )
)
# A statement of overall normality; not part of the vocabulary because no finding can stand in for it.
_OVERALL = {
    "lung abnormality": Concept("lung abnormality", "finding", "overall", ("lung abnormality",), 0.7),
    "abnormality": Concept("abnormality", "finding", "overall", ("abnormality",), 0.8),
}
_OVERALL_PATTERN = re.compile(r"\b(lung abnormality|abnormality|abnormalities)\b", re.IGNORECASE)
LUNG_FINDINGS = frozenset(c.name for c in CONCEPTS.values() if c.group == "chest") - {
    "cardiomegaly",
    "hernia",
}
_NUMBER_WORDS = {
    word: value
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_NUMBER = re.compile(
    r"(?<![\w.])(\d{1,3}|"
    + "|".join(_NUMBER_WORDS)
    + r")(?:st|nd|rd|th)?(?![\w]|\.\d|\s*(?:%|cm|mm|ml|hu)\b|%)",
    re.IGNORECASE,
)
_FILLER = frozenset(
    re.findall(
        r"\w+",
        "a an the is are was were be it its this that there these those of in on at to for and as has have with by from "
        "image images picture scan shows show showing seen see shown present visible located side answer patient",
    )
)
_META = re.compile(
    r"<\s*image\s*>|\[/?INST\]|</?s>|\b(?:original answer|candidate ?answer ?\d*)\b|^\s*-?\s*question\s*:|\b(?:USER|ASSISTANT|HUMAN|GPT)\s*:"
    r"|\bas an? (?:ai|language model)\b|\bi(?:'m| am) (?:sorry|unable)\b|\bi cannot\b",
    re.IGNORECASE | re.MULTILINE,
)
_CHOICE = re.compile(r"([\w-]+),? or (?:an? |the )?([\w-]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Fact:
    """A finding that a text asserts or denies.

    Attributes:
        finding: Canonical name (a concept of axis "finding", or "abnormality"/"lung abnormality" for overall statements).
        present: False where the text denies it.
        side: left, right, bilateral, or None where not stated.
        zone: upper, middle, lower (or another zone concept), or None.
        size: small, moderate, large, or None.
    """

    finding: str
    present: bool
    side: str | None = None
    zone: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Conflict:
    """One disagreement of an answer with the reference.

    Attributes:
        axis: Kind of fact that differs.
        kind: "contradicted" (stated and denied), "swapped" (another value), "missed" (in the reference only) or
            "invented" (in the answer only).
        subject: Concept that the disagreement is about.
        expected: What the reference says, or None.
        stated: What the answer says, or None.
        severity: 0 to 1.
    """

    axis: ConflictAxis
    kind: Literal["contradicted", "swapped", "missed", "invented"]
    subject: str
    expected: str | None
    stated: str | None
    severity: float


# ---------------------------------------------------------------------- words


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, in order ("T2-weighted" is one)."""
    return [word.lower() for word in _WORD.findall(text)]


def content_words(text: str) -> frozenset[str]:
    """The words that carry meaning: fillers left out, plurals folded, known spellings replaced by their concept's name."""
    pieces, position = [], 0
    for mention in mentions(text):
        pieces += [text[position : mention.start], " ", mention.concept.name, " "]
        position = mention.end
    pieces.append(text[position:])
    kept = [_singular(word) for word in words("".join(pieces)) if word not in _FILLER]
    return frozenset(str(_NUMBER_WORDS.get(word, word)) for word in kept)


def placed_content_words(text: str, start: int, end: int) -> list[tuple[str, int]]:
    """The words of ``text[start:end]`` that carry meaning, folded as in :func:`content_words`, each with its place."""
    found = [(match.group(0).lower(), match.start()) for match in _WORD.finditer(text, start, end)]
    kept = [(_singular(word), place) for word, place in found if word not in _FILLER]
    return [(str(_NUMBER_WORDS.get(word, word)), place) for word, place in kept]


def equivalent(first: str, second: str) -> bool:
    """Whether two answers say the same in other words: equal polarity, numbers, content words and facts."""
    if polarity(first) != polarity(second) or _other_letters(first) != _other_letters(second):
        return False
    left, right = content_words(first), content_words(second)
    if not left and not right:
        return words(first) == words(second)
    return (
        left == right and set(facts(first)) == set(facts(second)) and _opposites(first) == _opposites(second)
    )


@lru_cache(maxsize=2048)
def _opposites(text: str) -> tuple[tuple[str, ...], ...]:
    """Concepts that exclude each other and are named together, in order: "dark centre, bright rim" is not its reverse."""
    groups: dict[str, list[str]] = {}
    for mention in mentions(text):
        if mention.concept.axis not in ("finding", "anatomy"):
            groups.setdefault(mention.concept.group, []).append(mention.concept.name)
    return tuple(tuple(names) for _, names in sorted(groups.items()) if len(set(names)) > 1)


def _other_letters(text: str) -> str:
    """Letters and digits beyond ASCII, of which :func:`words` knows nothing."""
    if text.isascii():
        return ""
    return "".join(letter for letter in text.casefold() if letter.isalnum() and not letter.isascii())


def is_meta_text(text: str) -> bool:
    """Whether the text talks about the task instead of the image: leaked prompts, role tags, refusals."""
    return _META.search(text) is not None


def _singular(word: str) -> str:
    return (
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
    )


# ---------------------------------------------------------------------- closed answers


def polarity(answer: str) -> Polarity | None:
    """Yes or no, by the first word of the answer; None where it starts otherwise ("Normal" is no "No")."""
    if _YES.match(answer):
        return "yes"
    return "no" if _NO.match(answer) else None


def implied_polarity(question: str, answer: str) -> Polarity | None:
    """The answer to a yes/no question, also where it is a statement ("There is no effusion")."""
    direct = polarity(answer)
    if direct is not None:
        return direct
    agreed = _agreement(question, answer)
    if agreed is not None:
        return "yes" if agreed else "no"
    return "no" if _NEGATION.search(answer) else None


def stated_polarity(question: str, answer: str) -> Polarity | None:
    """As :func:`implied_polarity`, only where the text leaves no doubt: a negation about something else is no "no"."""
    direct = polarity(answer)
    if direct is not None:
        return direct
    agreed = _agreement(question, answer)
    if agreed is None or (agreed and is_negated(answer)):
        return None
    return "yes" if agreed else "no"


def _agreement(question: str, answer: str) -> bool | None:
    """Whether question and answer say the same of the findings that both name; None where they disagree among each other."""
    asked = _presence(question.rstrip("?"))
    said = _presence(answer)
    agreements = {asked[name] == said[name] for name in asked if name in said}
    return agreements.pop() if len(agreements) == 1 else None


def choices(question: str) -> tuple[str, str] | None:
    """The options of an "A or B" question, lower case ("Is this a CT or an MRI?" -> ("ct", "mri")); else None."""
    match = _CHOICE.search(question)
    if match is None or match.group(2).lower() in ("not", "no"):
        return None
    by_group: dict[str, list[str]] = {}
    for mention in mentions(question):
        names = by_group.setdefault(mention.concept.group, [])
        if mention.concept.name not in names:
            names.append(mention.concept.name)
    for names in by_group.values():
        if len(names) == 2:
            return names[0], names[1]
    return match.group(1).lower(), match.group(2).lower()


def numbers(text: str) -> frozenset[int]:
    """Counts and ordinals of a text, in digits or words; measurements with units are left out."""
    return frozenset(
        _NUMBER_WORDS[m.group(1).lower()] if m.group(1).lower() in _NUMBER_WORDS else int(m.group(1))
        for m in _NUMBER.finditer(text)
    )


# ---------------------------------------------------------------------- findings


@lru_cache(maxsize=2048)
def facts(text: str) -> tuple[Fact, ...]:
    """The findings that a text asserts or denies, each with the side, zone and size said of it, in order, without repeats."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    found: dict[Fact, None] = {}
    for sentence in _SENTENCE.split(text):
        if not sentence or not sentence.strip():
            continue
        for clause, negated in _clauses(sentence):
            named = [m.concept for m in mentions(clause) if m.concept.axis == "finding"]
            named += [_OVERALL[_overall_name(m.group(1))] for m in _OVERALL_PATTERN.finditer(clause)]
            attributes = _attributes(mentions(clause))
            for concept in named:
                found[Fact(concept.name, not negated, *((None, None, None) if negated else attributes))] = (
                    None
                )
    return tuple(found)


def is_negated(text: str) -> bool:
    """Whether the text denies something anywhere."""
    return bool(_NEGATION.search(text) or _AFTER_NEGATION.search(text))


@lru_cache(maxsize=2048)
def negated_spans(text: str) -> tuple[tuple[int, int], ...]:
    """Places ``text[start:end]`` whose statements the text denies: in a sentence, what follows a negation, and what stands
    before "is absent" and the like."""
    spans: list[tuple[int, int]] = []
    for start, end in sentence_spans(text):
        after = _AFTER_NEGATION.search(text, start, end)
        if after:
            spans.append((start, after.start()))
        before = _NEGATION.search(text, start, end)
        if before:
            spans.append((before.end(), end))
    return tuple(spans)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """The sentences of a text as ``text[start:end]``, without what ends them; "but" and the like begin another."""
    spans, start = [], 0
    for stop in _SENTENCE.finditer(text):
        spans.append((start, stop.start()))
        start = stop.end()
    spans.append((start, len(text)))
    return spans


def conflicts(reference: str, answer: str, question: str = "") -> tuple[Conflict, ...]:
    """Where an answer disagrees with the reference, most severe first; empty where the lexicon sees no difference.

    Args:
        reference: Reference answer.
        answer: Answer to judge.
        question: What was asked: gives a bare "No" its subject, and a finding named in it is not "invented".
    """
    found: list[Conflict] = []
    expected, stated = polarity(reference), implied_polarity(question, answer)
    if expected is not None and stated is not None and expected != stated:
        subject, relevance = _subject(question)
        found.append(Conflict("polarity", "contradicted", subject, expected, stated, relevance))
    found += _fact_conflicts(facts(reference), facts(answer), {f.finding for f in facts(question)})
    # Facts already compare their own sides and zones; an answer of a few words that names no finding has none.
    if not facts(reference) or not any(conflict.axis != "polarity" for conflict in found):
        found += _flat_conflicts(reference, answer, {c.subject for c in found})
    found += _number_conflicts(reference, answer)
    unique = {(c.axis, c.subject, c.expected, c.stated): c for c in found}
    return tuple(sorted(unique.values(), key=lambda c: (-c.severity, c.axis, c.subject)))


def severity(found: Iterable[Conflict]) -> float:
    """How bad several conflicts are together, 0 (none) to 1: one minus the product of (1 - severity)."""
    remaining = 1.0
    for conflict in found:
        remaining *= 1.0 - conflict.severity
    return 1.0 - remaining


def _clauses(sentence: str) -> list[tuple[str, bool]]:
    """Splits a sentence so that each part has one polarity, and so that each finding keeps its own attributes."""
    after = _AFTER_NEGATION.search(sentence)
    if after:
        return [(sentence[: after.start()], True), (sentence[after.end() :], False)]
    before = _NEGATION.search(sentence)
    head, tail = (sentence, "") if before is None else (sentence[: before.start()], sentence[before.end() :])
    parts = [(part, False) for part in _split_joints(head)]
    if tail:
        parts.append((tail, True))
    return parts


def _split_joints(text: str) -> list[str]:
    """Splits at commas, "and" and "with" where a finding stands on both sides ("A in the left lung and B in the right")."""
    findings = [mention for mention in mentions(text) if mention.concept.axis == "finding"]
    parts: list[str] = []
    start = following = 0
    for joint in _JOINT.finditer(text):
        while following < len(findings) and findings[following].start < start:
            following += 1
        if following == len(findings) or joint.end() > findings[-1].start:
            break
        if findings[following].end <= joint.start():
            parts.append(text[start : joint.start()])
            start = joint.end()
    return [*parts, text[start:]]


def _overall_name(spelled: str) -> str:
    return "lung abnormality" if spelled.lower().startswith("lung") else "abnormality"


def _attributes(found: tuple[Mention, ...]) -> tuple[str | None, str | None, str | None]:
    def pick(axis: str) -> str | None:
        names = {m.concept.name for m in found if m.concept.axis == axis}
        if axis == "side" and {"left", "right"} <= names:
            return "bilateral"
        return min(names) if names else None

    return pick("side"), pick("zone"), pick("size")


def _presence(text: str) -> dict[str, bool]:
    return {fact.finding: fact.present for fact in facts(text)}


def _relevance(finding: str) -> float:
    return (CONCEPTS.get(finding) or _OVERALL[finding]).relevance


def _subject(question: str) -> tuple[str, float]:
    """What a yes/no question is about: its most relevant finding, else its most relevant concept."""
    asked = [(fact.finding, _relevance(fact.finding)) for fact in facts(question)]
    asked = asked or [(m.concept.name, m.concept.relevance) for m in mentions(question)]
    return max(asked, key=lambda item: item[1], default=("question", _DEFAULT_POLARITY_SEVERITY))


def _fact_conflicts(reference: tuple[Fact, ...], answer: tuple[Fact, ...], asked: set[str]) -> list[Conflict]:
    expected = {fact.finding: fact for fact in reference}
    stated = {fact.finding: fact for fact in answer}
    found: list[Conflict] = []
    for name, fact in expected.items():
        other = stated.get(name)
        weight = _relevance(name)
        if other is None:
            if fact.present:
                denied = _denied_overall(name, stated)
                kind: Literal["contradicted", "missed"] = "contradicted" if denied else "missed"
                share = 1.0 if denied else _MISSED_SHARE
                found.append(
                    Conflict("finding", kind, name, "present", "absent" if denied else None, weight * share)
                )
        elif other.present != fact.present:
            said = ("present", "absent") if fact.present else ("absent", "present")
            found.append(Conflict("finding", "contradicted", name, *said, weight))
        elif fact.present:
            found += _attribute_conflicts(fact, other)
    for name, fact in stated.items():
        if fact.present and name not in expected and name not in asked:
            weight = _relevance(name)
            denied = _denied_overall(name, expected)
            share = 1.0 if denied else _INVENTED_SHARE
            found.append(
                Conflict(
                    "finding",
                    "contradicted" if denied else "invented",
                    name,
                    "absent" if denied else None,
                    "present",
                    weight * share,
                )
            )
    return found


def _denied_overall(finding: str, others: dict[str, Fact]) -> bool:
    """Whether an overall statement ("the lungs are clear") denies this finding."""
    overall = others.get("abnormality")
    lungs = others.get("lung abnormality")
    return bool(
        (overall and not overall.present) or (lungs and not lungs.present and finding in LUNG_FINDINGS)
    )


def _attribute_conflicts(expected: Fact, stated: Fact) -> list[Conflict]:
    found: list[Conflict] = []
    axes: tuple[ConflictAxis, ...] = ("side", "zone", "size")
    for axis in axes:
        want, got = getattr(expected, axis), getattr(stated, axis)
        if want is None or want == got:
            continue
        relevance = CONCEPTS[want].relevance if want in CONCEPTS else 0.5
        if got is None:
            found.append(Conflict(axis, "missed", want, want, None, relevance * _MISSED_SHARE / 2))
        else:
            found.append(Conflict(axis, "swapped", want, want, got, relevance))
    return found


def _flat_conflicts(reference: str, answer: str, known: set[str]) -> list[Conflict]:
    """Compares everything but findings group by group, for short answers that name no finding ("Left upper zone")."""
    expected, stated = _by_group(reference), _by_group(answer)
    found: list[Conflict] = []
    for group, (axis, names, relevance) in expected.items():
        if names & known or group not in stated:
            continue
        others = stated[group][1]
        if axis == "anatomy" and names & others:
            continue
        if names != others:
            want, got = ", ".join(sorted(names)), ", ".join(sorted(others))
            found.append(Conflict(axis, "swapped", want, want, got, relevance))
    return found


def _by_group(text: str) -> dict[str, tuple[ConflictAxis, set[str], float]]:
    grouped: dict[str, tuple[ConflictAxis, set[str], float]] = {}
    for mention in mentions(text):
        concept = mention.concept
        if concept.axis != "finding":
            grouped.setdefault(concept.group, (concept.axis, set(), concept.relevance))[1].add(concept.name)
    return grouped


def _number_conflicts(reference: str, answer: str) -> list[Conflict]:
    expected, stated = numbers(reference), numbers(answer)
    if not expected or not stated or expected == stated:
        return []
    want, got = (", ".join(map(str, sorted(values))) for values in (expected, stated))
    return [Conflict("number", "swapped", "number", want, got, 0.5)]
