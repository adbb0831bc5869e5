"""The words of an answer: which carry meaning, its first one as yes or no, its numbers, its marks of a leaked prompt."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

from mmedpo_ray.curate.terms import lowered, mentions

Polarity = Literal["yes", "no"]

# Texts whose words are kept.
_KEPT = 2048

_YES = re.compile(r"^\W*(yes|yeah|yep|true|correct)\b", re.IGNORECASE)
_NO = re.compile(r"^\W*(no|nope|none|false|incorrect)\b", re.IGNORECASE)
_WORD = re.compile(r"[a-z0-9]+(?:[./-][a-z0-9]+)*", re.IGNORECASE)
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
# Looked for in small letters.
_META = re.compile(
    r"<\s*image\s*>|\[/?inst\]|</?s>|^\s*-?\s*question\s*:|\b(?:user|assistant|human|gpt)\s*:"
    r"|\b(?:original answer|candidate ?answer ?\d*|as an? (?:ai|language model)|i(?:'m| am) (?:sorry|unable)|i cannot)\b",
    re.MULTILINE,
)


@lru_cache(maxsize=_KEPT)
def words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers of a text, in order ("T2-weighted" is one)."""
    return tuple(_spelled(text))


@lru_cache(maxsize=_KEPT)
def content_words(text: str) -> frozenset[str]:
    """The words that carry meaning: fillers left out, plurals folded, known spellings replaced by their concept's name."""
    pieces, position = [], 0
    for mention in mentions(text):
        pieces += [text[position : mention.start], " ", mention.concept.name, " "]
        position = mention.end
    pieces.append(text[position:])
    return frozenset(folded for word in _spelled("".join(pieces)) if (folded := _folded(word)))


def _spelled(text: str) -> list[str]:
    if text.isascii():
        return _WORD.findall(text.lower())
    return [word.lower() for word in _WORD.findall(text)]


def placed_content_words(text: str, start: int, end: int) -> list[tuple[str, int]]:
    """The words of ``text[start:end]`` that carry meaning, folded as in :func:`content_words`, each with its place."""
    found = ((_folded(match.group().lower()), match.start()) for match in _WORD.finditer(text, start, end))
    return [(word, place) for word, place in found if word]


@lru_cache(maxsize=16_384)
def _folded(word: str) -> str:
    """A word in its singular, a number word in digits; nothing for a filler."""
    if word in _FILLER:
        return ""
    is_plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    singular = word[:-1] if is_plural else word
    return str(_NUMBER_WORDS.get(singular, singular))


def is_meta_text(text: str) -> bool:
    """Whether the text talks about the task instead of the image: leaked prompts, role tags, refusals."""
    return _META.search(lowered(text)) is not None


def polarity(answer: str) -> Polarity | None:
    """Yes or no, by the first word of the answer; None where it starts otherwise ("Normal" is no "No")."""
    if _YES.match(answer):
        return "yes"
    return "no" if _NO.match(answer) else None


def numbers(text: str) -> frozenset[int]:
    """Counts and ordinals of a text, in digits or words; measurements with units are left out."""
    return frozenset(
        _NUMBER_WORDS[m.group(1).lower()] if m.group(1).lower() in _NUMBER_WORDS else int(m.group(1))
        for m in _NUMBER.finditer(text)
    )
