"""Every architecture in the real vLLM engine: prompts, log-probabilities, answers are transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import build_tiny
from vllm_tokens import vllm_tokens

from mmedpo_ray.align.policy import target_pattern
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.models.architectures import ARCHITECTURES
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter, chat_messages

pytestmark = pytest.mark.engine

IN_EVERY_RUN = {"qwen2_5_vl"}
EXACT = [kind for kind in sorted(ARCHITECTURES) if ARCHITECTURES[kind].exact_on_cpu and kind != "llava"]
QUESTIONS = ("Is there a nodule?", "What modality is shown?", "Which organ is enlarged?")
NEW_TOKENS = 8


def image(number: int) -> Image.Image:
    height, width = ((100, 150), (120, 70), (64, 64))[number]
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def marked(kind: str) -> Any:
    return kind if kind in IN_EVERY_RUN else pytest.param(kind, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", [marked(kind) for kind in EXACT])
def test_vllm_computes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    folder = build_tiny(kind, tmp_path / "model")
    processor, model = load_processor(str(folder)), load_model(str(folder), torch.float32)
    writer = PromptWriter(processor)
    targets = target_pattern(writer.architecture, AlignConfig().lora.target_modules)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    serves_adapters = writer.architecture.serves_adapters

    prompts = [(image(number), question) for number, question in enumerate(QUESTIONS)]
    adapter = tmp_path / "adapter" if serves_adapters else None
    answers = vllm_tokens([folder], prompts, adapter=adapter, max_tokens=NEW_TOKENS, logprobs=100)
    assert len(answers) == 1 + serves_adapters
    for found, with_adapter in zip(answers, (False, True), strict=False):
        for tokens, (picture, question) in zip(found, prompts, strict=True):
            assert tokens["prompt"] == writer.prompt(question, picture.size)
            text = processor.apply_chat_template(
                chat_messages(question), tokenize=False, add_generation_prompt=True
            )
            inputs = processor(text=[text], images=[picture], return_tensors="pt", add_special_tokens=False)
            with torch.no_grad():
                if with_adapter:
                    logits, answer = _greedy(adapted, inputs)
                else:
                    with adapted.disable_adapter():
                        logits, answer = _greedy(adapted, inputs)
            expected = logits.log_softmax(-1)
            for token, logp in tokens["first"].items():
                assert logp == pytest.approx(expected[int(token)].item(), abs=1e-4)
            assert tokens["answer"] == answer


def _greedy(model: Any, inputs: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits of the first token, and the greedy answer."""
    made = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.logits[0][0].float(), made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
