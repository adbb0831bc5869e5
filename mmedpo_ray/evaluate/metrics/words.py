"""The words of an answer as the metrics compare them."""

from __future__ import annotations

import re
import string

_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks (the normalisation of SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def yes_or_no(text: str) -> str | None:
    """The first of the words yes and no, in lower case; ``None`` without either."""
    found = _YES_NO.search(text)
    return found.group(1).lower() if found else None


def contains_words(text: str, words: str) -> bool:
    """Whether ``words`` occurs in ``text`` as whole words in a row."""
    return bool(words) and f" {words} " in f" {text} "
