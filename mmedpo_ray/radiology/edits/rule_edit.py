"""Writes a dispreferred answer: one fact of the reference changed (side, finding, negation, zone, number).

What is left is word for word the reference, so that length and style give nothing away and the preference is
about the fact alone. Every edit is checked with the lexicon to make the answer wrong: a wider word ("mass"
for "cancer") does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain

import numpy as np

from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.edits.changed_fact import changes_fact
from mmedpo_ray.radiology.edits.closed_answers import polarity_edits
from mmedpo_ray.radiology.edits.edit import NEAR, Edit, like
from mmedpo_ray.radiology.edits.negation import bare_denial_edits, negation_edits
from mmedpo_ray.radiology.edits.normality import abnormality_edits, clear_lung_edits, statement_edits
from mmedpo_ray.radiology.edits.swaps import MIDLINE, swap_edits
from mmedpo_ray.radiology.lexicon.vocabulary import CONCEPTS, mentions
from mmedpo_ray.radiology.word_lists import NUMBER_WORDS

GENERATOR = "rule_edit"

_NUMBER_NAMES = tuple(NUMBER_WORDS)
_COUNT = re.compile(
    r"(?<![\w./])(\d{1,3}|"
    + "|".join(_NUMBER_NAMES)
    + r")(st|nd|rd|th)?(?![\w/]|\.\d|\s*(?:%|cm|mm|ml|hu)\b|%|"
    r"[\s-]*(?:second|minute|hour|day|week|month|year)s?\b)",
    re.IGNORECASE,
)
# "1. Effusion. 2. Nodule.": the number of a list's item is no count.
_LISTED = re.compile(r"(?:^|[.;:\n]\s*)\d{1,3}[.)]\s")
_NO_COUNT_OF = re.compile(r"\s+(?:views?|images?|projections?|films?|y/?o|yrs?)\b|-\d", re.IGNORECASE)
_NUMBERED = re.compile(
    r"(?:\b(?:image|series|slice|page|phase|number|figure|no)s?\.? #?|-|#)$", re.IGNORECASE
)
_ONE_THING = re.compile(r"\s+[a-z]", re.IGNORECASE)
_SHORT_LETTERS = 64
# Words in capitals ("L" and "R" are sides by being capitals), and where a sentence begins.
_SIDE_CAPITAL = re.compile(r"[^\W_]+")
_SENTENCE_BEGIN = re.compile(r"(?:^|[.;:!?\n]\s+)[^\W\d_]")
_EVERYTHING = frozenset(CONCEPTS)


def vocabulary_of(texts: Iterable[str]) -> frozenset[str]:
    """Names of the concepts that occur in the texts: what is plausible in this data set."""
    return frozenset(mention.concept.name for text in texts for mention in mentions(text))


def rule_edit(
    answer: str, question: str, rng: np.random.Generator, vocabulary: frozenset[str] | None = None
) -> Edit | None:
    """Changes one fact of an answer, drawn evenly over its kinds of fact; None if it has none we know.

    Args:
        answer: reference answer.
        question: what was asked; the other option of an "A or B" question is the edit there.
        rng: source of randomness; the same state gives the same edit.
        vocabulary: concepts to prefer as replacements, see :func:`vocabulary_of`.
    """
    known = vocabulary or _EVERYTHING
    if answer.isupper() and " " in answer:
        return _shouted(answer, question, rng, known)
    return _drawn_edit(answer, question, rng, known)


def _drawn_edit(
    answer: str, question: str, rng: np.random.Generator, vocabulary: frozenset[str]
) -> Edit | None:
    find = _edits_of_short if len(answer) <= _SHORT_LETTERS else _edits
    by_axis = find(answer, question, vocabulary)
    last = chain(clear_lung_edits(answer, _lung_findings(vocabulary)), bare_denial_edits(answer))
    return _first_fitting(answer, question, _drawn(by_axis, rng)) or _first_fitting(answer, question, last)


def _shouted(answer: str, question: str, rng: np.random.Generator, vocabulary: frozenset[str]) -> Edit | None:
    """The edit of an answer in capitals, made as for ordinary letters and put in capitals again."""
    small = _SENTENCE_BEGIN.sub(lambda begin: begin.group().upper(), _SIDE_CAPITAL.sub(_lower, answer))
    if small.upper() != answer:
        return None
    found = _drawn_edit(small, question, rng, vocabulary)
    if found is None:
        return None
    # "R ct" has a side, "R CT" may be anything.
    return _first_fitting(answer, question, [Edit(found.text.upper(), found.axis)])


def _lower(match: re.Match[str]) -> str:
    return match.group() if match.group() in ("L", "R") else match.group().lower()


def _drawn(by_axis: dict[str, Iterable[Edit]], rng: np.random.Generator) -> Iterator[Edit]:
    axes = sorted(by_axis)
    for axis_index in rng.permutation(len(axes)):
        edits = list(by_axis[axes[axis_index]])
        for index in rng.permutation(len(edits)):
            yield edits[index]


def _first_fitting(answer: str, question: str, edits: Iterable[Edit]) -> Edit | None:
    """The first edit that makes the answer wrong in exactly one fact, else the first that makes it wrong."""
    second_best: list[Edit] = []
    for edit in edits:
        if lexicon.equivalent(answer, edit.text):
            continue
        found = lexicon.conflicts(answer, edit.text, question)
        if _is_one_fact(found):
            # A wider word for the same finding conflicts too, and is not wrong.
            if changes_fact(answer, edit.text, question):
                return edit
        elif found:
            second_best.append(edit)
    return next((edit for edit in second_best if changes_fact(answer, edit.text, question)), None)


def _is_one_fact(found: tuple[lexicon.Conflict, ...]) -> bool:
    # Another finding in its place is one edit but two conflicts: one missed, one invented.
    return len(found) == 1 or sorted(conflict.kind for conflict in found) == ["invented", "missed"]


def _edits(answer: str, question: str, vocabulary: frozenset[str]) -> dict[str, Iterable[Edit]]:
    """All edits by kind of fact; those of a kind are made when it is drawn, except the first."""
    # A closed answer has one fact; everything behind it is comment.
    if closed := list(polarity_edits(answer)):
        return {"polarity": closed}
    makers: dict[str, list[Iterable[Edit]]] = {
        axis: [edits] for axis, edits in swap_edits(answer, question, vocabulary).items()
    }
    makers["negation"], makers["number"] = [negation_edits(answer)], [_counts(answer)]
    for edit in statement_edits(answer):
        makers.setdefault(edit.axis, []).append([edit])
    makers.setdefault("finding", []).append(abnormality_edits(answer, question, vocabulary))
    by_axis: dict[str, Iterable[Edit]] = {}
    for axis, edits in makers.items():
        made = chain.from_iterable(edits)
        if (first := next(made, None)) is not None:
            by_axis[axis] = chain([first], made)
    return by_axis


@lru_cache(maxsize=1024)
def _edits_of_short(answer: str, question: str, vocabulary: frozenset[str]) -> dict[str, Iterable[Edit]]:
    """Short answers repeat in a data set; the edits of one take a few kilobytes."""
    return {axis: list(edits) for axis, edits in _edits(answer, question, vocabulary).items()}


def _lung_findings(vocabulary: frozenset[str]) -> list[tuple[str, bool]]:
    return [
        (name, CONCEPTS[name].mass_noun)
        for name in sorted(lexicon.LUNG_FINDINGS & vocabulary or lexicon.LUNG_FINDINGS)
        if name not in MIDLINE
    ]


# ---------------------------------------------------------------------- counts


def _counts(answer: str) -> Iterator[Edit]:
    listed = [match.span() for match in _LISTED.finditer(answer)]
    for match in _COUNT.finditer(answer):
        if any(start <= match.start() < end for start, end in listed):
            continue
        if _NO_COUNT_OF.match(answer, match.end()) or _NUMBERED.search(
            answer, max(0, match.start() - NEAR), match.start()
        ):
            continue
        spelled, ordinal = match.group(1), match.group(2)
        counts_things = not ordinal and _ONE_THING.match(answer, match.end()) is not None
        is_word = spelled.lower() in _NUMBER_NAMES
        value = _NUMBER_NAMES.index(spelled.lower()) if is_word else int(spelled)
        for other in (value + 1, value - 1):
            if other < 1 or (is_word and other >= len(_NUMBER_NAMES)):
                continue
            if counts_things and 1 in (value, other):
                # One thing has another noun and verb than two.
                continue
            text = like(spelled, _NUMBER_NAMES[other]) if is_word else str(other)
            if ordinal:
                text += _ordinal(other)
            yield Edit(answer[: match.start()] + text + answer[match.end() :], "number")


def _ordinal(value: int) -> str:
    if 10 <= value % 100 <= 20:
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
