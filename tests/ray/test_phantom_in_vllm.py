"""The shipped model in the real vLLM engine: the same prompt tokens and greedy answers as in transformers."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from vllm_tokens import vllm_tokens

from mmedpo_ray.models.loading import EMBEDDED_FOLDER, load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.phantom.model_scores import answer
from mmedpo_ray.phantom.world import generate

pytestmark = pytest.mark.engine


def test_vllm_and_transformers_agree() -> None:
    phantoms = list(generate("test", 5, 9))
    prompts = [(Image.fromarray(p.image), q.question) for p in phantoms for q in p.questions]
    (found,) = vllm_tokens([EMBEDDED_FOLDER], prompts, max_tokens=64)
    model, processor = load_model("phantom", torch.float32), load_processor("phantom")
    writer, tokenizer = PromptWriter(processor), processor.tokenizer
    for tokens, (_, question) in zip(found, prompts, strict=True):
        assert tokens["prompt"] == writer.prompt(question)
        assert tokens["answer"][-1] == writer.end_token_id
    texts = [tokenizer.decode(tokens["answer"], skip_special_tokens=True).strip() for tokens in found]
    expected = answer(model, processor, prompts)
    same = sum(text == other for text, other in zip(texts, expected, strict=True))
    assert same >= len(prompts) - 1  # two near-equal logits may fall either way in another kernel
