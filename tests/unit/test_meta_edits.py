"""Notes on an edit, refusals in Chinese and role tags are told apart from what reports say; one answer in
both engines."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mmedpo_ray.radiology import lexicon
from mmedpo_ray.radiology.lexicon.meta_text import COMMENTARY, LEAKED_PROMPT

NOTES = [
    "In the original, the nodule is on the left.",
    "The nodule is on the right (instead of left as in the original).",
    "The nodule is on the right, not the left as originally stated.",
    "The nodule is on the right, rather than on the left as originally described.",
    "As stated in the reference, it is left.",
    "Per the reference, it is left.",
    "According to the ground truth, it is left.",
    "Based on the ground truth, the answer is no",
    "Ground truth: left lung",
    "This is incorrect because the original mentions the right lung.",
    "The original says that the lungs are clear.",
    "The reference clearly states a mass.",
    "This answer differs from the reference.",
    "The statement is different from the original.",
    "This does not match the ground truth.",
    "Right lung, which is the opposite of the original",
    "Contrary to the reference, the heart is large.",
    "This changes the meaning of the original",
    "The meaning of the answer is reversed.",
    "This reverses the polarity.",
    "This contradicts the reference.",
    "The side has been flipped.",
    "The laterality was switched from left to right.",
    "The statement has been negated.",
    "The answer has been deliberately altered.",
    "The nodule is on the right (changed from left to right)",
    "Right lung [changed left lung to right lung]",
    "[Changed: left -> right]",
    "(Edit: left → right)",
    "Changed: left => right",
    "This answer is deliberately incorrect.",
    "An intentionally wrong answer: left",
    "This answer is clearly false.",
    "This statement is factually incorrect.",
    "I have intentionally introduced an error.",
    "Edited version: right lung",
    "The right lung [edited]",
    "The opposite of what was originally stated.",
    "Original: the left lung. Modified: the right lung.",
]
# Labels stand at the start of a line.
LABELS = [
    "Rewritten: the nodule is on the right.",
    "**Rewrite:** the nodule is on the right.",
    "Edited: The nodule is on the right.",
    "Edited: Cardiomegaly.",
    "Modified: No effusion is seen.",
    "Answer (modified): the right lung",
    "Response [edited]: the right lung",
    "Report (rewritten): the heart is large.",
    "Assistant: The left lung.",
    "assistant: yes",
    "ASSISTANT: Pneumonia",
    "Assistant: mild cardiomegaly",
    "Assistant:\nCT",
    "Assistant: It is a fracture.",
    "Assistant: Based on the image, this is an MRI.",
    "assistant: 左肺",
]
CHINESE = [
    "抱歉，我无法查看图像。",
    "很抱歉，我不能回答这个问题。",
    "对不起，我看不到图片。",
    "作为一个AI语言模型，我不能查看图片。",
    "作为人工智能助手，我没有看图的能力。",
    "我无法查看您提供的图像，所以不能判断。",
    "我不能提供医疗诊断。",
    "请上传图像，以便我分析。",
    "原文说左肺。",
    "与原答案相反。",
    "与原描述相反，结节位于右肺。",
    "修改后的答案：左肺",
    "改写：右肺",
    "左肺改为右肺",
    "这个答案是错误的。",
    "无法回答该问题。",
]
REPORTS = [
    "The findings contradict the original diagnosis of cancer.",
    "The imaging findings contradict the given diagnosis of pneumonia.",
    "The biopsy contradicts the original diagnosis of pneumonia.",
    "The results conflict with the original diagnosis of lymphoma.",
    "The findings contradict the original report.",
    "The given findings suggest tuberculosis.",
    "The provided findings indicate pneumonia.",
    "The original findings suggested pneumonia.",
    "The original site of the tumour is clear.",
    "In the original study no nodule was seen.",
    "The tube is in the original position.",
    "In the original and the follow-up study, no nodule is seen.",
    "The original reports are not available.",
    "The original shows a fracture.",
    "The effusion has changed from prior.",
    "Little has changed from the original.",
    "The catheter has been changed.",
    "The catheter was changed from the left to the right side.",
    "The stent was replaced on the left.",
    "The reference line is at the carina.",
    "Values according to the reference standard.",
    "According to the reference range, the size is normal.",
    "Histology was taken as ground truth.",
    "Position changed from supine to prone.",
    "Position (changed from supine to prone) is noted.",
    "Position changed from left to right lateral decubitus.",
    "The image has been flipped.",
    "The patient was flipped to the right side.",
    "The side was marked.",
    "This changes the diagnosis.",
    "This alters the management.",
    "The mental status was altered.",
    "The response was altered by steroids.",
    "Smaller than originally described.",
    "As originally described by Fleischner.",
    "As originally planned, a biopsy was taken.",
    "Contrast was originally given by mouth.",
    "Edited by Dr Smith.",
    "The flow is reversed: left -> right shunt.",
    "Left to right shunt (reversed).",
    "The anastomosis was intentionally left open.",
    "Deliberately shallow inspiration.",
    "The sides are symmetric.",
]
# At the start of a line these could be labels.
REPORT_LINES = [
    "Assistant: Dr. Smith. Procedure: lumbar puncture.",
    "Assistant: John Smith, MD.\nProcedure: lumbar puncture",
    "ASSISTANT: Prof. Miller",
    "Assistant: Mr White",
    "Assistant: A. Jones",
    "Assistant: PA Jones. Findings: normal",
    "Assistant: None. Anesthesia: local.",
    "Edited: Dr. Smith, 3 May",
    "Edited: 12/05/2021 10:13",
    "Modified: 3 May 2020",
    "Report (revised): no fracture.",
    "Report (corrected): no fracture.",
    "Changed: dressing on the left leg.",
    "Change: 5 -> 7 mm",
]
CHINESE_REPORTS = [
    "无法排除肺炎。",
    "无法查看既往图像。",
    "未提供既往影像。",
    "请提供既往影像以便对比。",
    "请结合临床。",
    "原发灶位于左肺。",
    "原发性肝癌术后改变。",
    "原文献报道的病例。",
    "与原片相比无变化。",
    "图像显示左肺结节。",
    "未见异常。",
    "作为对照，右肺清晰。",
    "术后改变，左侧引流管已更换。",
    "不能确定结节的性质。",
    "左肺",
    "心脏左右反转。",
    "左侧改为右侧卧位。",
]


@pytest.mark.parametrize(
    ("texts", "is_meta", "before"),
    [
        (NOTES, True, ("", "Normal heart. ")),
        (LABELS, True, ("", " ")),
        (CHINESE, True, ("", "右肺。")),
        (REPORTS, False, ("", "Normal heart. ")),
        (REPORT_LINES, False, ("", " ", "Normal heart. ")),
        (CHINESE_REPORTS, False, ("", "右肺。")),
    ],
    ids=("notes", "labels", "chinese", "reports", "report lines", "chinese reports"),
)
def test_notes_are_found_and_reports_are_not(
    texts: list[str], is_meta: bool, before: tuple[str, ...]
) -> None:
    asked = [start + text for start in before for text in (*texts, *map(str.upper, texts))]
    assert [text for text in asked if lexicon.is_meta_text(text) is not is_meta] == []
    flagged = pc.match_substring_regex(pa.array(asked), f"(?im){LEAKED_PROMPT}|{COMMENTARY}").to_pylist()
    assert [text for text, found in zip(asked, flagged, strict=True) if found is not is_meta] == []


@pytest.mark.parametrize(
    "piece", ["original: ", "(edit: ", "the side was changed ", "我无法看您的", "assistant: "]
)
@pytest.mark.timeout(120)
def test_a_long_text_is_searched_in_reasonable_time(piece: str) -> None:
    lexicon.is_meta_text(piece * (20_000 // len(piece)))
