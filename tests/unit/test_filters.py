"""Filters of text pairs: each reason, and what must not be caught."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.curate.text.filters import contains_truth, language, most_frequent, problem
from mmedpo_ray.curate.text.text_pairs import is_wrong


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("Left", "Right", None),
        ("The liver", "liver", "same_answer"),
        ("Pleural effusions", "a pleural effusion", "same_answer"),
        ("bright centre, dark rim", "dark centre, bright rim", None),
        ("Left", " ", "empty_rejected"),
        ("Left", "Question: which side? Right", "meta_text"),
        ("<image> Left", "Right", "meta_text"),
        ("Left", "I cannot see a side", "meta_text"),
        ("Left", "right " * 9, "rejected_too_long"),
        ("Left", "right " * 8, None),
        ("MRI", "This is an MRI of the brain", "contains_truth"),
        ("There is a left effusion", "左侧胸腔积液", "wrong_script"),
        ("There is a left effusion", "Слева выпот", "wrong_script"),
        ("β-blocker, left", "α-blocker, right", None),
        ("µ 3", "µ 4", None),
        ("左侧胸腔积液", "右侧胸腔积液", None),
        ("肺部", "左肺部有病变", "contains_truth"),
        ("肺炎", "没有肺炎", None),
        ("是", "不是", None),
        ("легкое", "левое легкое", "contains_truth"),
        ("肺炎", "右肺上叶可见大片高密度影", "rejected_too_long"),
        ("12", "Тринадцать", "wrong_script"),
        (
            "There is a small effusion in the left lung.",
            "Es ist ein kleiner Erguss in der rechten Lunge mit einer Verschattung.",
            "wrong_language",
        ),
        (
            "There is a small effusion in the left lung.",
            "Hay un derrame pequeño en el pulmón derecho con una consolidación.",
            "wrong_language",
        ),
        ("Left", "Se observa una lesión en el lado derecho con una masa", "wrong_language"),
        (
            "Es zeigt sich ein Erguss in der linken Lunge.",
            "Es zeigt sich ein Erguss in der rechten Lunge.",
            None,
        ),
        ("Stable cardiomegaly. Left effusion.", "Stable cardiomegaly. Right effusion.", None),
        ("No", "Yes, the chest X-ray shows a pleural effusion, which is an accumulation of fluid.", None),
    ],
)
def test_each_filter_names_its_reason(chosen: str, rejected: str, reason: str | None) -> None:
    long = 40 if reason != "rejected_too_long" and rejected.strip() != ("right " * 8).strip() else 4
    assert problem(chosen, rejected, long, "What is seen in this image?") == reason


@pytest.mark.parametrize(
    ("question", "chosen", "rejected", "contained"),
    [
        # A bare yes or no is a matter of polarity, not of the word.
        ("Is there a nodule?", "Yes", "Yes, in the left lung", True),
        ("Is there a nodule?", "Yes", "There is a nodule in the lung", True),
        ("Is there a nodule?", "Yes", "No, the scan says yes", False),
        ("Is there a nodule?", "No", "Yes, there is no doubt", False),
        ("Is this image normal?", "No", "It is normal and shows no signs of disease", False),
        ("Is there a nodule?", "No", "No nodule, but there is a pneumothorax", False),
        ("Is this a CT scan?", "Yes", "This is a CT, not an MRI.", True),
        ("Is this a CT scan?", "Yes", "This is an MRI, not a CT.", False),
        # Whole words.
        ("How is the heart?", "Normal", "Abnormal", False),
        ("What is it?", "Mass", "Massive bleeding", False),
        ("Which rib?", "1", "10", False),
        # Denied, contrasted.
        ("What study is it?", "MRI", "This is a CT, not an MRI", False),
        ("What study is it?", "MRI", "This is a CT rather than an MRI", False),
        ("What is seen?", "Pneumothorax", "There is no pneumothorax", False),
        ("What study is it?", "CT", "This is not an MRI, it is a CT", True),
        ("Is it a CT or an MRI?", "CT", "CT, not MRI", True),
        ("Where is it?", "RLL", "It is in the right lower lobe", True),
        ("Where is it?", "Right lower lobe", "It is not visible in the right lower lobe", False),
        # Spellings that the lexicon knows.
        ("What study is it?", "MRI", "a magnetic resonance imaging study", True),
        ("What study is it?", "Chest", "A chest X-ray", False),
        # The truth and an error beside it: wrong.
        ("What is seen?", "Effusion", "Effusion and pneumothorax", False),
        ("Which lung?", "Left lung", "The left lung and the right lung", False),
        # Denied truths.
        ("What is seen?", "No pneumothorax", "There is no pneumothorax or effusion", True),
        # Words of the question prove nothing; of two options the only one named does.
        ("Is the liver or the spleen larger?", "Spleen", "The liver is larger than the spleen", False),
        ("Is the liver or the spleen larger?", "Spleen", "It is the spleen", True),
        ("Is this cancer or a bleed?", "Cancer", "A bleed, which rules out cancer", False),
    ],
)
def test_the_truth_inside_a_longer_answer(question: str, chosen: str, rejected: str, contained: bool) -> None:
    assert contains_truth(chosen, rejected, question) is contained


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Hepatitis A", "Hepatitis B"),
        ("hepatitis b.", "Hepatitis a."),
        ("Vitamin A", "Vitamin B"),
        ("Vitamin A deficiency", "Vitamin B deficiency"),
        ("Group A", "Group B"),
        ("Type A aortic dissection", "Type B aortic dissection"),
        ("Stanford A dissection", "Stanford B"),
        ("Blood type A", "Blood type AB"),
        ("Type I", "Type II"),
        ("Le Fort II", "Le Fort I"),
        ("Grade 1", "Grade 2"),
        ("A", "B"),
        ("(B)", "(A)"),
    ],
)
def test_a_letter_or_numeral_tells_two_answers_apart(chosen: str, rejected: str) -> None:
    assert problem(chosen, rejected, 4.0, "Which one?") is None
    assert is_wrong(chosen, rejected, "Which one?", "open")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("A mass", "mass"),
        ("Mass", "This is a mass."),
        ("the vitamin A", "Vitamin a"),
        ("5 mm", "5mm."),
        ("5-10 mm", "５ － １０ｍｍ"),
        ("5x4x3 cm", "5 × 4 × 3 cm"),
        ("肝脏", "肝脏。"),
        ("X-ray", "X\u2011ray"),
    ],
)
def test_articles_spaces_and_typography_tell_nothing(chosen: str, rejected: str) -> None:
    assert problem(chosen, rejected, 4.0, "What is seen?") == "same_answer"


def test_the_most_frequent_reason() -> None:
    assert most_frequent(["meta_text", "same_answer", "same_answer"]) == "same_answer"
    assert most_frequent(["same_answer", "meta_text"]) == "same_answer"
    assert most_frequent([]) is None


def test_language_is_only_told_of_sentences() -> None:
    assert language("The heart is enlarged and there are effusions.") == "en"
    assert language("Das Herz ist nicht vergrößert und die Lunge ist frei.") == "de"
    assert language("Le coeur est normal et les poumons sont clairs dans cette image.") == "fr"
    assert language("Stable moderate cardiomegaly, bibasilar atelectasis, effusions.") is None
    assert language("the of") is None


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=40))
def test_any_text_has_a_verdict(chosen: str, rejected: str, question: str) -> None:
    assert problem(chosen, chosen, 4.0, question) is not None, "an answer is never its own contrary"
    if problem(chosen, rejected, 4.0, question) is None:
        assert rejected.strip()
        assert chosen != rejected
