"""Where an answer disagrees with the reference, and how bad that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mmedpo_ray.radiology.lexicon.answers import implied_polarity
from mmedpo_ray.radiology.lexicon.facts import LUNG_FINDINGS, Fact, facts, relevance_of, stated_mentions
from mmedpo_ray.radiology.lexicon.polarity import polarity, stated_polarity
from mmedpo_ray.radiology.lexicon.quantities import asks_count, count, disjoint, is_compared, shown
from mmedpo_ray.radiology.lexicon.synonyms import canonical
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS, Axis, mentions
from mmedpo_ray.radiology.lexicon.words import numbers

ConflictAxis = Literal[Axis, "polarity", "choice", "number"]

# What leaving a fact out weighs, relative to stating its opposite.
_MISSED_SHARE = 0.6
_INVENTED_SHARE = 0.8
_DEFAULT_POLARITY_SEVERITY = 0.7
_NUMBER_SEVERITY = 0.5
_LONGEST_ANSWER = 120


@dataclass(frozen=True)
class Conflict:
    """One disagreement of an answer with the reference.

    Attributes:
        axis: Kind of fact that differs.
        kind: "contradicted" (stated and denied), "swapped" (another value), "missed" (in the reference only)
            or "invented" (in the answer only).
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


@lru_cache(maxsize=4096)
def conflicts(reference: str, answer: str, question: str = "") -> tuple[Conflict, ...]:
    """Where an answer disagrees with the reference, most severe first; empty if nowhere.

    Args:
        reference: Reference answer.
        answer: Answer to judge.
        question: What was asked: gives a bare "No" its subject, and a finding named in it is not "invented".
    """
    reference, answer = canonical(reference), canonical(answer)
    found: list[Conflict] = []
    # What a report denies first is no answer to a question.
    is_answer = polarity(reference) is not None and len(reference) <= _LONGEST_ANSWER
    expected = implied_polarity(question, reference) if is_answer else stated_polarity(reference)
    stated = implied_polarity(question, answer) if expected is not None else None
    if expected is not None and stated is not None and expected != stated:
        subject, relevance = _subject(question)
        found.append(Conflict("polarity", "contradicted", subject, expected, stated, relevance))
    found += _fact_conflicts(facts(reference), facts(answer), {f.finding for f in facts(question)})
    # Facts already compare their own sides and zones; an answer of a few words that names no finding has
    # none.
    if not facts(reference) or not any(conflict.axis != "polarity" for conflict in found):
        found += _flat_conflicts(reference, answer, {c.subject for c in found})
    found += _number_conflicts(reference, answer, question)
    unique = {(c.axis, c.subject, c.expected, c.stated): c for c in found}
    return tuple(sorted(unique.values(), key=lambda c: (-c.severity, c.axis, c.subject)))


def severity(found: Iterable[Conflict]) -> float:
    """How bad several conflicts are together, 0 (none) to 1: one minus the product of (1 - severity)."""
    remaining = 1.0
    for conflict in found:
        remaining *= 1.0 - conflict.severity
    return 1.0 - remaining


@lru_cache(maxsize=2048)
def _subject(question: str) -> tuple[str, float]:
    """What a yes/no question is about: its most relevant finding, else its most relevant concept."""
    asked = [(fact.finding, relevance_of(fact.finding)) for fact in facts(question)]
    asked = asked or [(m.concept.name, m.concept.relevance) for m in mentions(question)]
    return max(asked, key=lambda item: item[1], default=("question", _DEFAULT_POLARITY_SEVERITY))


def _fact_conflicts(reference: tuple[Fact, ...], answer: tuple[Fact, ...], asked: set[str]) -> list[Conflict]:
    expected = {fact.finding: fact for fact in reference}
    stated = {fact.finding: fact for fact in answer}
    found: list[Conflict] = []
    for name, fact in expected.items():
        other = stated.get(name)
        weight = relevance_of(name)
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
            weight = relevance_of(name)
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
    """Compares everything except findings, group by group, for short answers ("Left upper zone")."""
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


@lru_cache(maxsize=2048)
def _by_group(text: str) -> dict[str, tuple[ConflictAxis, set[str], float]]:
    grouped: dict[str, tuple[ConflictAxis, set[str], float]] = {}
    for mention in stated_mentions(text):
        concept = mention.concept
        if concept.axis != "finding":
            grouped.setdefault(concept.group, (concept.axis, set(), concept.relevance))[1].add(concept.name)
    return grouped


def _number_conflicts(reference: str, answer: str, question: str) -> list[Conflict]:
    if asks_count(question):
        wanted, given = count(reference), count(answer)
        if wanted is None or given is None or not disjoint(wanted, given):
            return []
        return [Conflict("number", "swapped", "number", shown([wanted]), shown([given]), _NUMBER_SEVERITY)]
    expected, stated = numbers(reference), numbers(answer)
    if not expected or not stated or expected == stated or is_compared(reference) or is_compared(answer):
        return []
    want, got = (", ".join(map(str, sorted(values))) for values in (expected, stated))
    return [Conflict("number", "swapped", "number", want, got, _NUMBER_SEVERITY)]
