"""Rule edits change one fact; filters and the choice among sampled answers."""

from __future__ import annotations

import difflib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedpo_ray.config import TextCurationConfig
from mmedpo_ray.curate import lexicon
from mmedpo_ray.curate.hallucinate import Candidate, choose, is_wrong, problem, text_pair
from mmedpo_ray.curate.rule_edit import rule_edit, vocabulary_of
from mmedpo_ray.data.phantom import generate

PHANTOMS = list(generate("align", 40, seed=5))
ANSWERS = [question.answer for phantom in PHANTOMS for question in phantom.questions]
VOCABULARY = vocabulary_of(ANSWERS)


def edit(
    answer: str, question: str = "", seed: int = 0, vocabulary: frozenset[str] | None = None
) -> str | None:
    found = rule_edit(answer, question, np.random.default_rng(seed), vocabulary)
    return found.text if found else None


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Is there a nodule?", "Yes", "No"),
        ("Is there a nodule?", "no.", "yes."),
        (
            "Is contrast present?",
            "Yes, there is contrast present in the bowel.",
            "No, there is no contrast present in the bowel.",
        ),
        ("Is the heart large?", "No, the heart is not enlarged.", "Yes, the heart is enlarged."),
        ("Is this a CT or an MRI?", "MRI", "CT"),
        ("Is the hila normal or enlarged?", "Enlarged", "Normal"),
        ("Which side?", "On the left.", "On the right."),
        ("Where?", "R vertebral artery", "L vertebral artery"),
        ("Which rib?", "one", "two"),
        ("Which rib?", "1st", "2nd"),
    ],
)
def test_the_only_edit_there_is(question: str, answer: str, expected: str) -> None:
    assert edit(answer, question, vocabulary=frozenset({"left", "right"})) == expected


@pytest.mark.parametrize("answer", ["Psoas major muscle", "", "...", "fat", "5.6 cm"])
def test_no_edit_where_no_fact_is_known(answer: str) -> None:
    assert edit(answer, "What is it?") is None


def test_phantom_answers_lose_exactly_one_fact() -> None:
    axes = set()
    for phantom in PHANTOMS:
        for question in phantom.questions:
            found = rule_edit(
                question.answer, question.question, np.random.default_rng(phantom.seed), VOCABULARY
            )
            assert found is not None
            axes.add(found.axis)
            before, after = question.answer, found.text
            conflicts = lexicon.conflicts(before, after, question.question)
            # Another finding in its place is one edit but two facts: one missed, one invented.
            kinds = sorted(conflict.kind for conflict in conflicts)
            assert len(conflicts) == 1 or kinds == ["invented", "missed"], (before, after, conflicts)
            assert abs(len(before.split()) - len(after.split())) <= 3
            assert is_wrong(before, after, question.question, question.answer_type)
            assert vocabulary_of([after]) <= VOCABULARY
    assert {"polarity", "side", "zone", "size", "finding", "negation"} <= axes


def test_reports_stay_word_for_word_but_for_one_place() -> None:
    for phantom in PHANTOMS:
        report = phantom.questions[-1].answer
        after = edit(report, phantom.questions[-1].question, phantom.seed, VOCABULARY)
        assert after is not None
        blocks = difflib.SequenceMatcher(None, report.split(), after.split(), autojunk=False).get_opcodes()
        changed = [block for block in blocks if block[0] != "equal"]
        assert sum(block[2] - block[1] for block in changed) <= 6


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "left",
                "right",
                "nodule",
                "no",
                "yes,",
                "the",
                "a",
                "is",
                "there",
                "two",
                "CT",
                "effusion.",
                "lungs",
                "R",
            ]
        ),
        max_size=10,
    ).map(" ".join)
    | st.text(max_size=60),
    st.integers(0, 99),
)
def test_an_edit_is_never_the_same_answer_and_is_reproducible(answer: str, seed: int) -> None:
    found = edit(answer, "What is seen?", seed)
    if found is not None:
        assert not lexicon.equivalent(answer, found)
        assert lexicon.conflicts(answer, found, "What is seen?")
        assert found == edit(answer, "What is seen?", seed)


@pytest.mark.parametrize(
    ("kind", "question", "reference", "answer", "wrong"),
    [
        ("closed", "Is there a nodule?", "No", "Normal", False),
        ("closed", "Is there a nodule?", "No", "Yes, a nodule.", True),
        ("closed", "Is there a nodule?", "Yes", "There is no nodule.", True),
        ("closed", "Is it CT or MRI?", "MRI", "CT", True),
        ("closed", "Is it CT or MRI?", "MRI", "An MRI scan", False),
        ("open", "Where?", "Left upper zone", "It is in the left upper zone.", False),
        ("open", "Where?", "Left upper zone", "Left lower zone", True),
        ("open", "What?", "Nodule", "Nodule and pneumothorax", True),
        ("report", "Describe.", "There is a left effusion.", "A left pleural effusion is seen.", False),
        ("report", "Describe.", "There is a left effusion.", "There is a right effusion.", True),
    ],
)
def test_what_counts_as_wrong(kind: str, question: str, reference: str, answer: str, wrong: bool) -> None:
    assert is_wrong(reference, answer, question, kind) is wrong


def test_filters_name_their_reason() -> None:
    assert problem("Left", "Right", 4) is None
    assert problem("The liver", "liver", 4) == "same_answer"
    assert problem("Left", " ", 4) == "empty_rejected"
    assert problem("Left", "Question: which side? Right", 4) == "meta_text"
    assert problem("Left", "right " * 9, 4) == "rejected_too_long"
    assert problem("Left", "right " * 8, 4) is None


def candidate(text: str) -> Candidate:
    return Candidate(text, "model", "hash", 1)


def test_the_most_conflicting_wrong_candidate_is_chosen() -> None:
    answers = [candidate(text) for text in ("Left upper zone", "Left lower zone", "Right upper zone", "")]
    found = choose("Left upper zone", "Where?", "open", answers, 4)
    assert found is not None
    assert found.text == "Right upper zone"
    assert choose("Left upper zone", "Where?", "open", answers[:1], 4) is None


def test_a_right_answer_is_filled_in_or_dropped() -> None:
    sample = dict.fromkeys(("sample_id", "image_id", "dataset", "task", "image_uri"), "x") | {
        "question": "Which side?",
        "answer": "Left",
        "answer_type": "open",
    }
    fill = TextCurationConfig()
    row = text_pair(sample, [candidate("Left")], fill, frozenset(), 0)
    assert (row["rejected"], row["generator"]) == ("Right", "rule_edit") or row["rejected"] == "Bilateral"
    row = text_pair(sample, [candidate("Right")], fill, frozenset(), 0)
    assert (row["rejected"], row["generator"], row["seed"]) == ("Right", "model", 1)
    strict = TextCurationConfig(fallback="none")
    row = text_pair(sample, [candidate("Left")], strict, frozenset(), 0)
    assert row["drop_reason"] == "no_wrong_answer"
    assert "Left" not in str(row["drop_detail"])
