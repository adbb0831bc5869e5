"""BLEU of single answers, averaged over answers: what Med-VLM papers print as BLEU-1 to BLEU-4.

Source: LLaVA-Med's ``llava/eval/run_eval.py`` (commit ad758b6), from which the authors' other scripts come:
nltk's ``sentence_bleu`` without smoothing, on lower-cased words split at blanks. Its BLEU-1 and BLEU-4 are
the ones here. What it prints as 2 and 3 are the precisions of bigrams and of trigrams alone; here all four
are cumulative (weights 1/n), as papers define BLEU-n.

Without smoothing an answer without a common 4-gram has BLEU-4 0; so has an exact copy of fewer than four
words.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

from mmedpo_ray.metrics.answer_texts import prediction_text, reference_text, words
from mmedpo_ray.metrics.base import Answer, Metric, mean_of

ORDERS = (1, 2, 3, 4)
_WEIGHTS = [tuple([1 / order] * order) for order in ORDERS]
# Five metrics ask for the same answers one after the other.
_KEPT = 65_536


def sentence_bleu(order: int) -> Callable[[Answer], float]:
    """The score BLEU-``order`` of one answer, in [0, 1]."""
    return lambda answer: _scores(answer.reference, answer.prediction)[order - 1]


def mean_sentence_bleu(answer: Answer) -> float:
    """Mean of BLEU-1 to BLEU-4 of one answer."""
    scores = _scores(answer.reference, answer.prediction)
    return sum(scores) / len(scores)


@lru_cache(maxsize=_KEPT)
def _scores(reference: str, prediction: str) -> tuple[float, ...]:
    from nltk.translate import bleu_score

    expected, said = words(reference_text(reference)), words(prediction_text(prediction))
    with warnings.catch_warnings():
        # It warns of every answer without a common n-gram, whose score is 0.
        warnings.simplefilter("ignore")
        return tuple(float(score) for score in bleu_score.sentence_bleu([expected], said, weights=_WEIGHTS))


def _of_order(order: int) -> Metric:
    score = mean_of(sentence_bleu(order))
    return Metric(f"report_bleu{order}", f"report BLEU-{order} by answer", "report", score, role="detail")


BLEU_MEAN = Metric(
    "report_bleu_sentence",
    "report BLEU by answer (mean of 1–4)",
    "report",
    mean_of(mean_sentence_bleu),
    role="detail",
)
BLEU_1, BLEU_2, BLEU_3, BLEU_4 = map(_of_order, ORDERS)
