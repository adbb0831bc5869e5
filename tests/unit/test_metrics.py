"""Scores: word boundaries, equality with the reference packages, and what must hold for any text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from mmedpo_ray.metrics import METRICS, Answer, Metric, UnavailableError
from mmedpo_ray.metrics.open_questions import token_f1
from mmedpo_ray.metrics.report import bleu_statistics, bleu_value

REPORTS = [
    (
        "The heart is enlarged. There is a left pleural effusion.",
        "The heart is normal. There is a right pleural effusion.",
    ),
    ("No acute finding in the lungs.", "No acute finding."),
    ("Small nodule in the right upper zone.", "Small nodule in the right upper zone."),
    ("Clear lungs.", ""),
]
VOCABULARY = ["the", "left", "right", "lung", "heart", "effusion", "no", "yes", "normal", "nodule", "a"]
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=12).map(" ".join)


def score(name: str, pairs: list[tuple[str, str]], question: str = "") -> float:
    metric = METRICS[name]
    return float(metric.value(metric.of([Answer(r, p, question) for r, p in pairs]).sum(axis=0)))


def at_hand() -> Iterator[Metric]:
    """Metrics that need no weights and no WordNet, or find them."""
    for metric in METRICS.values():
        with contextlib.suppress(UnavailableError):
            metric.of([Answer("Yes", "Yes")])
            yield metric


AT_HAND = list(at_hand())


def test_the_constant_answer_scores_only_under_the_official_rule():
    pairs = [(reference, "Yes, it is normal.") for reference in ["Yes"] * 10 + ["No"] * 10]
    assert score("closed_accuracy", pairs) == 0.5
    assert score("closed_accuracy_official", pairs) == 1.0


def test_findings_count_with_side_and_zone():
    reference = "There is a left pleural effusion. The heart is enlarged."
    assert score("report_finding_f1", [(reference, reference)]) == 1.0
    assert (
        score("report_finding_f1", [(reference, "There is a right pleural effusion. The heart is enlarged.")])
        == 0.5
    )
    assert score("report_finding_f1", [(reference, "No pleural effusion. The heart is normal.")]) == 0.0


def test_bleu_equals_sacrebleu():
    references, predictions = [r for r, _ in REPORTS], [p for _, p in REPORTS]
    expected = np.mean(
        [
            BLEU(lowercase=True, smooth_method="none", max_ngram_order=order)
            .corpus_score(predictions, [references])
            .score
            for order in (1, 2, 3, 4)
        ]
    )
    assert score("report_bleu", REPORTS) == pytest.approx(expected / 100)


def test_rouge_equals_rouge_score():
    scorer = RougeScorer(["rougeL"])
    expected = np.mean([scorer.score(r, p)["rougeL"].fmeasure for r, p in REPORTS])
    assert score("report_rouge_l", REPORTS) == pytest.approx(expected)


def test_sums_of_no_answers_have_no_value():
    for metric in AT_HAND:
        width = metric.of([Answer("Yes", "Yes")]).shape[1]
        assert np.isnan(metric.value(np.zeros(width))), metric.name


def test_values_of_many_sums_equal_those_of_each():
    for metric in AT_HAND:
        rows = metric.of([Answer(r, p) for r, p in REPORTS])
        assert metric.value(rows) == pytest.approx([float(metric.value(row)) for row in rows], nan_ok=True), (
            metric.name
        )


@given(WORDS, WORDS)
def test_every_score_lies_between_0_and_1(reference, prediction):
    for metric in AT_HAND:
        if metric.name == "report_bleu" and not reference:
            continue
        value = metric.value(metric.of([Answer(reference, prediction)], [reference, "another one"]))[0]
        if metric.name.startswith("report_findings_") and np.isnan(value):
            continue  # no finding is asserted, or none is there
        assert 0.0 <= value <= (10.0 if metric.name == "report_cider" else 1.0) + 1e-12, metric.name


@given(WORDS, WORDS)
def test_f1_is_symmetric(first, second):
    assert token_f1(Answer(first, second)) == pytest.approx(token_f1(Answer(second, first)))


@given(st.lists(st.tuples(WORDS.filter(bool), WORDS), min_size=1, max_size=5), st.randoms())
def test_bleu_does_not_depend_on_the_order_of_reports(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    totals = [sum(bleu_statistics(Answer(r, p)) for r, p in items) for items in (pairs, shuffled)]
    assert bleu_value(totals[0]) == pytest.approx(bleu_value(totals[1]))
