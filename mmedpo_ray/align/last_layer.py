"""The last decoder layer only where its output is read.

What a response's log-probability needs of the last layer are the hidden states that predict response tokens: 300 of the 1,050
tokens of a packed SLAKE image, 150 of 740 of a report. All tokens still give that layer's keys and values, but queries, output
projection and MLP (nine tenths of its work) run for those few alone. Nothing else reads the other outputs, so values and
gradients are the same.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from mmedpo_ray.align.tree_attention import attention_bias, masked_attention

# Pre-norm layers of one anatomy: norm, attention with rotary embedding, residual, norm, gated MLP, residual.
_KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}


def install(language_model: Any) -> None:
    """Cuts the last layer of a transformers language model to the positions in the keyword ``outputs`` of its forward.

    Its ``last_hidden_state`` is then (R, O, D) instead of (R, T, D). A layer of unknown anatomy is left as it is.
    """
    layer = language_model.layers[-1]
    if type(layer).__name__ in _KNOWN:
        layer.forward = types.MethodType(_forward, layer)


def is_installed(language_model: Any) -> bool:
    """Whether the model's last layer computes the positions in ``outputs`` alone."""
    return getattr(language_model.layers[-1].forward, "__func__", None) is _forward


def bias(sees: Tensor, language_model: Any) -> Tensor:
    """What the positions in ``outputs`` see, (R, O, T) bool, as the keyword ``bias`` of the model's forward."""
    config = language_model.config
    return attention_bias(
        sees, config.num_attention_heads // config.num_key_value_heads, language_model.dtype
    )


def _forward(
    self: Any,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    outputs: Tensor,
    bias: Tensor,
    **_: Any,
) -> Tensor:
    """A decoder layer at a few positions.

    Args:
        self: the layer.
        hidden_states: (R, T, D).
        position_embeddings: cosines and sines, (R, T, head size) or (1, T, head size) each.
        outputs: (R, O) int64, the positions.
        bias: (R, 1, (H / K)·O, T), what these attend to (:func:`~mmedpo_ray.align.tree_attention.attention_bias`).

    Returns:
        (R, O, D).
    """
    attention = self.self_attn
    states = self.input_layernorm(hidden_states)
    cos, sin = (part.expand(*states.shape[:2], -1) for part in position_embeddings)
    key = _rotate(_heads(attention.k_proj(states), attention.head_dim), cos, sin)
    value = _heads(attention.v_proj(states), attention.head_dim)
    query = _heads(attention.q_proj(_at(states, outputs)), attention.head_dim)
    query = _rotate(query, _at(cos, outputs), _at(sin, outputs))
    attended = masked_attention(query, key, value, bias, attention.scaling)
    hidden = _at(hidden_states, outputs) + attention.o_proj(attended.flatten(2))
    return hidden + self.mlp(self.post_attention_layernorm(hidden))


def _at(states: Tensor, positions: Tensor) -> Tensor:
    """(R, T, D) at (R, O) positions → (R, O, D)."""
    rows, length, size = states.shape
    start = length * torch.arange(rows, device=states.device)[:, None]
    return (
        states.reshape(-1, size).index_select(0, (positions + start).flatten()).view(*positions.shape, size)
    )


def _heads(states: Tensor, size: int) -> Tensor:
    """(R, T, H·D) → (R, H, T, D)."""
    return states.view(*states.shape[:-1], -1, size).transpose(1, 2)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of (R, H, T, D) in Llama's order of dimensions: halves, not neighbours."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
