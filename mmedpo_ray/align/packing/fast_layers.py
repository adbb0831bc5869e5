"""Decoder layers for packed trees: less work, fewer passes over memory, the same values up to rounding.

* Attention follows the tree (:mod:`~mmedpo_ray.align.packing.tree_attention`).
* Layers that read one input share LoRA's products (:mod:`~mmedpo_ray.align.packing.fused_lora`).
* RMSNorm takes two passes instead of five, and three instead of eight backwards; rotary embedding three
  instead of five and six.
* The last layer runs only where its output is read. A response's log-probability needs the hidden states that
  predict its tokens: 290 of the 1,035 tokens of a packed SLAKE image, 150 of 740 of a report. All tokens
  still give that layer's keys and values, but queries, output projection and MLP (nine tenths of its work)
  run for those few.

The forwards of transformers' own modules are replaced, not the modules: names, weights and hooks
(DeepSpeed's) stay.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from mmedpo_ray.align.packing import fused_lora
from mmedpo_ray.align.packing.tree_attention import LayerTree, masked_attention, tree_attention

# Pre-norm layers of one structure: RMSNorm, attention with rotary embedding, residual, RMSNorm, gated MLP,
# residual.
_KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen2_5_VLDecoderLayer"}


def install(language_model: Any, *, along_tree: bool) -> None:
    """Replaces the forward functions of a transformers language model's layers; unknown layers stay.

    The model's forward then needs the keywords of the last layer: ``outputs`` (R, O), the positions whose
    hidden states are read, and ``bias``, their
    :func:`~mmedpo_ray.align.packing.tree_attention.attention_bias`. Its ``last_hidden_state`` is (R, O, D)
    instead of (R, T, D).

    Args:
        language_model: of a vision-language model.
        along_tree: use tree attention instead of the model's own.
    """
    layers = [layer for layer in language_model.layers if type(layer).__name__ in _KNOWN]
    if len(layers) < len(language_model.layers):
        return
    for layer in layers:
        _replace(layer.mlp, _mlp)
        if along_tree:
            _replace(layer.self_attn, _attention)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            _replace(norm, _norm)
    _replace(language_model.norm, _norm)
    _replace(layers[-1], _last_layer)


def is_installed(language_model: Any) -> bool:
    """Whether :func:`install` changed the model."""
    return getattr(language_model.layers[-1].forward, "__func__", None) is _last_layer


def _replace(module: Any, forward: Any) -> None:
    module.forward = types.MethodType(forward, module)


# ---------------------------------------------------------------------- forwards


def _attention(
    self: Any, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], tree: LayerTree, **_: Any
) -> tuple[Tensor, None]:
    """(R, T, D) → (R, T, D)."""
    states = fused_lora.project(hidden_states, [self.q_proj, self.k_proj, self.v_proj])
    query, key, value = (_heads(part, self.head_dim) for part in states)
    cos, sin = (part.unsqueeze(1) for part in position_embeddings)
    query, key = _Rotary.apply(query, cos, sin), _Rotary.apply(key, cos, sin)
    return self.o_proj(tree_attention(query, key, value, tree, self.scaling).flatten(2)), None


def _mlp(self: Any, hidden_states: Tensor) -> Tensor:
    """(..., D) → (..., D)."""
    gate, up = fused_lora.project(hidden_states, [self.gate_proj, self.up_proj])
    return self.down_proj(self.act_fn(gate) * up)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    """(..., D) → (..., D)."""
    return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def _last_layer(
    self: Any,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    outputs: Tensor,
    bias: Tensor,
    **_: Any,
) -> Tensor:
    """(R, T, D) → (R, O, D) at ``outputs`` (R, O), under the mask ``bias`` (R, 1, (H / K)·O, T)."""
    attention = self.self_attn
    states = self.input_layernorm(hidden_states)
    cos, sin = (part.expand(*states.shape[:2], -1) for part in position_embeddings)
    key, value = (
        _heads(part, attention.head_dim)
        for part in fused_lora.project(states, [attention.k_proj, attention.v_proj])
    )
    query = _heads(attention.q_proj(_at(states, outputs)), attention.head_dim)
    key = _Rotary.apply(key, cos.unsqueeze(1), sin.unsqueeze(1))
    query = _Rotary.apply(query, _at(cos, outputs).unsqueeze(1), _at(sin, outputs).unsqueeze(1))
    attended = masked_attention(query, key, value, bias, attention.scaling)
    hidden = _at(hidden_states, outputs) + attention.o_proj(attended.flatten(2))
    return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _RmsNorm(torch.autograd.Function):
    """w · x / √(mean x² + ε) over the last axis, in float32 up to the weight, as transformers computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = x.float()
        scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = scale.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        exact = x.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (exact * scale)).flatten(0, -2).sum(0).to(weight.dtype)
        weighted = (grad * weight).float()
        along = torch.linalg.vecdot(weighted, exact).unsqueeze(-1).mul_(scale.pow(3)).div_(x.shape[-1])
        grad_x = torch.addcmul(weighted.mul_(scale), exact, along, value=-1).to(x.dtype)
        return grad_x, grad_weight, None


class _Rotary(torch.autograd.Function):
    """Rotary embedding (arXiv 2104.09864) in Llama's order of dimensions: a pair has one from each half."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys (R, H, T, D) with cosines and sines (R or 1, 1, T, D)."""
        ctx.save_for_backward(cos, sin)
        (first, second), (sin_first, sin_second) = states.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        rotated = states * cos
        left, right = rotated.chunk(2, dim=-1)
        left.addcmul_(second, sin_first, value=-1)
        right.addcmul_(first, sin_second)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (first, second), (sin_first, sin_second) = grad.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        turned = grad * cos
        left, right = turned.chunk(2, dim=-1)
        left.addcmul_(second, sin_second)
        right.addcmul_(first, sin_first, value=-1)
        return turned, None, None


def _at(states: Tensor, positions: Tensor) -> Tensor:
    """(R, T, D) at (R, O) positions → (R, O, D)."""
    rows, length, size = states.shape
    start = length * torch.arange(rows, device=states.device)[:, None]
    flat = states.reshape(-1, size).index_select(0, (positions + start).flatten())
    return flat.view(*positions.shape, size)


def _heads(states: Tensor, size: int) -> Tensor:
    """(R, T, H·D) → (R, H, T, D)."""
    return states.view(*states.shape[:-1], -1, size).transpose(1, 2)
