"""The two texts of an answer as the n-gram metrics take them."""

from __future__ import annotations

from mmedpo_ray.metrics.answer_words import spaced
from mmedpo_ray.metrics.base import is_empty


def prediction_text(prediction: str) -> str:
    """The final answer with blanks around Chinese characters; nothing where it has no word: "." matches no full stop."""
    return "" if is_empty(prediction) else spaced(prediction)


def reference_text(reference: str) -> str:
    """The reference with blanks around Chinese characters."""
    return spaced(reference)


def words(text: str) -> list[str]:
    """What stands between blanks, in lower case; punctuation stays, as in nltk's and pycocoevalcap's plain use."""
    return text.lower().split()
