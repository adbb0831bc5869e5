"""Scores: word boundaries, equality with the reference packages, and what must hold for any text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from mmedpo_ray.evaluate.metrics import METRICS, Answer
from mmedpo_ray.evaluate.metrics.closed import closed_correct
from mmedpo_ray.evaluate.metrics.official import closed_correct_official, recall_official
from mmedpo_ray.evaluate.metrics.open import exact_match, token_f1
from mmedpo_ray.evaluate.metrics.report import bleu_statistics, bleu_value
from mmedpo_ray.evaluate.metrics.words import normalise, yes_or_no

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
    return float(metric.value(sum(metric.statistics(Answer(r, p, question)) for r, p in pairs)))


@pytest.mark.parametrize(
    ("reference", "prediction", "question", "correct"),
    [
        ("Yes", "Yes, there is.", "", True),
        ("No", "The lungs look normal.", "", False),  # "no" is in "normal"
        ("No", "Yes, it is normal.", "", False),
        ("No", "no", "", True),
        ("yes", "No. Yes.", "", False),  # the first word decides
        ("Yes", "Yesterday it was.", "", False),
        ("No", "It shows no effusion, yes.", "", True),
        ("Left", "It is on the left side.", "Is it on the left or right?", True),
        ("Left", "On the right, not the left.", "Is it on the left or right?", False),
        ("Left", "It is cleft.", "Is it on the left or right?", False),
        ("CT", "This is a CT scan.", "What modality is shown?", True),
        ("CT", "This was an active disease.", "What modality is shown?", False),
        ("Yes", "", "", False),
    ],
)
def test_closed_answers_are_judged_on_whole_words(reference, prediction, question, correct):
    assert closed_correct(Answer(reference, prediction, question)) is correct


def test_the_constant_answer_scores_only_under_the_official_rule():
    pairs = [(reference, "Yes, it is normal.") for reference in ["Yes"] * 10 + ["No"] * 10]
    assert score("closed_accuracy", pairs) == 0.5
    assert score("closed_accuracy_official", pairs) == 1.0


def test_open_scores():
    assert exact_match(Answer("The left lung", "left lung."))
    assert not exact_match(Answer("left lung", "right lung"))
    assert token_f1(Answer("left lower lobe", "left lobe")) == pytest.approx(0.8)
    assert token_f1(Answer("left", "")) == 0.0
    # The rule of the published scripts rewards repetition; ours does not.
    assert recall_official(Answer("left lower", "left left left")) == pytest.approx(0.75)
    assert token_f1(Answer("left lower", "left left left")) == pytest.approx(0.4)


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
    for metric in METRICS.values():
        width = len(metric.statistics(Answer("Yes", "Yes")))
        assert np.isnan(metric.value(np.zeros(width))), metric.name


def test_values_of_many_sums_equal_those_of_each():
    for metric in METRICS.values():
        rows = np.stack([metric.statistics(Answer(r, p)) for r, p in REPORTS])
        assert metric.value(rows) == pytest.approx([float(metric.value(row)) for row in rows], nan_ok=True), (
            metric.name
        )


@given(WORDS, WORDS)
def test_every_score_lies_between_0_and_1(reference, prediction):
    for metric in METRICS.values():
        if metric.name == "report_bleu" and not reference:
            continue
        value = metric.value(metric.statistics(Answer(reference, prediction)))
        assert 0.0 <= value <= 1.0 + 1e-12, metric.name


@given(st.text(max_size=60))
def test_an_answer_equal_to_the_reference_is_right(text):
    assert exact_match(Answer(text, text))
    assert token_f1(Answer(text, text)) == 1.0
    assert normalise(normalise(text)) == normalise(text)


@given(WORDS, WORDS)
def test_f1_is_symmetric(first, second):
    assert token_f1(Answer(first, second)) == pytest.approx(token_f1(Answer(second, first)))


@given(st.sampled_from(["yes", "no"]), WORDS)
def test_what_follows_the_first_yes_or_no_does_not_matter(first, rest):
    assert yes_or_no(f"{first.title()}, {rest}") == first
    assert closed_correct(Answer(first, f"{first} {rest}"))


@given(st.sampled_from(["Yes", "No"]), WORDS)
def test_whatever_is_right_on_words_is_right_officially(reference, prediction):
    answer = Answer(reference, prediction)
    assert closed_correct_official(answer) or not closed_correct(answer)


@given(st.lists(st.tuples(WORDS.filter(bool), WORDS), min_size=1, max_size=5), st.randoms())
def test_bleu_does_not_depend_on_the_order_of_reports(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    totals = [sum(bleu_statistics(Answer(r, p)) for r, p in items) for items in (pairs, shuffled)]
    assert bleu_value(totals[0]) == pytest.approx(bleu_value(totals[1]))
