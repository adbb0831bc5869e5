"""Open questions: equality and shared words."""

from __future__ import annotations

from collections import Counter

from mmedpo_ray.metrics.base import Answer, Metric, mean_of
from mmedpo_ray.radiology.lexicon import final_answer
from mmedpo_ray.radiology.lexicon.tokens import same_text, tokens


def exact_match(answer: Answer) -> bool:
    """Whether both sides have the same tokens in the same order."""
    return same_text(final_answer(answer.prediction), answer.reference)


def token_f1(answer: Answer) -> float:
    """F1 of the tokens, with repetition (as SQuAD counts them); 1 for equal answers."""
    text = final_answer(answer.prediction)
    prediction, reference = tokens(text), tokens(answer.reference)
    if not prediction or not reference:
        return float(same_text(text, answer.reference))
    common = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * common / (len(prediction) + len(reference))


EXACT_MATCH = Metric("open_exact", "open exact match", "open", mean_of(exact_match))
TOKEN_F1 = Metric("open_f1", "open token F1", "open", mean_of(token_f1))
