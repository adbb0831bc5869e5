"""Writes a dispreferred answer by changing one fact of the reference: a side, a finding, a negation, a zone, a number.

What is left is word for word the reference, so that length and style give nothing away and the preference is about
the fact alone. Every edit is checked with the lexicon to conflict with the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache

import numpy as np

from mmedpo_ray.curate import lexicon
from mmedpo_ray.curate.edits import Edit, capitalise, is_plural, like, plural, with_article
from mmedpo_ray.curate.negation import clear_lung_edits, negation_edits, polarity_edits, statement_edits
from mmedpo_ray.curate.terms import CONCEPTS, Concept, Mention, group_of, mentions

GENERATOR = "rule_edit"

# Findings that have no side or zone; they do not stand in where one is stated.
_MIDLINE = frozenset(
    {"cardiomegaly", "pneumoperitoneum", "mediastinal widening", "interstitial lung disease"}
)
_EXCLUSIVE_OPPOSITE = {"normal": ("abnormal", "enlarged"), "enlarged": ("normal",), "abnormal": ("normal",)}
_NUMBER_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNT = re.compile(
    r"(?<![\w./])(\d{1,3}|"
    + "|".join(_NUMBER_NAMES)
    + r")(st|nd|rd|th)?(?![\w/]|\.\d|\s*(?:%|cm|mm|ml|hu)\b|%|[\s-]*(?:second|minute|hour|day|week|month|year)s?\b)",
    re.IGNORECASE,
)
# "1. Effusion. 2. Nodule.": the number of a list's item is no count.
_LISTED = re.compile(r"(?:^|[.;:\n]\s*)\d{1,3}[.)]\s")
_WHOLE_NORMAL_WORDS = 4
# Groups whose concepts list this many spellings in the same order ("left-sided", "right-sided").
_ALIGNED_FORMS = {"side": 5, "modality": 3, "sequence": 3, "contrast": 2, "depth": 2, "axiality": 2}
# Spellings whose counterpart is another than the concept's first: (spelling, concept) → spelling; None: there is none.
_COUNTERPARTS: dict[tuple[str, str], str | None] = {
    ("left-sided", "bilateral"): "bilateral",
    ("right-sided", "bilateral"): "bilateral",
    ("leftward", "bilateral"): None,
    ("rightward", "bilateral"): None,
    ("left-hand", "bilateral"): None,
    ("right-hand", "bilateral"): None,
    ("bilaterally", "left"): "on the left",
    ("bilaterally", "right"): "on the right",
    ("both sides", "left"): "the left side",
    ("both sides", "right"): "the right side",
    ("both lungs", "left"): "the left lung",
    ("both lungs", "right"): "the right lung",
    ("apical", "lower"): "basal",
    ("apical", "middle"): "perihilar",
    ("apex", "lower"): "base",
    ("top", "lower"): "bottom",
    ("superior", "lower"): "inferior",
    ("inferior", "upper"): "superior",
    ("bottom", "upper"): "top",
    ("base", "upper"): "apex",
    ("basal", "upper"): "apical",
    ("basilar", "upper"): "apical",
    ("basilar", "middle"): "perihilar",
    ("bibasilar", "upper"): "biapical",
    ("bibasilar", "middle"): "bilateral perihilar",
    ("mild", "large"): "severe",
    ("mildly", "moderate"): "moderately",
    ("mildly", "large"): "severely",
    ("slight", "large"): "marked",
    ("minimal", "large"): "extensive",
    ("moderately", "small"): "mildly",
    ("moderately", "large"): "severely",
    ("severe", "small"): "mild",
    ("severely", "small"): "mildly",
    ("severely", "moderate"): "moderately",
    ("marked", "small"): "slight",
    ("extensive", "small"): "minimal",
}
# What has a degree rather than a size: "moderate edema" is mild or severe, "a moderate effusion" small or large.
_GRADED = frozenset(
    {
        "cardiomegaly",
        "atelectasis",
        "pulmonary edema",
        "emphysema",
        "interstitial lung disease",
        "hydrocephalus",
    }
    | {
        "midline shift",
        "mass effect",
        "edema",
        "atrophy",
        "hydronephrosis",
        "cirrhosis",
        "inflammation",
        "obstruction",
    }
    | {"hepatomegaly", "pancreatitis", "lymphadenopathy"}
)
# "The lungs are clear": what is said of one organ makes no sense of another.
_SUBJECT_OF = re.compile(r"\s+(?:fields?\s+)?(?:is|are|appears?|remains?)\b", re.IGNORECASE)
# Names of views, vessels and chambers, in which a side or level is no fact of its own.
_PART_OF_A_NAME = re.compile(
    r"(?:\s+and\s+\w+)?\s+(?:views?|projections?|radiographs?|films?|vena cava|limits?|ventric\w*|atri\w+|main\w*|"
    r"circumflex|mediastinum|internal jugular|jugular|subclavian|decubitus)\b",
    re.IGNORECASE,
)
# In running text other words hold sentences together ("the heart is …"), so only these are exchanged.
_SWAPPED_IN_REPORTS = frozenset({"finding", "side", "zone", "size"})
_SHORT_WORDS = 12
_SHORT_LETTERS = 64
# What stands before a mention: an article, perhaps with words between; a verb that wants one.
_ARTICLE = re.compile(r"\b(an?) ((?:\w+ )*)$", re.IGNORECASE)
_IS = re.compile(r"\b(?:is|shows?) $")


def vocabulary_of(texts: Iterable[str]) -> frozenset[str]:
    """Names of the concepts that occur in the texts: what is plausible in this data set."""
    return frozenset(mention.concept.name for text in texts for mention in mentions(text))


def rule_edit(
    answer: str, question: str, rng: np.random.Generator, vocabulary: frozenset[str] | None = None
) -> Edit | None:
    """Changes one fact of an answer, drawn evenly over the kinds of fact it states; None where it states none we know.

    Args:
        answer: reference answer.
        question: what was asked; the other option of an "A or B" question is the edit there.
        rng: source of randomness; the same state gives the same edit.
        vocabulary: concepts to prefer as replacements, see :func:`vocabulary_of`.
    """
    known = vocabulary or frozenset(CONCEPTS)
    find = _edits_of_short if len(answer) <= _SHORT_LETTERS else _edits
    by_axis = find(answer, question, known)
    return _first_fitting(answer, question, _drawn(by_axis, rng)) or _first_fitting(
        answer, question, clear_lung_edits(answer, _lung_findings(known))
    )


def _drawn(by_axis: dict[str, list[Edit]], rng: np.random.Generator) -> Iterator[Edit]:
    axes = sorted(by_axis)
    for axis_index in rng.permutation(len(axes)):
        edits = by_axis[axes[axis_index]]
        for index in rng.permutation(len(edits)):
            yield edits[index]


def _first_fitting(answer: str, question: str, edits: Iterable[Edit]) -> Edit | None:
    """The first edit that contradicts the answer in one fact; where there is none, the first that contradicts it."""
    second_best = None
    for edit in edits:
        if lexicon.equivalent(answer, edit.text):
            continue
        found = lexicon.conflicts(answer, edit.text, question)
        if _is_one_fact(found):
            return edit
        if found and second_best is None:
            second_best = edit
    return second_best


def _is_one_fact(found: tuple[lexicon.Conflict, ...]) -> bool:
    # Another finding in its place is one edit but two conflicts: one missed, one invented.
    return len(found) == 1 or sorted(conflict.kind for conflict in found) == ["invented", "missed"]


def _edits(answer: str, question: str, vocabulary: frozenset[str]) -> dict[str, list[Edit]]:
    """All edits by the kind of fact that they change."""
    # A closed answer has one fact; everything behind it is comment.
    found = list(polarity_edits(answer)) or [
        *_swaps(answer, question, vocabulary),
        *negation_edits(answer),
        *statement_edits(answer),
        *_counts(answer),
        *_abnormal(answer, question, vocabulary),
    ]
    by_axis: dict[str, list[Edit]] = {}
    for edit in found:
        by_axis.setdefault(edit.axis, []).append(edit)
    return by_axis


# Short answers repeat in a data set; the edits of one take a few kilobytes.
_edits_of_short = lru_cache(maxsize=1024)(_edits)


def _lung_findings(vocabulary: frozenset[str]) -> list[tuple[str, bool]]:
    return [
        (name, CONCEPTS[name].mass_noun)
        for name in sorted(lexicon.LUNG_FINDINGS & vocabulary or lexicon.LUNG_FINDINGS)
        if name not in _MIDLINE
    ]


# ---------------------------------------------------------------------- swaps


def _swaps(answer: str, question: str, vocabulary: frozenset[str]) -> Iterator[Edit]:
    found = mentions(answer)
    named = {mention.concept.name for mention in found}
    options = lexicon.choices(question)
    placed = any(mention.concept.axis in ("side", "zone") for mention in found)
    is_short = len(lexicon.words(answer)) <= _SHORT_WORDS
    denied = lexicon.negated_spans(answer)
    for mention in found:
        axis = mention.concept.axis
        if not is_short and axis not in _SWAPPED_IN_REPORTS:
            continue
        if any(start <= mention.start < end for start, end in denied):
            continue
        if axis == "anatomy" and _SUBJECT_OF.match(answer, mention.end):
            continue
        if axis in ("side", "zone") and _PART_OF_A_NAME.match(answer, mention.end):
            continue
        slot = _Slot(answer, mention)
        for target in _targets(mention.concept, vocabulary, options):
            if target.name in named or (placed and target.name in _MIDLINE):
                continue
            changed = slot.filled(target)
            if changed is not None:
                yield Edit(changed, axis)


def _targets(
    concept: Concept, vocabulary: frozenset[str], options: tuple[str, str] | None
) -> tuple[Concept, ...]:
    """What may stand in for a concept: the question's other option, else what the data set talks about, else anything."""
    if options and concept.name in options:
        other = options[1 - options.index(concept.name)]
        return (CONCEPTS[other],) if other in CONCEPTS else ()
    return _usual(concept.name, vocabulary)


@lru_cache(maxsize=1024)
def _usual(name: str, vocabulary: frozenset[str]) -> tuple[Concept, ...]:
    concept = CONCEPTS[name]
    others = group_of(concept)
    if concept.axis == "state":
        others = tuple(other for other in others if other.name in _EXCLUSIVE_OPPOSITE.get(name, ()))
    return tuple(other for other in others if other.name in vocabulary) or others


class _Slot:
    """The place of a mention in an answer, which other concepts can take in its spelling, number, capitals and article."""

    def __init__(self, answer: str, mention: Mention) -> None:
        self._mention = mention
        self._surface = answer[mention.start : mention.end]
        self._before, self._after = answer[: mention.start], answer[mention.end :]
        self._many = is_plural(self._surface, mention)
        self._article = _ARTICLE.search(self._before)
        self._is_stated = _IS.search(self._before) is not None

    def filled(self, target: Concept) -> str | None:
        """The answer with the mention exchanged; None where the target would not fit."""
        surface, before, after, article = self._surface, self._before, self._after, self._article
        if surface in ("L", "R"):
            return before + ("R" if surface == "L" else "L") + after
        if target.name == "middle" and after.startswith(" lobe") and before.lower().endswith("left "):
            return None
        spelled = self._counterpart(target)
        if spelled is None:
            return None
        spelled = like(surface, plural(target, spelled) if self._many else spelled)
        if self._mention.concept.axis == "finding" and not article and self._is_stated:
            return before + with_article(spelled, bare=self._many or target.mass_noun) + after
        if article and not article.group(2):
            start = before[: article.start()]
            word = "" if target.mass_noun else ("an" if spelled[0].lower() in "aeiou" else "a")
            if article.group(1)[0].isupper():
                word, spelled = word.capitalize(), spelled if word else capitalise(spelled)
            return f"{start}{word} {spelled}{after}" if word else f"{start}{spelled}{after}"
        return before + spelled + after

    def _counterpart(self, target: Concept) -> str | None:
        """How the target is spelled in the place of the mention; None where it has no such form."""
        low = self._surface.lower()
        if (low, target.name) in _COUNTERPARTS:
            return _COUNTERPARTS[low, target.name]
        if low == "moderate" and self._graded in _GRADED:
            return "mild" if target.name == "small" else "severe"
        aligned = min(_ALIGNED_FORMS.get(target.group, 0), len(target.forms))
        return target.forms[self._mention.form if self._mention.form < aligned else 0]

    @cached_property
    def _graded(self) -> str | None:
        """The finding that a degree belongs to."""
        return next((m.concept.name for m in mentions(self._after) if m.concept.axis == "finding"), None)


# ---------------------------------------------------------------------- counts and overall statements


def _counts(answer: str) -> Iterator[Edit]:
    listed = [match.span() for match in _LISTED.finditer(answer)]
    for match in _COUNT.finditer(answer):
        if any(start <= match.start() < end for start, end in listed):
            continue
        spelled, ordinal = match.group(1), match.group(2)
        is_word = spelled.lower() in _NUMBER_NAMES
        value = _NUMBER_NAMES.index(spelled.lower()) if is_word else int(spelled)
        for other in (value + 1, value - 1):
            if other < 1 or (is_word and other >= len(_NUMBER_NAMES)):
                continue
            text = like(spelled, _NUMBER_NAMES[other]) if is_word else str(other)
            if ordinal:
                text += _ordinal(other)
            yield Edit(answer[: match.start()] + text + answer[match.end() :], "number")


def _ordinal(value: int) -> str:
    if 10 <= value % 100 <= 20:
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")


def _abnormal(answer: str, question: str, vocabulary: frozenset[str]) -> Iterator[Edit]:
    """ "No abnormality" → the name of a finding."""
    said = lexicon.facts(answer)
    if len(said) != 1 or said[0].finding != "abnormality" or said[0].present:
        return
    if len(lexicon.words(answer)) > _WHOLE_NORMAL_WORDS or lexicon.implied_polarity(question, "yes") is None:
        return
    findings = [concept for concept in CONCEPTS.values() if concept.axis == "finding"]
    usual = [concept for concept in findings if concept.name in vocabulary and concept.group != "device"]
    for concept in usual:
        end = "." if answer.endswith(".") else ""
        yield Edit(capitalise(concept.name) + end, "finding")
