"""The same characters for the same signs, and the answer without the thinking before it.

    same_characters("T2‑weighted, 5–10 ｍｍ。") -> "T2-weighted, 5-10 mm."
    final_answer("<think>No nodule on the left.</think> Yes") -> "Yes"

Only spellings change, never what is said: numbers, signs, units and letters stay.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from mmedpo_ray.radiology.word_lists import word_set

_KEPT = 4096

_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\ufe58\ufe63", "-"),
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u2035\u02bc\u02b9`\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\u300c\u300d\u300e\u300f", '"'),
        **dict.fromkeys("\u2044\u2215", "/"),
        **dict.fromkeys("\u00d7\u2715\u2a2f", "x"),
        **dict.fromkeys("\u2248\u223c\u301c", "~"),
        **dict.fromkeys("\u2264\u2266\u2a7d", "<="),
        **dict.fromkeys("\u2265\u2267\u2a7e", ">="),
        **dict.fromkeys("\u3001", ","),
        **dict.fromkeys("\u3002\uff61", "."),
        **dict.fromkeys("\u2192\u21d2\u2190\u21d0", " "),
        "\u02da": "°",
    }
)
# Zero-width characters, marks of direction, soft hyphens, byte order marks.
_INVISIBLE = re.compile("[\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufe00-\ufe0f]")
# What NFKC would join to the number before it: a power, a fraction, the ordinal sign that stands for degrees.
_POWER = re.compile(r"(?<=\d)(?=[\u2070\u00b9\u00b2\u00b3\u2074-\u2079])")
_VULGAR_FRACTION = re.compile(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])")
_DEGREE = re.compile(r"(?<=\d)\s?\u00ba")
_DECIMAL_DOT = re.compile(r"(?<=\d)\u00b7(?=\d)")

_TAG = r"(?:think|thinking|thought|thoughts|reasoning|reason|reflection|analysis)"
_THOUGHT = re.compile(
    rf"<\s*{_TAG}\s*>.*?(?:<\s*/\s*{_TAG}\s*>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)|◁think▷.*?(?:◁/think▷|\Z)"
    r"|<\|begin_of_thought\|>.*?(?:<\|end_of_thought\|>|\Z)",
    re.IGNORECASE | re.DOTALL,
)
# Where the chat template itself opens the block, only its end is in the answer.
_END_OF_THOUGHT = re.compile(
    rf"\A.*(?:<\s*/\s*{_TAG}\s*>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>)", re.IGNORECASE | re.DOTALL
)
_TAGGED_ANSWER = re.compile(r"<\s*answer\s*>(.*?)(?:<\s*/\s*answer\s*>|\Z)", re.IGNORECASE | re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_TEXT_COMMAND = re.compile(r"\\text(?:bf|it|rm)?\s*\{([^{}]*)\}")


@lru_cache(maxsize=_KEPT)
def same_characters(text: str) -> str:
    """The text with one character for each sign: NFKC, one hyphen, one quote, no invisible characters.

    ASCII text comes back as it is, but for the grave accent, which stands for a quote.
    """
    if text.isascii():
        return text.replace("`", "'")
    text = _INVISIBLE.sub("", text)
    text = _DECIMAL_DOT.sub(".", _DEGREE.sub("°", text))
    text = _VULGAR_FRACTION.sub(" ", _POWER.sub("^", text))
    # Before NFKC, which makes a blank and an accent of some quotes, and after it, for full-width signs.
    return unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS)


def final_answer(text: str) -> str:
    """The final answer of a model: without thought blocks, from ``<answer>`` or ``\\boxed{…}`` if it has one.

    A block that never ends is all thought, so nothing is left of it.
    """
    if "<" in text or "[" in text or "◁" in text:
        text = _END_OF_THOUGHT.sub("", _THOUGHT.sub(" ", text))
        tagged = _TAGGED_ANSWER.findall(text)
        text = tagged[-1] if tagged else text
    if "\\boxed" in text:
        boxed = _BOXED.findall(text)
        text = _TEXT_COMMAND.sub(r"\1", boxed[-1]) if boxed else text
    return text.strip()


def has_han(text: str) -> bool:
    """Whether the text has Chinese characters."""
    return not text.isascii() and HAN.search(text) is not None


HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


# ---------------------------------------------------------------------- "a" as a letter

# After these an "a" names a kind: hepatitis a, vitamin a, group a.
_KINDS = word_set("kinds")
# No noun begins with these, so an "a" before them is none of its articles.
_NO_NOUNS = word_set("no_nouns")
_WORD_BEFORE = re.compile(r"([^\W_]+)[^\w]*\Z")
_NOUN_AFTER = re.compile(r"\s+[(\"']?([^\W_]+)")
_BEGINS = re.compile(r"(?:\A|[.!?:;\n])[^\w]*\Z")


def is_letter(text: str, start: int, end: int) -> bool:
    """Whether the "a" at ``text[start:end]`` names something: "hepatitis A", "A) MRI", the answer "A".

    Otherwise it is an article, as in "a mass". A capital that begins no sentence is a letter, except
    in a headline.
    """
    noun = _NOUN_AFTER.match(text, end)
    if noun is None or noun.group(1).casefold() in _NO_NOUNS:
        return True
    before = _WORD_BEFORE.search(text[:start])
    if before is not None and before.group(1).casefold() in _KINDS:
        return True
    if text[start:end] == "a" or not any(letter.islower() for letter in text):
        return False
    return _BEGINS.search(text[:start]) is None and not noun.group(1)[0].isupper()
