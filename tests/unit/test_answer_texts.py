"""Words of answers as metrics compare them: what differs in meaning differs, what differs in spelling does
not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.metrics.answer_texts import reference_text, unsupported_script
from mmedpo_ray.metrics.base import Answer
from mmedpo_ray.metrics.open_questions import exact_match, token_f1
from mmedpo_ray.radiology.lexicon.tokens import same_text, tokens


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # numbers and signs
        ("1.5 cm", "15 cm"),
        ("0.5", "05"),
        ("1,5", "15"),
        ("-5", "5"),
        ("-.5", ".5"),
        ("T-score -2.5", "T-score 2.5"),
        ("<5 mm", ">5 mm"),
        ("<5", "<=5"),
        ("≥5", ">5"),
        ("~5", "5"),
        ("5 ± 2", "5 2"),
        ("5%", "5"),
        ("p<0.05", "p>0.05"),
        ("HER2+", "HER2"),
        ("HER2+", "HER2-"),
        ("(+)", "(-)"),
        ("+", "-"),
        ("10³", "103"),
        ("10^-3", "10^3"),
        # units
        ("5 mm", "5 cm"),
        # ranges, ratios, levels
        ("5-10", "510"),
        ("5/10", "5-10"),
        ("1/2", "12"),
        ("1:2", "12"),
        ("3 x 4", "34"),
        ("L1-2", "L12"),
        ("S1/S2", "S12"),
        ("2.3.1", "231"),
        # letters
        ("Hepatitis A", "Hepatitis"),
        ("Hepatitis A virus", "hepatitis virus"),
        ("vitamin a", "vitamin"),
        ("Type A dissection", "type dissection"),
        ("Streptococcus A infection", "Streptococcus infection"),
        ("grade 3a tumor", "grade 3 tumor"),
        ("A", "B"),
        ("A", ""),
        ("I", "II"),
        # separators join nothing
        ("AP/PA", "appa"),
        ("c-spine", "cspine"),
        ("肝脏", "脾脏"),
    ],
)
def test_what_means_something_else_is_not_equal(first, second):
    assert not exact_match(Answer(first, second))
    assert token_f1(Answer(first, second)) < 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("5-10 mm", "5–10 mm"),
        ("5-10", "5 - 10"),
        ("5～10 cm", "5-10cm"),
        ("−5", "-5"),
        ("3 cm", "3cm"),
        ("1.5T", "1.5 T"),
        ("5 x 3 cm", "5×3cm"),
        ("cm²", "cm2"),
        ("5µm", "5 μm"),
        ("≤5", "<= 5"),
        ("±5", "+/-5"),
        ("1,000 ml", "1000ml"),
        ("1·5 cm", "1.5 cm"),
        ("1½ cm", "1 1/2 cm"),
        (".5", "0.5"),
        ("5.0 cm", "5 cm"),
        ("45°", "45º"),
        ("two", "2"),
        ("A mass", "mass"),
        ("a (large) mass", "large mass"),
        ("THERE IS A MASS", "there is mass"),
        ("The Left Lung Has A Mass", "left lung has mass"),
        ("X-ray", "X ray"),
        ("X\u2011ray", "X-ray"),
        ("T2-weighted", "T2 weighted"),
        ("T1- and T2-weighted", "T1 and T2 weighted"),
        ("COVID-19", "COVID 19"),
        ("Crohn's disease", "Crohn’s disease"),
        ("left, right", "left/right"),
        ("C.T.", "CT"),
        ("ＣＴ", "CT"),
        ("ﬁbrosis", "fibrosis"),
        ("left\u200blung".replace("\u200b", "\u200b "), "left lung"),
        ("soft\u00adtissue", "softtissue"),
        ("**left**", "left"),
        ("左肺", "左肺。"),
        ("CT图像", "CT 图像"),
        ("<think>right?</think> left lung", "left lung"),
    ],
)
def test_another_spelling_is_equal(first, second):
    assert exact_match(Answer(second, first))
    assert token_f1(Answer(second, first)) == 1


def test_shared_words_count():
    assert token_f1(Answer("left lower lobe", "left lobe")) == pytest.approx(0.8)
    assert token_f1(Answer("left", "")) == 0.0
    assert token_f1(Answer("left lower", "left left left")) == pytest.approx(0.4)
    # Chinese characters are words.
    assert token_f1(Answer("左肺", "右肺")) == pytest.approx(0.5)


@given(st.text(max_size=60))
def test_a_text_equals_itself(text):
    assert same_text(text, text)
    assert token_f1(Answer(text, text)) == 1.0 or "<" in text or "[" in text or "\\" in text


@given(st.text(max_size=60))
def test_tokens_hold_no_blank_and_no_capital(text):
    for token in tokens(text):
        assert token
        assert token == "".join(token.split())
        assert token == token.casefold()


@given(
    st.from_regex(r"\A[<>]?-?[0-9]{1,4}(\.[0-9]{1,3})?\Z"),
    st.from_regex(r"\A[<>]?-?[0-9]{1,4}(\.[0-9]{1,3})?\Z"),
)
def test_numbers_are_equal_by_value_and_sign(first, second):
    def value(text):
        sign = text[0] if text[0] in "<>" else ""
        return sign, float(text.lstrip("<>")), "-" in text

    assert same_text(first, second) is (value(first) == value(second))


def test_words_for_bleu_and_rouge():
    assert reference_text("左肺有结节。") == "左 肺 有 结 节 ."
    assert reference_text("<think>hm</think>Clear  lungs") == "Clear lungs"


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Left lung", None),
        ("naïve β-thalassemia", None),
        ("左肺 CT", None),
        ("沒有", None),
        ("Сердце", "Cyrillic"),
        ("الرئة اليسرى", "Arabic"),
        ("폐렴", "Hangul"),
        ("胸部レントゲン", "Katakana"),
        ("फेफड़ा", "Devanagari"),
        ("The patient said да", None),
    ],
)
def test_scripts(text, script):
    assert unsupported_script(text) == script
