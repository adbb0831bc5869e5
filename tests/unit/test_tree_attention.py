"""Attention along trees equals attention under a dense mask, on any forest and with any size of its blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmedpo_ray.align import tree_attention
from mmedpo_ray.align.forest import Forest, TokenSequence, pack
from mmedpo_ray.align.tree_attention import LayerTree, attention_bias

HEADS, KEY_HEADS, SIZE = 4, 2, 8
SCALING = SIZE**-0.5

tokens = st.lists(st.integers(1, 3), min_size=1, max_size=9)


def draw_states(forest: Forest, heads: int, seed: int) -> Tensor:
    """(R, H, T, D) as a layer makes them: a transposed view."""
    rows, length = forest.input_ids.shape
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, length, heads, SIZE, dtype=torch.float64, generator=generator)
    return states.requires_grad_().transpose(1, 2)


def dense(query: Tensor, key: Tensor, value: Tensor, forest: Forest) -> Tensor:
    key, value = (part.repeat_interleave(HEADS // KEY_HEADS, dim=1) for part in (key, value))
    mask = forest.dense_mask()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALING).transpose(1, 2)


@pytest.mark.parametrize("block", [1, 3, 192])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(st.tuples(tokens, tokens, st.integers(0, 2)), min_size=1, max_size=9))
def test_values_and_gradients_are_those_of_the_dense_mask(
    items: list[tuple[list[int], list[int], int]], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_attention, "QUERIES_PER_BLOCK", block)
    images = sorted({image for _, _, image in items})
    sequences = [TokenSequence(prompt, response, images.index(image)) for prompt, response, image in items]
    forest = pack(sequences, torch.zeros(len(images), 3, 2, 2), pad_token_id=0)
    states = [draw_states(forest, heads, seed) for seed, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS))]
    bias = attention_bias(forest.layout.sees, HEADS // KEY_HEADS, torch.float64)
    ours = tree_attention.tree_attention(*states, LayerTree(forest.layout, bias), SCALING)
    theirs = dense(*states, forest)
    is_token = torch.ones(forest.input_ids.shape, dtype=torch.bool)
    is_token.view(-1)[forest.layout.filling] = False
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
    layout = pack([*sequences], torch.zeros(2, 3, 2, 2), pad_token_id=0).layout
    assert layout.trunk_shape == (2, 22)
    assert layout.owner.tolist() == [0], "three branch tokens of the first tree are one block"
    assert layout.sees.shape == (1, 3, 22 + 3)
    assert layout.filling.tolist() == [45], "the second row lacks one token"
