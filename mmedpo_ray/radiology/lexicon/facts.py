"""The findings that a text asserts or denies, sentence by sentence."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from mmedpo_ray.radiology.lexicon.synonyms import canonical, respelled, rules
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS, Concept, Mention, concepts_of, mentions
from mmedpo_ray.radiology.word_lists import SEEN, load

# Texts, and sentences, whose findings are kept.
_KEPT = 2048
_KEPT_SENTENCES = 4096

# A quantity after "no" makes it a statement about that thing ("No pneumothorax."), still a negative answer.
_CONTRAST = r"rather than|instead of|as opposed to|unlike"
NEGATION = re.compile(
    r"\b(no(?! (?:doubt|question|(?:\w+ ){0,2}changes?)\b)|not(?! only\b)(?! resolved\b)|without(?! (?:a "
    r"|any )?doubt\b)|absent|absence of|"
    r"negative for|free of|never|neither|nor|cannot|unlikely|improbable|doubtful|(?<!no )(?<!without "
    r")(?<!any )doubt(?! about)|"
    r"rules? out|argues? against|lacks?|fails? to (?:show|demonstrate|reveal)|nothing to suggest|resolution "
    r"of|(?:is|are|was|were|do|does|did|has|have|ca)n['’]t|"
    rf"{_CONTRAST})\b",
    re.IGNORECASE,
)
_IS_CONTRAST = re.compile(_CONTRAST, re.IGNORECASE)
_AFTER_NEGATION = re.compile(
    rf"\b(?:is|are|was|were)?\s*(?:absent|(?:not|no longer) (?:clearly |definitely )?(?:{SEEN}|there)|ruled "
    rf"out|"
    r"excluded|unlikely|improbable|doubtful|(?<!not )resolved)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.;:!?\n]+(?:\s+|$)|\b(?:but|however|although|except)\b", re.IGNORECASE)
# Where a sentence goes on with another statement, to which a negation before does not reach ("not an MRI, it
# is a CT").
_TURN = re.compile(
    r"(?:,|,? \band\b)\s*(?=(?:it|this|that|these|those|they|there|he|she|which)"
    r"(?:['’]s\b|\s+(?:is|are|was|were|appears?|has|have|had|shows?)\b))|,\s*(?=(?:instead|rather)\b(?! "
    r"(?:of|than)\b))",
    re.IGNORECASE,
)
_ADDS = re.compile(r",|\band\b", re.IGNORECASE)
_VERB = re.compile(r"\b(?:is|are|was|were|shows?|has|have|appears?)\b", re.IGNORECASE)
# Neither there nor not there.
_NOT_EXCLUDED = re.compile(
    r"\b(?:can ?not|can['’]t|could not|couldn['’]t|not) (?:be )?(?:\w+ly )?(?:excluded?|ruled? out)\b",
    re.IGNORECASE,
)
_JOINT = re.compile(r",|\band\b|\bwith\b", re.IGNORECASE)
# Statements about the heart and the lungs that amount to a finding or to its absence.
_STATEMENTS = rules("statements")
# A statement of overall normality; not part of the vocabulary because no finding can stand in for it.
_OVERALL = {
    "lung abnormality": Concept("lung abnormality", "finding", "overall", ("lung abnormality",), 0.7),
    "abnormality": Concept("abnormality", "finding", "overall", ("abnormality",), 0.8),
}
_OVERALL_PATTERN = re.compile(r"\b(lung abnormality|abnormality|abnormalities)\b", re.IGNORECASE)
LUNG_FINDINGS = concepts_of(["@chest"]).difference(load("relations")["outside_lungs"])


class Fact(NamedTuple):
    """A finding that a text asserts or denies.

    Attributes:
        finding: Canonical name (a concept of axis "finding", or "abnormality"/"lung abnormality" for overall
            statements).
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
    """The findings that a text asserts or denies, in order, each once, with side, zone and size."""
    found: dict[Fact, None] = {}
    text = canonical(text)
    for start, end in sentence_spans(text):
        sentence = text[start:end]
        if sentence and not sentence.isspace():
            found |= dict.fromkeys(_facts_of(sentence))
    return tuple(found)


def restated(text: str) -> str:
    """Replaces statements about heart and lungs by the finding that they mean, or by its absence."""
    return ". ".join(_restated(sentence) for sentence in _SENTENCE.split(text) if sentence)


@lru_cache(maxsize=_KEPT_SENTENCES)
def _restated(sentence: str) -> str:
    return respelled(sentence, _STATEMENTS)


@lru_cache(maxsize=_KEPT_SENTENCES)
def _facts_of(sentence: str) -> tuple[Fact, ...]:
    found = []
    for clause, negated in _clauses(_restated(sentence)):
        said = mentions(clause)
        named = [mention.concept.name for mention in said if mention.concept.axis == "finding"]
        named += [_overall_name(match.group(1)) for match in _OVERALL_PATTERN.finditer(clause)]
        if named:
            attributes = (None, None, None) if negated else _attributes(said)
            found += [Fact(name, not negated, *attributes) for name in named]
    return tuple(found)


@lru_cache(maxsize=_KEPT_SENTENCES)
def is_negated(text: str) -> bool:
    """Whether the text denies something anywhere."""
    return bool(NEGATION.search(text) or _AFTER_NEGATION.search(text))


@lru_cache(maxsize=2048)
def negated_spans(text: str) -> tuple[tuple[int, int], ...]:
    """Spans ``text[start:end]`` that the text denies or excludes ("rather than").

    Within a statement: what follows a negation, and what precedes "is absent" and the like.
    """
    return tuple(
        (start + offset, end + offset)
        for offset, last in sentence_spans(text)
        for start, end in _negated_spans_of(text[offset:last])
    )


@lru_cache(maxsize=_KEPT_SENTENCES)
def _negated_spans_of(sentence: str) -> tuple[tuple[int, int], ...]:
    if not is_negated(sentence):
        return ()
    spans: list[tuple[int, int]] = []
    for start, end in _statements(sentence, 0, len(sentence)):
        after = _AFTER_NEGATION.search(sentence, start, end)
        if after:
            spans.append((start, after.start()))
        before = NEGATION.search(sentence, start, end)
        if before:
            spans.append((before.end(), _reach(sentence, before, end)))
    return tuple(spans)


@lru_cache(maxsize=2048)
def stated_mentions(text: str) -> tuple[Mention, ...]:
    """The concepts that a text names and does not deny."""
    denied = negated_spans(text)
    if not denied:
        return mentions(text)
    return tuple(item for item in mentions(text) if not _lies_in(item.start, denied))


def stated(text: str) -> str:
    """The text with spaces in place of what it denies, so that every word keeps its place."""
    for start, end in negated_spans(text):
        text = text[:start] + " " * (end - start) + text[end:]
    return text


def _lies_in(place: int, spans: tuple[tuple[int, int], ...]) -> bool:
    return any(start <= place < end for start, end in spans)


def _statements(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The statements of a sentence: what a negation in one says does not reach into another."""
    found = []
    for turn in _TURN.finditer(text, start, end):
        found += _before_absent(text, start, turn.start())
        start = turn.end()
    return found + _before_absent(text, start, end)


def _before_absent(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Parts "the heart is normal and an effusion is not seen" at the "and"."""
    after = _AFTER_NEGATION.search(text, start, end)
    if after is None:
        return [(start, end)]
    joints = [
        joint
        for joint in _ADDS.finditer(text, start, after.start())
        if _VERB.search(text, start, joint.start()) and text[joint.end() : after.start()].strip()
    ]
    if not joints:
        return [(start, end)]
    return [(start, joints[-1].start()), (joints[-1].end(), end)]


def _reach(text: str, negation: re.Match[str], end: int) -> int:
    """Where what is denied ends: a contrast ends at the next comma."""
    comma = text.find(",", negation.end(), end) if _IS_CONTRAST.match(negation.group()) else -1
    return comma if comma >= 0 else end


def absent_subjects(text: str) -> list[str]:
    """What a text says to be absent or not seen: the words of a sentence before it says so."""
    found = []
    for start, end in sentence_spans(text):
        after = _AFTER_NEGATION.search(text, start, end)
        if after:
            found.append(text[start : after.start()])
    return found


@lru_cache(maxsize=_KEPT)
def sentence_spans(text: str) -> tuple[tuple[int, int], ...]:
    """The sentences of a text as spans ``text[start:end]``; "but" and the like start a new one."""
    spans, start = [], 0
    for stop in _SENTENCE.finditer(text):
        spans.append((start, stop.start()))
        start = stop.end()
    spans.append((start, len(text)))
    return tuple(spans)


def _clauses(sentence: str) -> list[tuple[str, bool]]:
    """Splits a sentence into parts of one polarity, where each finding keeps its own attributes.

    What it cannot exclude is in none of the parts.
    """
    if not is_negated(sentence):
        return [(part, False) for part in _split_joints(sentence)]
    parts: list[tuple[str, bool]] = []
    for start, end in _statements(sentence, 0, len(sentence)):
        parts += _parts(sentence[start:end])
    return parts


def _parts(statement: str) -> list[tuple[str, bool]]:
    if _NOT_EXCLUDED.search(statement):
        return []
    after = _AFTER_NEGATION.search(statement)
    if after:
        return [(statement[: after.start()], True), (statement[after.end() :], False)]
    before = NEGATION.search(statement)
    if before is None:
        return [(part, False) for part in _split_joints(statement)]
    end = _reach(statement, before, len(statement))
    parts = [(part, False) for part in _split_joints(statement[: before.start()])]
    parts.append((statement[before.end() : end], True))
    return parts + (_parts(statement[end:]) if end < len(statement) else [])


def _split_joints(text: str) -> list[str]:
    """Splits at commas, "and" and "with" between two findings ("A in the left lung and B in the right")."""
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
