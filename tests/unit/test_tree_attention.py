"""Tree attention equals attention under a dense mask, on any trees and with any block size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from mmedpo_ray.align.packing import tree_attention
from mmedpo_ray.align.packing.logps import response_logps, use_packed_forward
from mmedpo_ray.align.packing.tree_attention import LayerTree, attention_bias
from mmedpo_ray.align.packing.trees import PackedTrees, TokenSequence, pack
from mmedpo_ray.errors import UserError

HEADS, KEY_HEADS, SIZE = 4, 2, 8
SCALING = SIZE**-0.5

tokens = st.lists(st.integers(1, 3), min_size=1, max_size=9)


def draw_states(packed_trees: PackedTrees, heads: int, seed: int) -> Tensor:
    """(R, H, T, D) as a layer makes them: a transposed view."""
    rows, length = packed_trees.input_ids.shape
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, length, heads, SIZE, dtype=torch.float64, generator=generator)
    return states.requires_grad_().transpose(1, 2)


def dense(query: Tensor, key: Tensor, value: Tensor, packed_trees: PackedTrees) -> Tensor:
    key, value = (part.repeat_interleave(HEADS // KEY_HEADS, dim=1) for part in (key, value))
    mask = packed_trees.dense_mask()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALING).transpose(1, 2)


@pytest.mark.parametrize("block", [1, 3, 192])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(st.tuples(tokens, tokens, st.integers(0, 2)), min_size=1, max_size=9))
def test_values_and_gradients_are_those_of_the_dense_mask(
    items: list[tuple[list[int], list[int], int]], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_attention, "QUERIES_PER_BLOCK", block)
    images = sorted({image for _, _, image in items})
    sequences = [TokenSequence(prompt, response, images.index(image)) for prompt, response, image in items]
    packed_trees = pack(sequences, {"pixel_values": torch.zeros(len(images), 3, 2, 2)}, pad_token_id=0)
    states = [
        draw_states(packed_trees, heads, seed) for seed, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS))
    ]
    config = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS)
    model = SimpleNamespace(config=config, dtype=torch.float64)
    bias = attention_bias(packed_trees.layout.sees, model)
    ours = tree_attention.tree_attention(*states, LayerTree(packed_trees.layout, bias), SCALING)
    theirs = dense(*states, packed_trees)
    is_token = torch.ones(packed_trees.input_ids.shape, dtype=torch.bool)
    is_token.view(-1)[packed_trees.layout.padding] = False
    assert torch.allclose(ours[is_token], theirs[is_token], atol=1e-12)
    weights = torch.randn(
        ours[is_token].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    found, expected = (
        torch.autograd.grad((output[is_token] * weights).sum(), states, retain_graph=True)
        for output in (ours, theirs)
    )
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left, right, atol=1e-12)


def test_filling_is_no_tree_and_a_trunk_is_in_no_block() -> None:
    trunk = list(range(10, 30))
    sequences = [
        TokenSequence(trunk, [1, 2, 3], 0),
        TokenSequence(trunk, [4, 5], 0),
        TokenSequence(list(range(40, 62)), [8], 1),
    ]
    layout = pack([*sequences], {"pixel_values": torch.zeros(2, 3, 2, 2)}, pad_token_id=0).layout
    assert layout.trunk_shape == (2, 22)
    assert layout.owner.tolist() == [0], "three branch tokens of the first tree are one block"
    assert layout.sees.shape == (1, 3, 22 + 3)
    assert layout.padding.tolist() == [45], "the second row lacks one token"


BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What the defaults of a family's configuration have of another size.
OTHERWISE: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 2.0},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2, "sliding_window": None},
    "phi3": {"sliding_window": None},
    "starcoder2": {"sliding_window": None},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
}


def llava_around(family: str) -> Any:
    """A tiny LLaVA with a language model of another family; random weights of several times the usual
    scale."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        text_config=AutoConfig.for_model(family, **(BASE | OTHERWISE.get(family, {}))),
        image_token_index=299,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).float().eval().requires_grad_(False)
    for parameter in model.model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(5)
    model.lm_head.weight.mul_(8)
    return model


# tests/invariant/test_architectures.py has these, which only stand in models of their own.
OF_THEIR_OWN = {"qwen2_5_vl_text", "qwen3_vl_text"}


@pytest.mark.parametrize("family", sorted(tree_attention.KNOWN_FAMILIES - OF_THEIR_OWN))
def test_a_known_family_computes_as_transformers_own_attention_does(family: str) -> None:
    model = llava_around(family)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    drawn = torch.randint(3, 298, (4, 20), generator=generator).tolist()
    sequences = [
        TokenSequence([1, *[299] * 4, *drawn[number][:6]], drawn[other][6 : 9 + 6 * number], 0)
        for number in range(2)
        for other in (2, 3)
    ]
    model.set_attn_implementation("eager")
    expected = []
    for prompt, response in ((sequence.prompt, sequence.response) for sequence in sequences):
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0]
        logps = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)
        expected.append(logps.gather(1, torch.tensor(response)[:, None]).sum())
    use_packed_forward(model)
    found = response_logps(model, pack(sequences, {"pixel_values": pixels}, pad_token_id=0)).logps
    assert torch.allclose(found, torch.stack(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "stablelm", "gpt_neox", "ministral"])
def test_a_family_that_is_not_known_to_attend_along_trees_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=rf"{family}.*Known to work are .*llama.*qwen3"):
        use_packed_forward(llava_around(family))


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_soft_capping_is_refused_by_every_attention(attention: str) -> None:
    with pytest.raises(UserError, match=r"gemma2.*attn_logit_softcapping"):
        use_packed_forward(llava_around("gemma2"), attention=attention)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "dropout"])
def test_an_attention_of_another_kind_is_refused(name: str) -> None:
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(UserError, match=name):
        tree_attention.attention_of_a_layer(
            None, states, states, states, None, scaling=1.0, tree=None, **{name: 2.0}
        )


def test_a_layer_that_is_not_given_the_tree_says_so() -> None:
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(UserError, match="does not pass"):
        tree_attention.attention_of_a_layer(
            None, states, states, states, None, scaling=1.0, softcap=None, sliding_window=4
        )
