"""Closed questions: the option or the yes or no that an answer decides for, on whole words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.metrics.base import Answer
from mmedpo_ray.metrics.closed_questions import closed_correct, verdict
from mmedpo_ray.metrics.official import closed_correct_official, recall_official
from mmedpo_ray.metrics.open_questions import exact_match

LETTERS = "Which one? A) MRI B) CT"
LINES = "Which modality?\nA. MRI\nB. CT\nC. X-ray"
SIDE = "Is it on the left or the right?"


@pytest.mark.parametrize(
    ("question", "reference", "prediction", "expected"),
    [
        ("", "Yes", "Yes, there is.", "right"),
        ("", "No", "The lungs look normal.", "undecided"),  # "no" is in "normal"
        ("", "No", "Yes, it is normal.", "wrong"),
        ("", "yes", "No. Yes.", "undecided"),
        ("", "Yes", "Yesterday it was.", "undecided"),
        ("", "Yes", "", "undecided"),
        ("Is there an effusion?", "None", "No", "right"),
        ("Is there an effusion?", "No", "None", "right"),
        ("Is there an effusion?", "Yes", "Yes or no", "undecided"),
        ("Is this image normal?", "No", "It is abnormal", "right"),
        ("Is the heart enlarged?", "Yes", "Cardiomegaly is present.", "right"),
        ("Is the heart enlarged?", "No", "The heart is of normal size.", "right"),
        # letters
        (LETTERS, "A", "A", "right"),
        (LETTERS, "A", "a", "right"),
        (LETTERS, "A", "B", "wrong"),
        (LETTERS, "A", "(A)", "right"),
        (LETTERS, "A", "Option A", "right"),
        (LETTERS, "A", "A. MRI", "right"),
        (LETTERS, "A", "MRI", "right"),
        (LETTERS, "MRI", "A", "right"),
        (LETTERS, "A", "The answer is B.", "wrong"),
        (LETTERS, "B", "A CT scan", "right"),
        (LETTERS, "A", "A or B", "undecided"),
        (LETTERS, "A", "", "undecided"),
        (LINES, "C", "c", "right"),
        (LINES, "C", "X-ray", "right"),
        (LINES, "C. X-ray", "C", "right"),
        (LINES, "C", "computed tomography", "wrong"),
        ("Which? (A) left lung (B) right lung", "B", "left lung and right lung", "undecided"),
        ("Is there an effusion? A) Yes B) No", "A", "There is an effusion", "right"),
        ("Is there an effusion? A) Yes B) No", "Yes", "B", "wrong"),
        # options in words
        (SIDE, "Left", "It is on the left side.", "right"),
        (SIDE, "Left", "On the right, not the left.", "wrong"),
        (SIDE, "Left", "It is cleft.", "undecided"),
        (SIDE, "Left", "left and right", "undecided"),
        (SIDE, "Left", "Left. The right lung is clear.", "right"),
        ("Is this T1 or T2 weighted?", "T2 weighted", "T2-weighted", "right"),
        ("Is this CT, MRI or X-ray?", "MRI", "magnetic resonance imaging", "right"),
        ("Is it benign or malignant?", "Malignant", "It is malignant.", "right"),
        ("Is it positive or negative?", "Negative", "Positive", "wrong"),
        ("Is the patient male or female?", "Female", "F", "right"),
        ("Is the patient male or female?", "Male", "female", "wrong"),
        ("Is the mass >3 cm or <3 cm?", ">3 cm", "<3 cm", "wrong"),
        ("How big, 1.5 cm or 15 cm?", "1.5 cm", "15 cm", "wrong"),
        ("How big, 1.5 cm or 15 cm?", "1.5 cm", "1.5cm", "right"),
        # neither
        ("What modality is shown?", "CT", "This is a CT scan.", "right"),
        ("What modality is shown?", "CT", "This was an active disease.", "wrong"),
        ("What modality is shown?", "CT", "This is not a CT.", "wrong"),
        ("What modality is shown?", "CT", "It is MRI, not CT", "wrong"),
        ("Which lung is abnormal?", "left lung", "right lung and left lung", "wrong"),
        ("Which lung is abnormal?", "left lung", "The left.", "right"),
        # Chinese
        ("图中有肺吗？", "是", "有", "right"),
        ("图中有肺吗？", "是", "不是", "wrong"),
        ("图中有肺吗？", "没有", "没有。", "right"),
        ("图中有肺吗？", "没有", "无法确定", "undecided"),
        ("图中有肺吗？", "Yes", "是的", "right"),
        ("这是CT还是MRI？", "CT", "这是CT。", "right"),
        ("这是CT还是MRI？", "CT", "MRI", "wrong"),
        ("病变在左侧还是右侧？", "左侧", "不是左侧，是右侧", "wrong"),
        ("左肺还是右肺有问题？", "左肺", "左肺有问题", "right"),
        ("哪个肺异常？", "左肺", "右肺和左肺", "wrong"),
        ("肝脏健康吗？", "健康", "不健康", "wrong"),
        ("肝脏健康吗？", "健康", "健康。", "right"),
    ],
)
def test_decisions(question, reference, prediction, expected):
    assert verdict(Answer(reference, prediction, question)) == expected


def test_the_cases_kept_outside_the_project(shared_data):
    path = shared_data.parent / "cases" / "metrics.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rules = {"closed_accuracy": closed_correct, "open_exact": exact_match}
    failed = [
        row["id"]
        for row in rows
        if rules[row["metric"]](Answer(row["reference"], row["prediction"], row["question"]))
        is not row["right"]
    ]
    assert not failed


@pytest.mark.parametrize(("name", "count", "recall"), [("slake", 3450, 0.1871), ("vqa-rad", 893, 0.2112)])
def test_the_official_recall_of_released_rows(shared_data, name, count, recall):
    rows = json.loads((shared_data / "released" / f"{name}_dpo_weighted.json").read_text())
    sides = [(row["conversations"][1]["value"], row["rejected_conversations"][1]["value"]) for row in rows]
    sides = [
        (chosen, rejected)
        for chosen, rejected in sides
        if chosen.strip().strip(".").lower() not in ("yes", "no")
    ]
    assert len(sides) == count
    assert sum(recall_official(Answer(*side)) for side in sides) / count == pytest.approx(recall, abs=5e-5)


@pytest.mark.parametrize(
    ("reference", "prediction", "recall"),
    [
        ("left lower", "left left left", 0.75),  # repetition counts
        ("ground-glass", "ground glass", 1.0),  # a hyphen is a blank
        ("left/right", "right", 0.5),
        ("well - defined mass", "well defined", 2 / 3),  # beside a blank it goes
        ("1.5 cm.", "1.5 cm", 1.0),
        ("1.5", "15", 0.0),
        ("two", "2", 1.0),
        ("crohn's", "crohns", 0.0),
        ("don't", "dont", 1.0),
        ("1,000 left-right", "leftright", 0.5),  # a comma between digits joins everywhere
        ("", "left", 0.0),
    ],
)
def test_the_official_words(reference, prediction, recall):
    assert recall_official(Answer(reference, prediction)) == pytest.approx(recall)


@given(
    st.sampled_from(["yes", "no"]), st.lists(st.sampled_from(["left", "lung", "effusion", "the"]), max_size=8)
)
def test_the_leading_word_decides(first, rest):
    answer = Answer(first, f"{first.title()}, {' '.join(rest)}")
    assert closed_correct(answer)
    assert closed_correct_official(answer)
