"""Whether an edit of one place makes an answer wrong, or says the same of the image in other words.

changes_fact("No nodule identified.", "No nodule observed.")  -> False
changes_fact("Right upper lobe", "RUL")                       -> False
changes_fact("Meningioma", "Glioma")                          -> True

The lexicon has the say on its own words. Beyond it a word in the place of another one makes an answer wrong,
unless the two are known to mean the same, or the text denies the place before and after.
"""

from __future__ import annotations

import re
from collections import Counter

from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.word_lists import word_set

# Words with which a report says that it speaks of what is seen, and how sure it is.
_SEEING = lexicon.INTRODUCING | word_set("seeing")
_NEGATORS = word_set("negators")
_WELL = word_set("well")
_SUFFIXES = re.compile(r"(?<=\w{4})(?:ifications?|ified|ications?|ements?|ments?|ations?|ions?|ated|ed|ly)$")
_ALL_NORMAL = re.compile(
    r"\b(?:unremarkable|(?:no|not|without)(?: any| an)?(?: \w+)? (?:abnormality|abnormalities|abnormal))\b",
    re.IGNORECASE,
)
_NO_CHANGE = re.compile(r"\b(?:no|without)(?: \w+)? changes?\b", re.IGNORECASE)
_LISTED = re.compile(r"\b(?:or|nor)\b", re.IGNORECASE)


def changes_fact(reference: str, edited: str, question: str = "") -> bool:
    """Whether an edit makes the answer say something else than the reference.

    To leave a word out, or to add one, is none where the lexicon sees no contradiction in it: the answer says
    less, or more.

    Args:
        reference: reference answer.
        edited: the same but for one place.
        question: what was asked.
    """
    if lexicon.equivalent(reference, edited):
        return False
    # Also without the question, whose words excuse a candidate that repeats them, and no edit.
    if _contradicts(reference, edited, question) or _contradicts(reference, edited):
        return True
    before, after = _plain(reference), _plain(edited)
    at, old, new = _place(before.split(), after.split())
    if not old and not new:
        return False
    is_denied, is_denied_after = (_denies(text, at) for text in (before, after))
    if is_denied and is_denied_after:
        return False
    span, other = " ".join(old), " ".join(new)
    if lexicon.is_negated(span) != lexicon.is_negated(other):
        return not _is_well(*((span, other) if lexicon.is_negated(other) else (other, span)))
    if _contradicts(span, other):
        return True
    has_lengths = bool(lexicon.lengths(span) or lexicon.lengths(other))
    return not lexicon.abbreviates(span, other) and _replaces_a_word(before, after, has_lengths)


def _contradicts(reference: str, edited: str, question: str = "") -> bool:
    """Whether the lexicon sees a contradiction.

    A finding that the reference states in words unknown to the lexicon does not count as invented.
    """
    return any(
        conflict.kind != "invented" or _meaning(conflict.subject) not in _meanings(reference)
        for conflict in lexicon.contradictions(reference, edited, question)
    )


def _plain(text: str) -> str:
    """The text in one spelling: lengths in millimetres, one word for "nothing abnormal" or "no change"."""
    text = lexicon.in_millimetres(lexicon.canonical(text))
    return _NO_CHANGE.sub("unchanged", _ALL_NORMAL.sub("normal", text))


def _place(before: list[str], after: list[str]) -> tuple[int, list[str], list[str]]:
    """Number of the first word that differs, and the differing words of both; a number goes with its unit."""
    shortest = min(len(before), len(after))
    start = next((at for at in range(shortest) if before[at] != after[at]), shortest)
    end = next((at for at in range(shortest - start) if before[-1 - at] != after[-1 - at]), shortest - start)
    if end and before[len(before) - end].startswith("mm"):
        end -= 1
    return start, before[start : len(before) - end], after[start : len(after) - end]


def _denies(text: str, word: int) -> bool:
    """Whether the text denies one of its words.

    That is a word after a negation up to a comma, unless the commas belong to a list ("no effusion, nodule or
    mass").
    """
    places = [match.start() for match in re.finditer(r"\S+", text)]
    position = places[word] if word < len(places) else len(text)
    for start, end in lexicon.negated_spans(text):
        if not start <= position < max(end, start + 1):
            continue
        return "," not in text[start:position] or bool(_LISTED.search(text, start, end))
    return False


def _is_well(positive: str, negative: str) -> bool:
    """Whether the one says that all is well and the other only denies something: "stable", "no change"."""
    said = {word for word in lexicon.words(positive) if word in _WELL}
    return bool(said) and not said & set(lexicon.words(negative))


def _replaces_a_word(before: str, after: str, has_lengths: bool) -> bool:
    """Whether an unknown word was replaced by another, neither a verb of seeing nor a synonym."""
    wanted, given = _meanings(before), _meanings(after)
    lacking, added = wanted - given, given - wanted
    if has_lengths:
        # Lengths were compared as lengths.
        lacking, added = (
            Counter({name: count for name, count in names.items() if not _is_number(name)})
            for names in (lacking, added)
        )
    known = {
        _meaning(term.name) for text in (before, after) for term in lexicon.terms(text) if term.is_concept
    }
    return bool(lacking and added) and not {*lacking, *added} <= known


def _meanings(text: str) -> Counter[str]:
    return Counter(name for term in lexicon.terms(text) if (name := _meaning(term.name)))


def _meaning(name: str) -> str:
    """One name for all words of a meaning; none for a word of seeing or denying."""
    same = lexicon.synonym(name)
    if {name, same} & (_SEEING | _NEGATORS):
        return ""
    return _SUFFIXES.sub("", same)


def _is_number(name: str) -> bool:
    return name.replace(".", "", 1).isdigit()
