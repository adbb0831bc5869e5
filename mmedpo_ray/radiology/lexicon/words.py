"""The words of an answer: which carry meaning, and its numbers.

A word is what stands between spaces and punctuation, in any script; in scripts that write without spaces
(Chinese, Japanese, Thai and their neighbours) every character is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from mmedpo_ray.radiology.lexicon.normalisation import is_letter
from mmedpo_ray.radiology.lexicon.vocabulary import mentions
from mmedpo_ray.radiology.word_lists import NUMBER_WORDS, word_set

# Texts whose words are kept.
_KEPT = 2048

# "<5" is another word than ">5", "-5" and "5".
_BOUND = r"(?:(?<![-=])[<>]=?(?=-?\d))?(?:(?<![\w)\]%°.-])-(?=\d))?"
_ASCII_WORD = re.compile(rf"{_BOUND}[a-z0-9]+(?:[./-][a-z0-9]+)*", re.IGNORECASE)
# Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
# Accents of their own, vowel points, signs of the scripts of India: they belong to the letter before them.
_MARKS = r"\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff"
_LETTER = rf"(?:[^\W_{_UNSPACED}]|[{_MARKS}])"
_ANY_WORD = re.compile(rf"[{_UNSPACED}]|{_BOUND}{_LETTER}+(?:[./-]{_LETTER}+)*")
_NUMBER = re.compile(
    r"(?<![\w.])(\d{1,3}|"
    + "|".join(NUMBER_WORDS)
    + r")(?:st|nd|rd|th)?(?![\w]|\.\d|\s*(?:%|cm|mm|ml|hu)\b|%)",
    re.IGNORECASE,
)
_FILLER = word_set("filler")


class Term(NamedTuple):
    """A word that carries meaning, or a concept, at a place of a text.

    Attributes:
        name: the word in small letters and singular, or the concept's name.
        start: where it begins.
        is_concept: whether the lexicon knows it.
    """

    name: str
    start: int
    is_concept: bool


@lru_cache(maxsize=_KEPT)
def words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers of a text, in order ("T2-weighted" is one)."""
    return tuple(_spelled(text))


@lru_cache(maxsize=_KEPT)
def content_words(text: str) -> frozenset[str]:
    """Content words: fillers removed, plurals folded, known spellings replaced by their concept's name."""
    pieces, position = [], 0
    for mention in mentions(text):
        pieces += [text[position : mention.start], " ", mention.concept.name, " "]
        position = mention.end
    pieces.append(text[position:])
    return frozenset(name for name, _ in _telling("".join(pieces)))


@lru_cache(maxsize=_KEPT)
def terms(text: str) -> tuple[Term, ...]:
    """The words that carry meaning, in order; a concept in any of its spellings is one."""
    found: list[Term] = []
    position = 0
    for mention in mentions(text):
        found += _terms_between(text, position, mention.start)
        found.append(Term(mention.concept.name, mention.start, is_concept=True))
        position = mention.end
    found += _terms_between(text, position, len(text))
    return tuple(found)


def _terms_between(text: str, start: int, end: int) -> list[Term]:
    return [Term(name, place, is_concept=False) for name, place in _telling(text, start, end)]


def _telling(text: str, start: int = 0, end: int | None = None) -> Iterator[tuple[str, int]]:
    """The words between two places that carry meaning, folded, each with its place."""
    for match in _word(text).finditer(text, start, len(text) if end is None else end):
        word = match.group().lower()
        name = "a" if word == "a" and is_letter(text, *match.span()) else folded(word)
        if name:
            yield name, match.start()


def _spelled(text: str) -> list[str]:
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return [word.lower() for word in _ANY_WORD.findall(text)]


def _word(text: str) -> re.Pattern[str]:
    # The one for ASCII is twice as fast.
    return _ASCII_WORD if text.isascii() else _ANY_WORD


@lru_cache(maxsize=16_384)
def folded(word: str) -> str:
    """A word in small letters in its singular, a number word in digits; nothing for a filler."""
    if word in _FILLER:
        return ""
    is_plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    singular = word
    if is_plural:
        singular = word[:-3] + "y" if len(word) > 4 and word.endswith("ies") else word[:-1]
    return str(NUMBER_WORDS.get(singular, singular))


@lru_cache(maxsize=_KEPT)
def numbers(text: str) -> frozenset[int]:
    """Counts and ordinals of a text, in digits or words; measurements with units are left out."""
    named = (match.group(1).lower() for match in _NUMBER.finditer(text))
    return frozenset(NUMBER_WORDS[name] if name in NUMBER_WORDS else int(name) for name in named)


# Words that only introduce what is said: to show it, to see it, to be more or less sure of it.
INTRODUCING = frozenset(map(folded, word_set("introducing")))
