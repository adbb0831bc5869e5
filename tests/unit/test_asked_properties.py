"""Yes/no questions answered by statements: properties, sizes, counts, hedges, corrections; Chinese
statements; odd lists of options."""

from __future__ import annotations

import pytest

from mmedpo_ray.curate.text.filters import problem
from mmedpo_ray.metrics.base import Answer
from mmedpo_ray.metrics.closed_questions import verdict
from mmedpo_ray.radiology.lexicon import implied_polarity
from mmedpo_ray.radiology.lexicon.tokens import same_text

AIR = "Is there a pneumothorax?"


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Is the lesion malignant?", "The lesion is benign.", "no"),
        ("Is the mass enhancing?", "The mass does not enhance.", "no"),
        ("Is there a change?", "There is no change.", "no"),
        ("Is there any change in the lesion?", "There is no change in the lesion.", "no"),
        ("Is the fracture displaced?", "The fracture is nondisplaced.", "no"),
        ("Is the fracture displaced?", "There is a non-displaced fracture.", "no"),
        ("Has the nodule grown?", "The nodule is unchanged.", "no"),
        ("Has the nodule grown?", "The nodule has decreased.", "no"),
        ("Is the effusion increased?", "The effusion is decreased.", "no"),
        ("Is the lesion larger?", "The lesion is smaller.", "no"),
        ("Is the mass homogeneous?", "The mass is heterogeneous.", "no"),
        ("Is the nodule spiculated?", "The nodule is smooth.", "no"),
        ("Is the aneurysm ruptured?", "The aneurysm is intact.", "no"),
        ("Is the pneumonia viral?", "It is bacterial pneumonia.", "no"),
        ("Is the fracture acute?", "It is an old fracture.", "no"),
        ("Is the effusion bilateral?", "The effusion is on the left.", "no"),
        ("Is the effusion large?", "There is an effusion.", None),
        ("Is the mass larger than 3 cm?", "The mass measures 2 cm.", "no"),
        ("Is the mass larger than 3 cm?", "The mass measures 4 cm.", "yes"),
        ("Is there more than one nodule?", "There is only one nodule.", "no"),
        ("Are there multiple nodules?", "There is a single nodule.", "no"),
        ("Are there two nodules?", "There are three nodules.", "no"),
        ("Are there two nodules?", "There are two nodules.", "yes"),
        ("Is the lesion malignant?", "The lesion is malignant.", "yes"),
        ("Is the effusion large?", "The effusion is large.", "yes"),
        ("Is the effusion large?", "There is a large effusion.", "yes"),
        ("Is the effusion large?", "The effusion is small.", "no"),
        ("Is the heart enlarged?", "The heart is enlarged.", "yes"),
        ("Is the nodule in the left lung?", "The nodule is in the left lung.", "yes"),
        ("Is there an effusion?", "There is a small left effusion.", "yes"),
        ("Has the effusion resolved?", "The effusion has resolved.", "yes"),
        ("Has the effusion resolved?", "The effusion persists.", "no"),
        (AIR, "Pneumothorax: absent", "no"),
        (AIR, "Pneumothorax: none", "no"),
        (AIR, "Pneumothorax: negative", "no"),
        (AIR, "Pneumothorax = no", "no"),
        (AIR, "Pneumothorax: present", "yes"),
        (AIR, "Pneumothorax is unlikely.", "no"),
        (AIR, "It is unlikely that there is a pneumothorax.", "no"),
        (AIR, "There is unlikely to be a pneumothorax", "no"),
        (AIR, "It is doubtful that there is a pneumothorax", "no"),
        (AIR, "I doubt there is a pneumothorax", "no"),
        (AIR, "The image rules out a pneumothorax.", "no"),
        (AIR, "The image argues against a pneumothorax", "no"),
        (AIR, "The image lacks signs of pneumothorax", "no"),
        (AIR, "The image fails to show a pneumothorax", "no"),
        (AIR, "There is nothing to suggest pneumothorax", "no"),
        (AIR, "The question asks whether there is a pneumothorax.", None),
        (AIR, "Is there a pneumothorax?", None),
        (AIR, "If there were a pneumothorax, a line would be visible.", None),
        (AIR, "To rule out pneumothorax an expiratory view is needed.", None),
        (AIR, "The pneumothorax has not resolved.", "yes"),
        (AIR, "There may or may not be a pneumothorax.", None),
        ("Isn't there a mass?", "There is a mass.", "yes"),
        ("Isn't there a mass?", "There is no mass.", "no"),
        (AIR, "There is no doubt that there is a pneumothorax.", "yes"),
        (AIR, "There is a pneumothorax.", "yes"),
        (AIR, "Without doubt a pneumothorax", "yes"),
        (AIR, "Interval resolution of the pneumothorax", "no"),
        ("这是CT图像吗？", "这是MRI", None),
        ("图中有胸腔积液吗？", "没有气胸，但有胸腔积液", "yes"),
        ("图中有胸腔积液吗？", "肺部无异常，但有胸腔积液。", "yes"),
        ("图中有胸腔积液吗？", "不太可能有胸腔积液", "no"),
        ("图中有肿瘤吗？", "不能排除肿瘤", None),
        ("图中有肿瘤吗？", "无疑有肿瘤", "yes"),
        ("图中有肿瘤吗？", "未有", "no"),
        ("图中有肿瘤吗？", "不具有", "no"),
        ("图中有肿瘤吗？", "未检测到肿瘤", "no"),
        ("图中有肿瘤吗？", "看不到肿瘤", "no"),
        ("图中有肿瘤吗？", "见不到肿瘤", "no"),
        ("肺部正常吗？", "正常", "yes"),
        ("肺部正常吗？", "不正常", "no"),
        ("图中有肺吗？", "图中有肺", "yes"),
        ("图中有肺吗？", "有", "yes"),
        ("图中有肺吗？", "图中没有肺", "no"),
        ("这是CT图像吗？", "这是CT图像", "yes"),
        ("这是CT图像吗？", "这不是CT图像", "no"),
        ("图中有积液吗？", "没有积液", "no"),
        ("肺部正常吗？", "肺部异常", "no"),
        (AIR, "Yes. Actually no.", "no"),
        (AIR, "Yes. Wait, looking again, no.", "no"),
        (AIR, "No, wait. Yes, there is a pneumothorax.", "yes"),
        (AIR, "No — correction: yes.", "yes"),
        (AIR, "Yes, I mean no.", "no"),
        (AIR, "No. There is none.", "no"),
        (AIR, "Yes, there is actually a pneumothorax", "yes"),
        (AIR, "I think so", "yes"),
        (AIR, "I don't think so", "no"),
        (AIR, "I cannot see a pneumothorax", "no"),
        (AIR, "I can't see any pneumothorax.", "no"),
    ],
)
def test_statements_beside_their_question(question, answer, expected):
    assert implied_polarity(question, answer) == expected


TAIL = (
    "Which is seen?\n\nA. Pneumonia\nB. Effusion\n\n"
    "Answer with the option's letter from the given choices directly."
)
CHINESE = "以下哪项正确？A. 左肺 B. 右肺 C. 双肺 D. 都不是"
NEGATED = "What is seen? A) Mass. B) No mass."
TWO = "Which? A) MRI B) CT"


@pytest.mark.parametrize(
    ("question", "reference", "prediction", "expected"),
    [
        (TAIL, "Effusion", "B", "right"),
        (TAIL, "B", "Effusion", "right"),
        ("Which? A. Pneumonia B. Effusion. Answer with the letter only.", "B", "Effusion", "right"),
        ("A. Pneumonia B. Effusion\nWhich is seen?", "B", "Effusion", "right"),
        (
            "Options: A. Yes B. No C. Cannot be determined. Is there an effusion?",
            "C",
            "Cannot be determined",
            "right",
        ),
        (CHINESE, "B", "答案是B", "right"),
        (CHINESE, "B", "答案：B", "right"),
        (CHINESE, "B", "正确答案为B。", "right"),
        (CHINESE, "B", "选B", "right"),
        (CHINESE, "B", "应选B。", "right"),
        (CHINESE, "B", "选项B", "right"),
        (CHINESE, "B", "我选择B", "right"),
        (CHINESE, "B", "B是正确的", "right"),
        (CHINESE, "B", "B", "right"),
        (CHINESE, "B", "B．右肺", "right"),
        (CHINESE, "B", "右肺", "right"),
        (CHINESE, "D", "都不是", "right"),
        (CHINESE, "B", "A", "wrong"),
        (NEGATED, "B", "No mass", "right"),
        (NEGATED, "B", "There is no mass.", "right"),
        (NEGATED, "A", "No mass.", "wrong"),
        (NEGATED, "A", "Mass", "right"),
        (NEGATED, "A", "There is a mass.", "right"),
        ("Is the fracture displaced or non-displaced?", "non-displaced", "nondisplaced", "right"),
        ("Is the fracture displaced or non-displaced?", "non-displaced", "not displaced", "right"),
        ("Is the fracture displaced or non-displaced?", "displaced", "It is displaced", "right"),
        ("Is the mass benign or malignant?", "benign", "non-malignant", "right"),
        ("Is the mass benign or malignant?", "benign", "malignant", "wrong"),
        ("Was it with contrast or without contrast?", "without contrast", "without contrast", "right"),
        ("Is it A) effusion present B) effusion absent", "B", "Effusion absent", "right"),
        (TWO, "B", "A. No wait, B.", "right"),
        (TWO, "B", "choice (B)", "right"),
        (TWO, "B", "I choose B", "right"),
        (TWO, "B", '{"answer": "B"}', "right"),
        ("AP, PA, or lateral?", "PA", "Lateral", "wrong"),
        ("AP, PA, or lateral?", "lateral", "AP or lateral", "undecided"),
        ("Is it solid, cystic, or mixed?", "solid", "mixed", "wrong"),
        ("Is it less than or greater than 5 cm?", "less than", "less than 5 cm", "right"),
    ],
)
def test_options_in_prompts_of_every_kind(question, reference, prediction, expected):
    assert verdict(Answer(reference, prediction, question)) == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ER +", "ER -"),
        ("HER2 +", "HER2 -"),
        ("HER2+", "HER2-"),
        ("T1↑", "T1↓"),
        ("L > R", "L < R"),
        ("left > right", "left < right"),
        ("Gleason 3+4", "Gleason 3 4"),
    ],
)
def test_signs_apart_from_their_word(first, second):
    assert not same_text(first, second)
    assert problem(first, second, 9) is None
