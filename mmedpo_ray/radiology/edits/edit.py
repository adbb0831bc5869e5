"""An edit of one fact; replaced words keep capitals, number and article of the text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmedpo_ray.radiology.lexicon.vocabulary import Concept, Mention
from mmedpo_ray.radiology.word_lists import load

# How far back words before a place are looked at.
NEAR = 64
_ACRONYMS = frozenset(load("edits")["acronyms"])
_PLURALS: dict[str, str] = load("edits")["plurals"]
_PLURAL_ENDINGS = ("ies", "ses", "xes", "ces", "wires", "fractures", "lymph nodes")
# Spellings that take an article although their concept takes none, and the other way round.
_COUNTED = re.compile(r"\b(?:heart|silhouette|mediastinum|liver|lymph node|bleed|subarachnoid)$")
_UNCOUNTED = re.compile(
    r"(?:iasis|itis|fluid|hydrothorax|disease|ischemia|infarction|infiltration|opacification|nodularity|"
    r"non-enhancing tumor|enhancing tumor|shift of midline structures|shift of the midline)$"
)
# "a unilateral effusion", "an NG tube": by the sound, not by the letter.
_SOUNDS_LIKE_A_CONSONANT = re.compile(r"(?:uni|use|uter|ureter|urin|eu|one)", re.IGNORECASE)
_NAMED_LETTER = re.compile(r"[AEFHILMNORSX][A-Z]+\b|[xX][- ]?ray|ng tube")


@dataclass(frozen=True)
class Edit:
    """A reference answer with one fact changed.

    Attributes:
        text: the new answer.
        axis: kind of fact that was changed.
    """

    text: str
    axis: str


def with_article(spelled: str, *, bare: bool) -> str:
    """The words with "a" or "an"; ``bare``: a mass noun or plural, which take none."""
    return spelled if bare else f"{article_of(spelled)} {spelled}"


def article_of(spelled: str) -> str:
    """ "a" or "an", by the sound with which the words begin."""
    if _NAMED_LETTER.match(spelled):
        return "an"
    vowel = spelled[:1].lower() in "aeiou" and not _SOUNDS_LIKE_A_CONSONANT.match(spelled)
    return "an" if vowel else "a"


def is_plural(surface: str, mention: Mention) -> bool:
    """Whether the text has the concept in its plural."""
    low = surface.lower()
    forms = mention.concept.forms
    is_regular = low == forms[mention.form] + "s" or (low.endswith("s") and low[:-1] in forms)
    return is_regular or low.endswith(_PLURAL_ENDINGS)


def is_bare(surface: str, mention: Mention) -> bool:
    """Whether the mention takes no article."""
    return is_plural(surface, mention) or is_uncounted(mention.concept, surface.lower())


def is_uncounted(concept: Concept, spelled: str) -> bool:
    """Whether a concept in this spelling (small letters) has neither article nor plural."""
    if concept.mass_noun:
        return _COUNTED.search(spelled) is None
    return _UNCOUNTED.search(spelled) is not None


def like(surface: str, spelled: str) -> str:
    """``spelled`` with the capitals of ``surface``; acronyms in capitals always ("CTs")."""
    first, _, rest = spelled.partition(" ")
    stem, hyphen, suffix = first.partition("-")
    acronym = stem.removesuffix("s")
    if acronym in _ACRONYMS:
        return acronym.upper() + stem[len(acronym) :] + hyphen + suffix + (f" {rest}" if rest else "")
    if len(surface) > 1 and surface.isupper() and surface.lower() not in _ACRONYMS:
        return spelled.upper()
    return capitalise(spelled) if surface[:1].isupper() and surface.lower() not in _ACRONYMS else spelled


def capitalise(text: str) -> str:
    """The text with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def uncapitalise(text: str) -> str:
    """The text with its first letter small, unless it begins with an acronym or a single capital."""
    return text if text[1:2].isupper() or not text[1:2].isalpha() else text[:1].lower() + text[1:]


def plural(concept: Concept, spelled: str) -> str:
    """The plural of a concept's spelling."""
    regular = spelled if spelled.endswith("s") or concept.mass_noun else spelled + "s"
    return _PLURALS.get(spelled, regular)
