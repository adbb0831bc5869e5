"""The shipped model in the real vLLM engine: the same prompt tokens and greedy answers as in transformers."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from mmedpo_ray.models.loading import EMBEDDED_FOLDER, PromptWriter, load_model, load_processor
from mmedpo_ray.phantom.model_scores import answer
from mmedpo_ray.phantom.world import generate

pytestmark = pytest.mark.engine


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_vllm_and_transformers_agree(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    rows = [(Image.fromarray(p.image), q) for p in generate("test", 5, 9) for q in p.questions]
    engine = LLM(
        str(EMBEDDED_FOLDER),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=16,
        limit_mm_per_prompt={"image": 1},
    )
    try:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": data_url(image)}},
                        {"type": "text", "text": question.question},
                    ],
                }
            ]
            for image, question in rows
        ]
        settings = SamplingParams(temperature=0, max_tokens=64)
        outputs = engine.chat(conversations, settings, use_tqdm=False)
    finally:
        engine.llm_engine.engine_core.shutdown()
    model, processor = load_model("phantom", torch.float32), load_processor("phantom")
    writer = PromptWriter(processor)
    expected = answer(model, processor, [(image, question.question) for image, question in rows])
    for output, (_, question) in zip(outputs, rows, strict=True):
        assert output.prompt_token_ids == writer.prompt(question.question)
        assert output.outputs[0].finish_reason == "stop"
    same = sum(output.outputs[0].text.strip() == text for output, text in zip(outputs, expected, strict=True))
    assert same >= len(rows) - 1  # two near-equal logits may fall either way in another kernel
