"""Open questions: equality and shared words."""

from __future__ import annotations

from collections import Counter

from mmedpo_ray.evaluate.metrics.base import Answer
from mmedpo_ray.evaluate.metrics.words import normalise


def exact_match(answer: Answer) -> bool:
    """Whether both sides are equal after :func:`normalise`."""
    return normalise(answer.prediction) == normalise(answer.reference)


def token_f1(answer: Answer) -> float:
    """Harmonic mean of precision and recall of the words, with repetition (SQuAD); 1 where both sides are empty."""
    prediction, reference = normalise(answer.prediction).split(), normalise(answer.reference).split()
    if not prediction or not reference:
        return float(prediction == reference)
    common = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * common / (len(prediction) + len(reference))
