"""Closed questions: yes or no, or one of the options that the question names."""

from __future__ import annotations

from mmedpo_ray.curate.lexicon import choices
from mmedpo_ray.evaluate.metrics.base import Answer
from mmedpo_ray.evaluate.metrics.words import contains_words, normalise, yes_or_no


def closed_correct(answer: Answer) -> bool:
    """Whether a closed question is answered correctly, judged on whole words.

    A yes/no question is decided by the first "yes" or "no" of the answer. A choice ("left or right?") is decided by the
    option named first. Otherwise the reference must occur as whole words.
    """
    expected = yes_or_no(answer.reference)
    if expected is not None:
        return yes_or_no(answer.prediction) == expected
    prediction, reference = normalise(answer.prediction), normalise(answer.reference)
    options = [normalise(option) for option in choices(answer.question) or ()]
    if any(contains_words(reference, option) for option in options):
        first = min(
            (option for option in options if contains_words(prediction, option)),
            key=lambda option: f" {prediction} ".index(f" {option} "),
            default=None,
        )
        return first is not None and contains_words(reference, first)
    return contains_words(prediction, reference)
