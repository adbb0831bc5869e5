"""The findings that a text asserts or denies, sentence by sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from mmedpo_ray.curate.terms import CONCEPTS, Concept, Mention, lowered, mentions

# Texts, and sentences, whose findings are kept.
_KEPT = 2048
_KEPT_SENTENCES = 4096

# A quantity after "no" makes it a statement about that thing ("No pneumothorax."), still a negative answer.
NEGATION = re.compile(
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
# Statements about the heart and the lungs that amount to a finding or to its absence.
# Each: words of which one must be there, what is said, what it amounts to.
_REWRITES: tuple[tuple[tuple[str, ...], re.Pattern[str], str], ...] = tuple(
    (needed, re.compile(pattern, re.IGNORECASE), replacement)
    for needed, pattern, replacement in (
        (
            ("heart", "cardi"),
            r"\b(?:heart|cardiac|cardio-?mediastinal)(?: size| silhouette| shadow| contours?)*"
            r"(?: and (?:the )?mediastin\w+(?: contours?| silhouette)?)?(?: (?:is|are|appears?|remains?))?"
            r"(?: (?:of|within))? (?:normal(?: size| limits)?|not enlarged|unremarkable)(?: in size)?\b",
            "no cardiomegaly",
        ),
        (
            ("normal ",),
            r"\bnormal (?:heart|cardiac|cardiomediastinal)(?: size| silhouette)*\b",
            "no cardiomegaly",
        ),
        (
            ("enlarged",),
            r"\b(?:heart|cardiac|cardio-?mediastinal)(?: size| silhouette| shadow| contours?)*"
            r"(?: and (?:the )?mediastin\w+(?: contours?| silhouette)?)?(?: (?:is|are|appears?|remains?))?"
            r"(?: (?:mildly|moderately|severely|markedly))? enlarged\b",
            "cardiomegaly",
        ),
        (("enlarged ",), r"\benlarged (?:heart|cardiac silhouette)\b", "cardiomegaly"),
        (
            ("lung",),
            r"\blungs?(?: fields?)?(?: (?:is|are|appear|remain))? (?:clear|normal)(?: bilaterally)?\b",
            "no lung abnormality",
        ),
        (("lung",), r"\b(?:clear|normal) lungs?\b", "no lung abnormality"),
        (
            ("normal ", "unremarkable "),
            r"\b(?:normal|unremarkable) (?:chest )?(?:radiograph|x-ray|xray|film|study|image|scan)\b",
            "no abnormality",
        ),
        (
            ("normal", "unremarkable"),
            r"\b(?:chest )?(?:radiograph|x-ray|image|scan|study) (?:is|appears|looks) (?:normal|unremarkable)\b",
            "no abnormality",
        ),
        (
            ("no ",),
            r"\bno (?:acute )?(?:cardiopulmonary )?(?:abnormality|abnormalities|process|disease|findings?)\b",
            "no abnormality",
        ),
        (
            ("acute ",),
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


# ---------------------------------------------------------------------- facts


@lru_cache(maxsize=_KEPT)
def facts(text: str) -> tuple[Fact, ...]:
    """The findings that a text asserts or denies, each with the side, zone and size said of it, in order, without repeats."""
    found: dict[Fact, None] = {}
    for sentence in _SENTENCE.split(text):
        if sentence and not sentence.isspace():
            found |= dict.fromkeys(_facts_of(sentence))
    return tuple(found)


@lru_cache(maxsize=_KEPT_SENTENCES)
def _facts_of(sentence: str) -> tuple[Fact, ...]:
    low = lowered(sentence)
    for needed, pattern, replacement in _REWRITES:
        if any(word in low for word in needed):
            sentence, count = pattern.subn(replacement, sentence)
            if count:
                low = lowered(sentence)
    found = []
    for clause, negated in _clauses(sentence):
        said = mentions(clause)
        named = [mention.concept.name for mention in said if mention.concept.axis == "finding"]
        named += [_overall_name(match.group(1)) for match in _OVERALL_PATTERN.finditer(clause)]
        if named:
            attributes = (None, None, None) if negated else _attributes(said)
            found += [Fact(name, not negated, *attributes) for name in named]
    return tuple(found)


def is_negated(text: str) -> bool:
    """Whether the text denies something anywhere."""
    return bool(NEGATION.search(text) or _AFTER_NEGATION.search(text))


@lru_cache(maxsize=2048)
def negated_spans(text: str) -> tuple[tuple[int, int], ...]:
    """Places ``text[start:end]`` whose statements the text denies: in a sentence, what follows a negation, and what stands
    before "is absent" and the like."""
    spans: list[tuple[int, int]] = []
    for start, end in sentence_spans(text):
        after = _AFTER_NEGATION.search(text, start, end)
        if after:
            spans.append((start, after.start()))
        before = NEGATION.search(text, start, end)
        if before:
            spans.append((before.end(), end))
    return tuple(spans)


def absent_subjects(text: str) -> list[str]:
    """What a text says to be absent or not seen: the words of a sentence before it says so."""
    found = []
    for start, end in sentence_spans(text):
        after = _AFTER_NEGATION.search(text, start, end)
        if after:
            found.append(text[start : after.start()])
    return found


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """The sentences of a text as ``text[start:end]``, without what ends them; "but" and the like begin another."""
    spans, start = [], 0
    for stop in _SENTENCE.finditer(text):
        spans.append((start, stop.start()))
        start = stop.end()
    spans.append((start, len(text)))
    return spans


def _clauses(sentence: str) -> list[tuple[str, bool]]:
    """Splits a sentence so that each part has one polarity, and so that each finding keeps its own attributes."""
    after = _AFTER_NEGATION.search(sentence)
    if after:
        return [(sentence[: after.start()], True), (sentence[after.end() :], False)]
    before = NEGATION.search(sentence)
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


def relevance_of(finding: str) -> float:
    """How much a finding matters, 0 to 1."""
    return (CONCEPTS.get(finding) or _OVERALL[finding]).relevance
