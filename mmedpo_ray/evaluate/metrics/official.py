"""The rules of the paper's scripts, for comparison with published figures only."""

from __future__ import annotations

from collections import Counter

from mmedpo_ray.evaluate.metrics.base import Answer
from mmedpo_ray.evaluate.metrics.words import normalise

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}


def closed_correct_official(answer: Answer) -> bool:
    """The paper's rule: the reference is a substring of the answer."""
    return answer.reference.strip().lower() in answer.prediction.lower()


def recall_official(answer: Answer) -> float:
    """Recall as in the scripts of LLaVA-Med: a word of the reference counts as often as the *answer* repeats it."""
    prediction = Counter(_official_words(answer.prediction))
    reference = Counter(_official_words(answer.reference))
    if not prediction or not reference:
        return 0.0
    hits = sum(count for word, count in prediction.items() if word in reference)
    misses = sum(count for word, count in reference.items() if word not in prediction)
    return hits / (hits + misses)


def _official_words(text: str) -> list[str]:
    return [_NUMBERS.get(word, word) for word in normalise(text).split()]
