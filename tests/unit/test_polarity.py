"""One reader of yes and no: the leading or the last committed word, statements beside their question,
Chinese."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.radiology.lexicon import final_answer, implied_polarity, polarity, stated_polarity

QUESTION = "Is there an effusion?"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("yeah, there is", "yes"),
        ("Yep.", "yes"),
        ("Nope", "no"),
        ("**No**", "no"),
        ("“No”", "no"),
        ("Ｙｅｓ", "yes"),
        ("Y", "yes"),
        ("n", "no"),
        ("True", "yes"),
        ("False.", "no"),
        ("Present", "yes"),
        ("Absent", "no"),
        ("Positive", "yes"),
        ("Negative", "no"),
        ("None", "no"),
        ("None seen", "no"),
        ("Not seen", "no"),
        ("Not visible in the image.", "no"),
        ("Unlikely", "no"),
        ("Certainly not", "no"),
        ("Most likely no.", "no"),
        ("It does.", "yes"),
        ("There isn't.", "no"),
        ("Answer: Yes", "yes"),
        ("**Answer:** No", "no"),
        ("The answer is no.", "no"),
        ("The correct answer is: Yes", "yes"),
        ("No. There is none.", "no"),
        ("Yes, but no pneumothorax", "yes"),
        ("There is no doubt: yes", "yes"),
        ("The image shows fluid on the left, so yes.", "yes"),
        ("The question asks yes or no. My answer is yes.", "yes"),
        ("Based on the image, there is no effusion", "no"),
        ("I do not see any effusion.", "no"),
        ("The effusion is not seen.", "no"),
        ("There is an effusion", "yes"),
        ("<think>There is no effusion on the left.</think> Yes", "yes"),
        ("no effusion there </think>Yes", "yes"),
        ("<think>yes, yes", None),
        ("<answer>Yes</answer>", "yes"),
        (r"So \boxed{\text{No}}", "no"),
        ("I cannot say yes or no", None),
        ("Yes and no", None),
        ("yes/no", None),
        ("Not sure", None),
        ("Cannot be determined", None),
        ("Not necessarily", None),
        ("Possibly", None),
        ("Yesterday it was", None),
        ("Normal", None),
        ("", None),
        ("是的。", "yes"),
        ("有", "yes"),
        ("对", "yes"),
        ("没错", "yes"),
        ("图中有积液", "yes"),
        ("不是", "no"),
        ("没有。", "no"),
        ("沒有", "no"),
        ("无", "no"),
        ("不，没有", "no"),
        ("未见积液", "no"),
        ("图中没有积液", "no"),
        ("无法判断", None),
        ("是否", None),
    ],
)
def test_what_an_answer_says(answer, expected):
    assert implied_polarity(QUESTION, answer) == expected


@pytest.mark.parametrize(
    ("answer", "begins", "own_word"),
    [
        ("No nodule is seen.", "no", None),
        ("No, a nodule.", "no", "no"),
        ("No doubt a nodule.", None, None),
        ("True lumen of the aorta", None, None),
        ("Positive pressure ventilation", None, None),
        ("Not only the left lung", None, None),
        ("不规则", None, None),
        ("左肺", None, None),
    ],
)
def test_a_statement_is_no_yes_or_no_of_its_own(answer, begins, own_word):
    assert polarity(answer) == begins
    assert stated_polarity(answer) == own_word


@given(st.sampled_from(["yes", "no"]), st.text(max_size=40))
def test_a_thought_block_does_not_count(word, thought):
    thought = thought.replace("<", "")
    assert stated_polarity(f"<think>{thought}</think>{word}") == word
    assert final_answer(f"<think>{thought}</think> {word}") == word
