"""Scores of reports: corpus BLEU, ROUGE-L and the findings that both sides assert."""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from mmedpo_ray.metrics.answer_texts import prediction_text, reference_text
from mmedpo_ray.metrics.base import Answer, Array, Metric, is_empty, mean_of, micro_f1, per_answer
from mmedpo_ray.radiology.lexicon import facts, has_han
from mmedpo_ray.radiology.lexicon.normalisation import HAN

BLEU_ORDER = 4


def bleu_statistics(answer: Answer) -> Array:
    """n-gram matches and totals of orders 1–4, and both lengths, (10,), as sacrebleu counts them."""
    said, expected = prediction_text(answer.prediction), reference_text(answer.reference)
    # The sufficient statistics are not part of sacrebleu's public interface; a test compares the result with
    # its own.
    statistics = _bleu_scorer()._extract_corpus_statistics([said], [[expected]])[0]
    length, reference_length, *counts = statistics
    return np.array([*counts, length, reference_length], dtype=np.float64)


def bleu_value(sums: Array) -> Array:
    """Mean of corpus BLEU-1 to BLEU-4, each with the brevity penalty and no smoothing, in [0, 1]."""
    matches, totals = sums[..., :BLEU_ORDER], sums[..., BLEU_ORDER : 2 * BLEU_ORDER]
    length, reference_length = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_precision = np.log(np.where(totals > 0, matches / totals, 0.0))
        penalty = np.where(length < reference_length, np.exp(1 - reference_length / length), 1.0)
        orders = np.arange(1, BLEU_ORDER + 1)
        scores = np.exp(np.cumsum(log_precision, axis=-1) / orders)
    value = np.where(length > 0, penalty * scores.mean(axis=-1), 0.0)
    return np.where(reference_length > 0, value, np.nan)


def rouge_l(answer: Answer) -> float:
    """F-measure of the longest common subsequence of words, as rouge-score computes it without stemming."""
    score = _rouge_scorer().score(reference_text(answer.reference), prediction_text(answer.prediction))
    return float(score["rougeL"].fmeasure)


def finding_statistics(answer: Answer) -> Array:
    """Findings with side and zone: shared, in the answer only, in the reference only, and 1; (4,).

    An empty answer misses at least one: of a normal study it does not even say that it is normal. A Chinese
        reference does not count, as the lexicon reads findings in English alone.
    """
    if has_han(answer.reference):
        return np.zeros(4)
    stated, expected = _findings(answer.prediction), _findings(answer.reference)
    missed = len(expected - stated)
    if is_empty(answer.prediction):
        missed = max(missed, 1)
    return np.array([len(stated & expected), len(stated - expected), missed, 1], dtype=np.float64)


def finding_f1_value(sums: Array) -> Array:
    """Micro-averaged F1 of the findings; 1 if neither side asserts any."""
    return micro_f1(sums, empty=1.0)


def _findings(text: str) -> frozenset[tuple[str, str | None, str | None]]:
    return frozenset((fact.finding, fact.side, fact.zone) for fact in facts(text) if fact.present)


@cache
def _bleu_scorer():
    from sacrebleu import metrics

    return metrics.BLEU(lowercase=True)


class _Tokenizer:
    """The words of rouge-score's own tokenizer, which has none for Chinese, and each Chinese character."""

    _word = re.compile(rf"[a-z0-9]+|{HAN.pattern}")

    def tokenize(self, text: str) -> list[str]:
        return self._word.findall(text.lower())


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer())


FINDING_F1 = Metric(
    "report_finding_f1", "report finding F1", "report", per_answer(finding_statistics), finding_f1_value
)
ROUGE_L = Metric("report_rouge_l", "report ROUGE-L", "report", mean_of(rouge_l))
BLEU = Metric("report_bleu", "report BLEU (mean of 1–4)", "report", per_answer(bleu_statistics), bleu_value)
