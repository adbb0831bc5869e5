"""Greedy answers of the embedded model and their scores, for the model card and the tests.

The pipeline's own evaluation (`evaluate/`) goes through the served endpoint and gives intervals; this one
runs in transformers while the model is built.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmedpo_ray.models.prompts import chat_messages
from mmedpo_ray.phantom.text import Question, report_findings
from mmedpo_ray.phantom.training import Report
from mmedpo_ray.phantom.world import Phantom


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    prompts: Sequence[tuple[Image.Image, str]],
    max_new_tokens: int = 64,
) -> list[str]:
    """Greedy answers to (image, question) pairs, as one left-padded batch."""
    template = processor.apply_chat_template
    texts = [template(chat_messages(question), add_generation_prompt=True) for _, question in prompts]
    images = [image.convert("RGB") for image, _ in prompts]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    generate: Callable[..., Any] = model.generate  # type: ignore[misc]
    output = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def score_model(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    phantoms: Sequence[Phantom],
    report: Report,
    batch_size: int = 128,
) -> dict:
    """Answer every question of the phantoms and compare with the reference.

    Returns:
        {"closed_accuracy", "open_exact", "report_f1"}: {"value": in [0, 1], "n": questions}. report_f1 is the
        F1 of the asserted findings (kind, side, zone) pooled over the reports.
    """
    rows = [(Image.fromarray(p.image), q) for p in phantoms for q in p.questions]
    order = sorted(range(len(rows)), key=lambda i: rows[i][1].task)  # reports are long, so they share batches
    answers = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        prompts = [(rows[i][0], rows[i][1].question) for i in chosen]
        for i, text in zip(chosen, answer(model, processor, prompts), strict=True):
            answers[i] = text
        report("scores", min(start + batch_size, len(rows)), len(rows))
    return score_answers([q for _, q in rows], answers)


def score_answers(questions: Sequence[Question], answers: Sequence[str]) -> dict:
    """Scores of given answers, see `score_model`."""
    hits: Counter[str] = Counter()
    total: Counter[str] = Counter()
    num_shared = num_stated = num_true = 0
    for question, text in zip(questions, answers, strict=True):
        total[question.answer_type] += 1
        if question.answer_type == "report":
            stated, true = report_findings(text), report_findings(question.answer)
            num_shared += len(stated & true)
            num_stated += len(stated)
            num_true += len(true)
        else:
            hits[question.answer_type] += _normal(text) == _normal(question.answer)
    return {
        "closed_accuracy": {"value": hits["closed"] / max(total["closed"], 1), "n": total["closed"]},
        "open_exact": {"value": hits["open"] / max(total["open"], 1), "n": total["open"]},
        "report_f1": {"value": 2 * num_shared / max(num_stated + num_true, 1), "n": total["report"]},
    }


def _normal(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
