"""Language models set up for packed trees compute what transformers' own forwards compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from mmedpo_ray.align.packing import fast_layers
from mmedpo_ray.align.packing.logps import response_logps, use_packed_forward
from mmedpo_ray.align.packing.trees import PackedTrees, TokenSequence, pack

IMAGE_TOKEN, IMAGE_TOKENS, VOCABULARY = 99, 4, 100


def build(text_config: type) -> Any:
    torch.manual_seed(0)
    text = text_config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    if hasattr(text, "sliding_window"):
        text.sliding_window = None
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE_TOKEN,
            image_seq_length=IMAGE_TOKENS,
        )
    )
    return model.requires_grad_(True)


@pytest.fixture(scope="module")
def packed_trees() -> PackedTrees:
    start = [1, *[IMAGE_TOKEN] * IMAGE_TOKENS, 2]
    sequences = [
        TokenSequence([*start, *question], answer, image)
        for image, question, answer in (
            (0, [3, 4, 5], [6, 7, 8]),
            (0, [3, 4, 5], [6, 9]),
            (0, [3, 10], [11]),
            (1, [3, 4, 5], [6, 7, 8]),
        )
    ]
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return pack(sequences, {"pixel_values": pixels}, pad_token_id=0)


@pytest.mark.parametrize("attention", ["tree", "sdpa"])
@pytest.mark.parametrize(
    ("text_config", "is_known"),
    [(MistralConfig, True), (LlamaConfig, True), (Qwen2Config, True), (Qwen3Config, False)],
)
def test_log_probabilities_and_gradients_are_transformers_own(
    text_config: type, is_known: bool, attention: str, packed_trees: PackedTrees
) -> None:
    """All weights are trained here; an architecture that is not known still attends along trees."""
    plain = build(text_config)
    fast = copy.deepcopy(plain)
    use_packed_forward(fast, attention=attention)
    assert fast_layers.is_installed(fast.model.language_model) == is_known
    logps = [response_logps(model, packed_trees).logps for model in (plain, fast)]
    assert torch.allclose(*logps, atol=1e-4)
    for found in logps:
        found.sum().backward()
    for (name, left), right in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        if left.grad is not None:
            scale = float(left.grad.abs().max()) + 1.0
            assert torch.allclose(left.grad, right.grad, atol=1e-5 * scale), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_transformers_own(dtype: torch.dtype) -> None:
    norm = MistralRMSNorm(16, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 16, dtype=dtype, requires_grad=True)
    expected, found = norm(x), fast_layers._RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    grad = torch.randn_like(expected)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert torch.allclose(found, expected, atol=tolerance / 10)
    for left, right in zip(
        torch.autograd.grad(found, [x, norm.weight], grad),
        torch.autograd.grad(expected, [x, norm.weight], grad),
        strict=True,
    ):
        assert torch.allclose(left, right, atol=tolerance, rtol=tolerance)
