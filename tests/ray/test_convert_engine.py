"""A converted LLaVA-Med answers in vLLM as in transformers and as the original's own forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_llava_med import NUM_PATCHES, Original, build_tiny_llava_med, original_pixels
from vllm_tokens import vllm_tokens

from mmedpo_ray.convert.checkpoint import convert
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter

QUESTIONS = ["Is there a nodule in the left lung?", "What is shown in the image?"]
NUM_TOKENS = 8


def image() -> Image.Image:
    """Wider than high, so that it has to be padded."""
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (30, 50, 3), dtype=np.uint8))


def original_tokens(original: Original, question: str) -> list[int]:
    """Greedy decoding with the original's forward pass."""
    ids = original.prompt_ids(question)
    answer: list[int] = []
    for _ in range(NUM_TOKENS):
        answer.append(int(original.logits(ids + answer, original_pixels(image()))[-1].argmax()))
    return answer


def transformers_tokens(folder: Path, question: str) -> list[int]:
    model = load_model(str(folder), torch.float32)
    writer = PromptWriter(load_processor(str(folder)))
    ids = torch.tensor([writer.prompt(question)])
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **writer.pixels([image()]),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.engine
def test_the_same_greedy_tokens_in_vllm_transformers_and_the_original(tmp_path: Path) -> None:
    original = build_tiny_llava_med(tmp_path / "original")
    # Several shards, as the real one has.
    model = convert(original.folder, tmp_path / "converted", max_shard_bytes=200_000).out
    expected = [original_tokens(original, question) for question in QUESTIONS]
    assert expected[0] != expected[1]
    assert [transformers_tokens(model, question) for question in QUESTIONS] == expected
    prompts = [(image(), question) for question in QUESTIONS]
    (found,) = vllm_tokens([model], prompts, max_tokens=NUM_TOKENS, ignore_eos=True)
    assert [tokens["answer"] for tokens in found] == expected
    image_id = original.pieces.piece_to_id("<0xFF>")
    for tokens, question in zip(found, QUESTIONS, strict=True):
        widened: list[int] = []
        for token in original.prompt_ids(question):
            widened += [image_id] * NUM_PATCHES if token == -1 else [token]
        assert tokens["prompt"] == widened
