"""Scores of answers, each as sums that can be added over images.

A metric turns one answer into a few numbers (its *statistics*: hits and trials, n-gram matches, …) and the sum of these
over any set of answers into a value. So the same code gives the value of the whole test set and of every bootstrap
resample of it, also for scores that are no means (BLEU of a corpus, micro-averaged F1).

    metric = METRICS["closed_accuracy"]
    metric.value(sum(metric.statistics(answer) for answer in answers))

The ``*_official`` metrics repeat the rules of the paper's scripts for comparison with published figures only: a substring
rule for closed questions ("no" is in "normal") and a recall that counts repeated words.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from mmedpo_ray.curate.lexicon import choices, facts

Array = np.ndarray

BLEU_ORDER = 4
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Attributes:
        reference: reference answer.
        prediction: the model's answer.
        question: as it was asked; closed questions between two options are read from it.
    """

    reference: str
    prediction: str
    question: str = ""


@dataclass(frozen=True)
class Metric:
    """A score.

    Attributes:
        name: its key in ``summary.json``.
        label: its name in tables.
        answer_type: closed, open or report: the answers it is about.
        statistics: one answer → (K,) float.
        value: sums of statistics (…, K) → (…) values in [0, 1]; NaN where nothing was counted.
        official: kept for comparison with published figures only.
    """

    name: str
    label: str
    answer_type: str
    statistics: Callable[[Answer], Array]
    value: Callable[[Array], Array]
    official: bool = False


# ---------------------------------------------------------------------- words


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks (the normalisation of SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def yes_or_no(text: str) -> str | None:
    """The first of the words yes and no, in lower case; ``None`` without either."""
    found = _YES_NO.search(text)
    return found.group(1).lower() if found else None


def _contains_words(text: str, words: str) -> bool:
    """Whether ``words`` occurs in ``text`` as whole words in a row."""
    return bool(words) and f" {words} " in f" {text} "


# ---------------------------------------------------------------------- closed questions


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
    if any(_contains_words(reference, option) for option in options):
        first = min(
            (option for option in options if _contains_words(prediction, option)),
            key=lambda option: f" {prediction} ".index(f" {option} "),
            default=None,
        )
        return first is not None and _contains_words(reference, first)
    return _contains_words(prediction, reference)


def closed_correct_official(answer: Answer) -> bool:
    """The paper's rule: the reference is a substring of the answer."""
    return answer.reference.strip().lower() in answer.prediction.lower()


# ---------------------------------------------------------------------- open questions


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


# ---------------------------------------------------------------------- reports


def bleu_statistics(answer: Answer) -> Array:
    """n-gram matches and totals of orders 1–4 and both lengths, (10,), as sacrebleu counts them."""
    bleu = _bleu_scorer()
    # The sufficient statistics are not part of sacrebleu's public interface; a test compares the result with its own.
    statistics = bleu._extract_corpus_statistics([answer.prediction], [[answer.reference]])[0]
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
    """F-measure of the longest common subsequence of words."""
    return float(_rouge_scorer().score(answer.reference, answer.prediction)["rougeL"].fmeasure)


def finding_statistics(answer: Answer) -> Array:
    """Findings asserted with their side and zone: shared, in the answer only, in the reference only, and 1; (4,)."""
    stated, expected = _findings(answer.prediction), _findings(answer.reference)
    return np.array(
        [len(stated & expected), len(stated - expected), len(expected - stated), 1], dtype=np.float64
    )


def finding_f1_value(sums: Array) -> Array:
    """Micro-averaged F1 of the findings; 1 where neither side asserts any."""
    shared, invented, missed, count = np.moveaxis(sums, -1, 0)
    total = 2 * shared + invented + missed
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(total > 0, 2 * shared / total, 1.0)
    return np.where(count > 0, value, np.nan)


def _findings(text: str) -> frozenset[tuple[str, str | None, str | None]]:
    return frozenset((fact.finding, fact.side, fact.zone) for fact in facts(text) if fact.present)


@cache
def _bleu_scorer():
    from sacrebleu.metrics import BLEU

    return BLEU(lowercase=True)


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


# ---------------------------------------------------------------------- the table of metrics


def _mean_of(score: Callable[[Answer], float]) -> Callable[[Answer], Array]:
    return lambda answer: np.array([float(score(answer)), 1.0])


def mean_value(sums: Array) -> Array:
    """Sum / count; NaN without answers."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("closed_accuracy", "closed accuracy", "closed", _mean_of(closed_correct), mean_value),
        Metric("open_exact", "open exact match", "open", _mean_of(exact_match), mean_value),
        Metric("open_f1", "open token F1", "open", _mean_of(token_f1), mean_value),
        Metric("report_finding_f1", "report finding F1", "report", finding_statistics, finding_f1_value),
        Metric("report_rouge_l", "report ROUGE-L", "report", _mean_of(rouge_l), mean_value),
        Metric("report_bleu", "report BLEU (mean of 1–4)", "report", bleu_statistics, bleu_value),
        Metric(
            "closed_accuracy_official",
            "closed accuracy (official rule)",
            "closed",
            _mean_of(closed_correct_official),
            mean_value,
            official=True,
        ),
        Metric(
            "open_recall_official",
            "open recall (official rule)",
            "open",
            _mean_of(recall_official),
            mean_value,
            official=True,
        ),
    )
}
