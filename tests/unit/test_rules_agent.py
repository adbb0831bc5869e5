"""The judge made of the lexicon: order of severity, focus, convergence."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.judge import debate
from mmedpo_ray.judge.agents.base import Case, Judgement
from mmedpo_ray.judge.agents.rules import RulesAgent, RulesAgentConfig
from mmedpo_ray.judge.settings import ScoreConfig

Focus = Literal["findings", "laterality", "polarity", "all"]


def judge(
    reference: str,
    answer: str,
    question: str = "Describe.",
    focus: Focus = "all",
    previous: float | None = None,
) -> Judgement:
    history = (Judgement("other", 1, previous, ""),) if previous is not None else ()
    (answer_given,) = RulesAgent(RulesAgentConfig(focus=focus)).judge(
        [Case(question, reference, answer, history, 1)]
    )
    assert isinstance(answer_given, Judgement)
    return answer_given


@pytest.mark.parametrize(
    ("reference", "wider"),
    [
        ("Liver Cancer", "Liver Mass"),
        ("Pneumonia", "Opacity"),
        ("Brain tumors", "Brain lesions"),
        ("Left pneumothorax.", "An abnormality on the left."),
    ],
)
@pytest.mark.parametrize("focus", ["findings", "laterality", "polarity", "all"])
def test_a_wider_word_matters_little(reference: str, wider: str, focus: Focus) -> None:
    assert 0 < judge(reference, wider, focus=focus).score <= 0.2
    assert judge(f"No effusion. {reference}", f"Effusion. {wider}").score > 0.5


def test_a_narrower_word_or_another_side_is_an_error() -> None:
    assert judge("Liver mass", "Liver cancer").score > 0.5
    assert judge("Cancer of the left lung", "Mass of the right lung").score > 0.5


def test_severity_orders_errors_as_a_clinician_would() -> None:
    same = judge("Left pleural effusion.", "There is a left pleural effusion.").score
    size = judge("Large left pleural effusion.", "Small left pleural effusion.").score
    side = judge("Large left pleural effusion.", "Large right pleural effusion.").score
    missed = judge("Pneumothorax.", "Normal chest radiograph.").score
    assert same < size < side <= missed
    assert same == 0.0 and missed >= 0.9


def test_focus_decides_what_counts_in_full() -> None:
    wrong_side = ("Left pleural effusion.", "Right pleural effusion.")
    assert judge(*wrong_side, focus="laterality").score > judge(*wrong_side, focus="findings").score
    wrong_finding = ("Left pleural effusion.", "Left pneumothorax.")
    assert judge(*wrong_finding, focus="findings").score > judge(*wrong_finding, focus="laterality").score
    closed = ("Yes", "No", "Is there a pneumothorax?")
    assert judge(*closed, focus="polarity").score > judge(*closed, focus="laterality").score


def test_close_views_agree_exactly_and_distant_ones_move() -> None:
    pair = ("Left pleural effusion.", "Right pleural effusion.")
    own = judge(*pair, focus="laterality").score
    assert judge(*pair, focus="laterality", previous=own - 0.05).score == own - 0.05
    moved = judge(*pair, focus="laterality", previous=0.1).score
    assert 0.1 < moved < own
    # An agent whose focus the error lies outside gives way further.
    assert judge(*pair, focus="findings", previous=0.1).score < moved


def test_an_unknown_difference_is_neither_nothing_nor_grave() -> None:
    assert 0.1 < judge("The zorble is florid.", "The zorble is quiescent.").score < 0.5


def test_what_an_answer_denies_beside_the_truth_is_no_contradiction() -> None:
    question = "Is this a CT scan?"
    assert "polarity" not in judge("Yes", "This is a CT, not an MRI.", question).rationale
    assert (
        judge("Yes", "This is a CT, not an MRI.", question).score
        < judge("Yes", "This is not a CT.", question).score
    )
    assert judge("Normal", "No abnormality is seen.", "What is seen?").score == 0


_TERMS = (
    "left",
    "right",
    "large",
    "pleural effusion",
    "pneumothorax",
    "no",
    "yes",
    "and",
    "nodule",
    "normal",
    "ct",
)
TEXTS = st.lists(st.sampled_from(_TERMS), min_size=1, max_size=8).map(" ".join)


@given(TEXTS, TEXTS, st.text(max_size=20))
def test_every_debate_of_the_default_agents_ends_in_agreement(
    reference: str, answer: str, question: str
) -> None:
    agents = ScoreConfig().agents
    case = Case(question, reference, answer, (), 1)
    ((history, refusal),) = debate.hold([case], range(15), [RulesAgent(agent) for agent in agents], 5)
    assert refusal is None
    assert all(0 <= item.score <= 1 and item.rationale for item in history)
    assert debate.outcome(history, len(agents)).consensus
    ((again, _),) = debate.hold([case], range(15), [RulesAgent(agent) for agent in agents], 5)
    assert again == history


def test_a_very_long_answer_is_judged_like_any_other() -> None:
    long = "The lungs are clear. " * 5000 + "Large right pleural effusion."
    assert judge("Large left pleural effusion.", long).score > 0.5
