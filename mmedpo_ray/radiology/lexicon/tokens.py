"""The tokens by which answers are compared: numbers, signs, units and single letters count.

tokens("The T2-weighted scan, 5–10 mm") -> ["t2", "weighted", "scan", "5", "-", "10", "mm"]
tokens("<5 mm")                         -> ["<5", "mm"]
tokens("Hepatitis A")                   -> ["hepatitis", "a"], but tokens("A mass") -> ["mass"]
tokens("左肺。")                         -> ["左", "肺"]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from mmedpo_ray.radiology.lexicon.normalisation import HAN, is_letter, same_characters
from mmedpo_ray.radiology.word_lists import NUMBER_WORDS

_KEPT = 8192
_HAN = HAN.pattern[1:-1]

_UNITS = (
    "mm|cm|dm|m|km|um|μm|nm|ml|dl|cl|l|cc|g|kg|mg|mcg|μg|ug|ng|pg|gy|cgy|sv|msv|hu|hz|khz|mhz|ghz|t|mmhg|kpa|kv|kvp|ma|mas|"
    "s|sec|secs|ms|min|mins|h|hr|hrs|d|wk|wks|mo|mos|yo|y|yr|yrs|year|years|month|months|week|weeks|day|days|hour|hours|iu|"
    "mmol|mol|mm[23]|cm[23]|m[23]|bpm|f|c|x"
)
_RESPELLED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"&", " and "),
        (r"\+\s?/\s?-", "±"),
        (r"(?<=\w)'(?=\w)|(?<=s)'(?!\w)", ""),
        (r"(?<=[a-z])\^(?=[23]\b)", ""),
        # 5x3 is 5 x 3, and 3cm is 3 cm.
        (r"(?<=\d)\s*x\s*(?=\d)", " x "),
        (rf"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)(?=(?:{_UNITS})(?![a-z\d]))", r"\1 "),
        # A range in Chinese; elsewhere ~ means about.
        (r"(?<=\d)\s*~\s*(?=\d)", "-"),
    )
)
# 1,000 is 1000, but "1, 2" and "1,5" are not one number; C.T. is CT.
_JOINED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|\b(?:[A-Za-z]\.){2,}(?:[A-Za-z]\b)?")
_NUMBER = r"(?:\d+(?:\.\d+)*|\.\d+)(?![^\W\d_])"
_TOKEN = re.compile(
    # What stands between two digits is part of what they mean: 5-10, 1/2, 1:2, 10^3.
    r"(?<=\d)(?P<between>\s*[-/:^+]\s*)(?=\d)"
    # A number with its sign. A hyphen after a word, and the head of an arrow, are no signs.
    rf"|(?P<sign>(?:(?<![-=])[<>]=?\s*)?[~±]?\s*(?:(?<![\w)\]%°.-])[-+])?)(?P<number>{_NUMBER})"
    rf"|(?P<han>[{_HAN}])"
    rf"|(?P<word>[^\W_{_HAN}]+)"
    # HER2+, (+), (-), ER-.
    r"|(?P<plus>(?<=[^\W_])\++(?![\w+])|(?<=\()\++(?=\))|(?<=\()-+(?=\))|(?<=[A-Z\d])-+(?=$|[,;.)\]/]))"
    r"|(?P<alone>(?<=[A-Z\d]\s)[+-]+(?=\s*(?:$|[,;.)\]]))|(?<=\s)[<>]=?(?=\s+[^\W\d])|[↑↓])"
    r"|(?P<unit>[%°])"
)
_ARTICLES = frozenset({"an", "the"})


@lru_cache(maxsize=_KEPT)
def tokens(text: str) -> list[str]:
    """Words in small letters without articles; numbers with their sign; every Chinese character by itself.

    Hyphens, slashes and other separators part words and join nothing, but between two digits they are kept.
    "A" is an article only where it stands before a noun. Number words up to twelve are digits, 05 is 5 and
    5.0 is 5. A text of articles alone keeps them. The list is shared: do not change it.
    """
    text = _respelled(same_characters(text))
    found: list[str] = []
    articles: list[str] = []
    for match in _TOKEN.finditer(text):
        token = _spelled(match)
        is_article = token in _ARTICLES or (token == "a" and not is_letter(text, *match.span()))
        (articles if is_article else found).append(token)
    return found or articles


def _respelled(text: str) -> str:
    text = _JOINED.sub(lambda match: match.group().replace(",", "").replace(".", ""), text)
    for pattern, replacement in _RESPELLED:
        text = pattern.sub(replacement, text)
    return text


def _spelled(match: re.Match[str]) -> str:
    if match["number"]:
        return "".join(match["sign"].split()) + _plain(match["number"])
    token = match.group().strip().casefold()
    return str(NUMBER_WORDS.get(token, token))


def _plain(number: str) -> str:
    """05 as 5, 5.0 as 5, .5 as 0.5; a version such as 1.2.3 as it is."""
    whole, _, rest = number.partition(".")
    if "." in rest:
        return number
    whole, rest = whole.lstrip("0") or "0", rest.rstrip("0")
    return f"{whole}.{rest}" if rest else whole


def contains(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether ``wanted`` stands in ``words`` in a row; never where nothing is wanted."""
    size = len(wanted)
    return size > 0 and any(
        list(words[start : start + size]) == list(wanted) for start in range(len(words) - size + 1)
    )


def same_text(first: str, second: str) -> bool:
    """Whether two texts have the same tokens; of two without any, whether their characters are the same."""
    left, right = tokens(first), tokens(second)
    if left or right:
        return left == right
    return same_characters(first).split() == same_characters(second).split()
