"""Writes a dispreferred answer by changing one fact of the reference: a side, a finding, a negation, a zone, a number.

What is left is word for word the reference, so that length and style give nothing away and the preference is about
the fact alone. Every edit is checked with the lexicon to conflict with the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mmedpo_ray.curate import lexicon
from mmedpo_ray.curate.terms import CONCEPTS, Concept, Mention, group_of, mentions

GENERATOR = "rule_edit"

_ACRONYMS = frozenset({"ct", "mri", "mr", "pet", "t1", "t2", "flair", "dwi", "pa", "ap", "copd"})
# Findings that have no side or zone; they do not stand in where one is stated.
_MIDLINE = frozenset(
    {"cardiomegaly", "pneumoperitoneum", "mediastinal widening", "interstitial lung disease"}
)
_EXCLUSIVE_OPPOSITE = {"normal": ("abnormal", "enlarged"), "enlarged": ("normal",), "abnormal": ("normal",)}
_POLARITY = re.compile(r"^(\W*)(yes|no)\b(.*)$", re.IGNORECASE | re.DOTALL)
_THERE_IS = re.compile(r"\b(there (?:is|are)) (?!no\b|not\b)(?:an? )?", re.IGNORECASE)
_THERE_IS_NO = re.compile(r"\b(there (?:is|are)) no ", re.IGNORECASE)
_AUXILIARY = re.compile(
    r"\b(is|are|was|were|does|do|has|have|appears?|shows?)\b(?! not\b)(?: no\b)?", re.IGNORECASE
)
_DENIAL = re.compile(r"(^|[.;]\s+)No ([^.;]+?)(?: or ([^.;]+?))?(?=[.;]|$)")
_STATEMENTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(the )(?:heart|cardiac) size is normal\b", re.IGNORECASE), r"\1heart is enlarged"),
    (
        re.compile(r"\b(the )heart is (?:normal|of normal size|normal in size)\b", re.IGNORECASE),
        r"\1heart is enlarged",
    ),
    (
        re.compile(r"\b(the )(?:heart|cardiac silhouette) is enlarged\b", re.IGNORECASE),
        r"\1heart size is normal",
    ),
)
_NUMBER_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_COUNT = re.compile(
    r"(?<![\w.])(\d{1,3}|"
    + "|".join(_NUMBER_NAMES)
    + r")(st|nd|rd|th)?(?![\w]|\.\d|\s*(?:%|cm|mm|ml|hu)\b|%)",
    re.IGNORECASE,
)
_WHOLE_NORMAL_WORDS = 4
# Groups whose concepts list this many spellings in the same order ("left-sided", "right-sided").
_ALIGNED_FORMS = {"side": 5, "modality": 3, "sequence": 3, "contrast": 2, "depth": 2, "axiality": 2}
# In running text other words hold sentences together ("the heart is …"), so only these are exchanged.
_SWAPPED_IN_REPORTS = frozenset({"finding", "side", "zone", "size"})
_SHORT_WORDS = 12


@dataclass(frozen=True)
class Edit:
    """A reference answer with one fact changed.

    Attributes:
        text: the new answer.
        axis: kind of fact that was changed.
    """

    text: str
    axis: str


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
    by_axis: dict[str, list[Edit]] = {}
    for edit in _all_edits(answer, question, vocabulary or frozenset(CONCEPTS)):
        by_axis.setdefault(edit.axis, []).append(edit)
    if "polarity" in by_axis:
        # A closed answer has one fact; everything behind it is comment.
        by_axis = {"polarity": by_axis["polarity"]}
    axes = sorted(by_axis)
    for axis_index in rng.permutation(len(axes)):
        edits = by_axis[axes[axis_index]]
        for index in rng.permutation(len(edits)):
            if _is_other(answer, edits[index].text, question):
                return edits[index]
    return None


def _is_other(answer: str, edited: str, question: str) -> bool:
    return not lexicon.equivalent(answer, edited) and bool(lexicon.conflicts(answer, edited, question))


def _all_edits(answer: str, question: str, vocabulary: frozenset[str]) -> Iterator[Edit]:
    yield from _polarity_edits(answer)
    yield from _swaps(answer, question, vocabulary)
    yield from _negations(answer)
    yield from _statements(answer)
    yield from _counts(answer)
    yield from _abnormal(answer, question, vocabulary)


# ---------------------------------------------------------------------- polarity and negation


def _polarity_edits(answer: str) -> Iterator[Edit]:
    if lexicon.polarity(answer) is None:
        return
    match = _POLARITY.match(answer)
    if match is None:
        return
    lead, word, rest = match.groups()
    if not rest.strip(" .") or rest.lstrip().startswith((",", ".", ";", ":", "-", "–")):
        other = _like(word, "no" if word.lower() == "yes" else "yes")
        yield Edit(lead + other + _negate(rest, deny=word.lower() == "yes"), "polarity")


def _negate(statement: str, *, deny: bool) -> str:
    """Turns the statement after "Yes," or "No," round; the bare polarity where its grammar is not known."""
    if not statement.strip(" ."):
        return statement
    if deny:
        changed, count = _THERE_IS.subn(r"\1 no ", statement, count=1)
        if not count:
            changed, count = _AUXILIARY.subn(r"\1 not", statement, count=1)
            if count and re.match(r".*\b(?:do|does|has|have|appears?|shows?) not\b", changed, re.I | re.S):
                count = 0
    else:
        changed, count = _THERE_IS_NO.subn(r"\1 ", statement, count=1)
        if not count:
            changed, count = re.subn(
                r"\b(is|are|was|were) not\b", r"\1", statement, count=1, flags=re.IGNORECASE
            )
    if count:
        return changed
    return "." if statement.rstrip().endswith(".") else ""


def _negations(answer: str) -> Iterator[Edit]:
    """ "There is a nodule" → "There is no nodule"; "No effusion or nodule" → "There is an effusion. No nodule"."""
    for match in _THERE_IS.finditer(answer):
        yield Edit(answer[: match.start()] + match.group(1) + " no " + answer[match.end() :], "negation")
    for match in _THERE_IS_NO.finditer(answer):
        yield Edit(answer[: match.start()] + match.group(1) + " " + answer[match.end() :], "negation")
    if len(lexicon.words(answer)) <= _WHOLE_NORMAL_WORDS:
        return
    for match in _DENIAL.finditer(answer):
        lead, first, second = match.groups()
        for claimed, denied in ((first, second), (second, first)):
            named = mentions(claimed) if claimed else ()
            if len(named) != 1 or named[0].concept.axis != "finding":
                continue
            claim = f"There is {_with_article(claimed, named[0].concept)}"
            text = lead + claim + (f". No {denied}" if denied else "")
            yield Edit(answer[: match.start()] + text + answer[match.end() :], "negation")


def _statements(answer: str) -> Iterator[Edit]:
    for pattern, replacement in _STATEMENTS:
        changed, count = pattern.subn(replacement, answer, count=1)
        if count:
            yield Edit(changed, "finding")


# ---------------------------------------------------------------------- swaps


def _swaps(answer: str, question: str, vocabulary: frozenset[str]) -> Iterator[Edit]:
    found = mentions(answer)
    named = {mention.concept.name for mention in found}
    options = lexicon.choices(question)
    placed = any(mention.concept.axis in ("side", "zone") for mention in found)
    is_short = len(lexicon.words(answer)) <= _SHORT_WORDS
    for mention in found:
        if not is_short and mention.concept.axis not in _SWAPPED_IN_REPORTS:
            continue
        for target in _targets(mention.concept, vocabulary, options):
            if target.name in named or (placed and target.name in _MIDLINE):
                continue
            yield Edit(_replace(answer, mention, target), mention.concept.axis)


def _targets(
    concept: Concept, vocabulary: frozenset[str], options: tuple[str, str] | None
) -> tuple[Concept, ...]:
    """What may stand in for a concept: the question's other option, else what the data set talks about, else anything."""
    if options and concept.name in options:
        other = options[1 - options.index(concept.name)]
        return (CONCEPTS[other],) if other in CONCEPTS else ()
    others = group_of(concept)
    if concept.axis == "state":
        others = tuple(other for other in others if other.name in _EXCLUSIVE_OPPOSITE.get(concept.name, ()))
    usual = tuple(other for other in others if other.name in vocabulary)
    return usual or others


def _replace(answer: str, mention: Mention, target: Concept) -> str:
    """The answer with one mention exchanged, in its spelling, number, capitals and article."""
    surface = answer[mention.start : mention.end]
    before, after = answer[: mention.start], answer[mention.end :]
    if surface in ("L", "R"):
        return before + ("R" if surface == "L" else "L") + after
    index = mention.form if mention.form < _ALIGNED_FORMS.get(target.group, 0) else 0
    spelled = target.forms[index]
    is_plural = surface.lower() == mention.concept.forms[mention.form] + "s"
    if is_plural and not spelled.endswith("s") and not target.mass_noun:
        spelled += "s"
    spelled = _like(surface, spelled)
    article = re.search(r"\b(an?) ((?:\w+ )*)$", before, re.IGNORECASE)
    if mention.concept.axis == "finding" and not article and re.search(r"\b(?:is|shows?) $", before):
        return before + (_with_article(spelled, target) if not is_plural else spelled) + after
    if article and not article.group(2):
        start = before[: article.start()]
        word = "" if target.mass_noun else ("an" if spelled[0].lower() in "aeiou" else "a")
        if article.group(1)[0].isupper():
            word, spelled = word.capitalize(), spelled if word else _capitalise(spelled)
        return f"{start}{word} {spelled}{after}" if word else f"{start}{spelled}{after}"
    return before + spelled + after


def _with_article(spelled: str, concept: Concept) -> str:
    if concept.mass_noun:
        return spelled
    return f"{'an' if spelled[0].lower() in 'aeiou' else 'a'} {spelled}"


def _like(surface: str, spelled: str) -> str:
    """``spelled`` with the capitals of ``surface``; acronyms in capitals always."""
    first, _, rest = spelled.partition(" ")
    stem, hyphen, suffix = first.partition("-")
    if stem in _ACRONYMS:
        return stem.upper() + hyphen + suffix + (f" {rest}" if rest else "")
    if len(surface) > 1 and surface.isupper() and surface.lower() not in _ACRONYMS:
        return spelled.upper()
    return _capitalise(spelled) if surface[:1].isupper() and surface.lower() not in _ACRONYMS else spelled


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------- counts and overall statements


def _counts(answer: str) -> Iterator[Edit]:
    for match in _COUNT.finditer(answer):
        spelled, ordinal = match.group(1), match.group(2)
        is_word = spelled.lower() in _NUMBER_NAMES
        value = _NUMBER_NAMES.index(spelled.lower()) if is_word else int(spelled)
        for other in (value + 1, value - 1):
            if other < 1 or (is_word and other >= len(_NUMBER_NAMES)):
                continue
            text = _like(spelled, _NUMBER_NAMES[other]) if is_word else str(other)
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
        yield Edit(_capitalise(concept.name) + end, "finding")
