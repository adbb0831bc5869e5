"""Log-probabilities of response tokens from hidden states: ``lm_head`` and softmax, in chunks.

E response tokens over a vocabulary of V have E·V logits in float32, and several times as many numbers in the
backward pass. Up to :data:`MOST_LOGITS` logits are computed at once and kept. More are computed chunk by
chunk, and again in the backward pass, so that only the (E,) results are kept; this costs a second product
with ``lm_head``.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedpo_ray.align.losses import kl_divergence

# 256 MiB in float32, about a gigabyte at the peak of the backward pass; 2,048 response tokens over 32,768
# entries.
MOST_LOGITS = 2**26


def install(head: Any) -> None:
    """Makes :func:`token_values` the forward of an ``lm_head``, so that DeepSpeed's hooks run."""
    head.forward = types.MethodType(token_values, head)


def is_installed(head: Any) -> bool:
    """Whether :func:`install` changed the module."""
    return getattr(head.forward, "__func__", None) is token_values


def token_values(
    head: Any,
    hidden: Tensor,
    tokens: Tensor,
    reference: Tensor | None = None,
    kl_forward_share: float | None = None,
) -> tuple[Tensor, ...]:
    """Log-probability, and optionally the reference's and the KL divergence, of each of E response tokens.

    Args:
        head: the linear layer from hidden states to logits.
        hidden: (E, D), the states that predict the tokens.
        tokens: (E,) int64.
        reference: (E, D), the same states under the reference, without a graph.
        kl_forward_share: share λ of the forward divergence; ``None``: no divergence. Needs ``reference``.

    Returns:
        (E,) float32 each, nats: log-probabilities; with ``reference`` its log-probabilities; with
        ``kl_forward_share`` the divergence (:func:`~mmedpo_ray.align.losses.kl_divergence`).
    """
    rows = max(1, MOST_LOGITS // head.weight.shape[0])
    inputs = (hidden, head.weight, head.bias, tokens, reference, kl_forward_share)
    return _values(*inputs) if len(tokens) <= rows else _Chunked.apply(*inputs, rows)


def _values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    reference: Tensor | None,
    kl_forward_share: float | None,
) -> tuple[Tensor, ...]:
    logits = F.linear(hidden, weight, bias).float()
    found = [-F.cross_entropy(logits, tokens, reduction="none")]
    if reference is not None:
        with torch.no_grad():
            reference_logits = F.linear(reference, weight, bias).float()
            found.append(-F.cross_entropy(reference_logits, tokens, reduction="none"))
        if kl_forward_share is not None:
            found.append(kl_divergence(logits, reference_logits, kl_forward_share))
    return tuple(found)


class _Chunked(torch.autograd.Function):
    """:func:`_values` in chunks of rows; the backward pass computes each chunk again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """``inputs`` are those of :func:`_values` and the number of rows in a chunk."""
        hidden, weight, bias, tokens, reference, kl_forward_share, rows = inputs
        ctx.save_for_backward(hidden, weight, bias, tokens, reference)
        ctx.kl_forward_share, ctx.rows = kl_forward_share, rows
        chunks = [
            _values(hidden[part], weight, bias, tokens[part], _at(reference, part), kl_forward_share)
            for part in _chunks(len(tokens), rows)
        ]
        found = tuple(torch.cat(column) for column in zip(*chunks, strict=True))
        if reference is not None:
            ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, reference = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        totals = [
            torch.zeros_like(value) if is_wanted else None
            for value, is_wanted in zip((hidden, weight, bias), wanted, strict=True)
        ]
        for part in _chunks(len(tokens), ctx.rows):
            leaves: list[Any] = [
                value if value is None else value.detach().requires_grad_(is_wanted)
                for value, is_wanted in zip((hidden[part], weight, bias), wanted, strict=True)
            ]
            with torch.enable_grad():
                states, *layer = leaves
                inputs = (states, layer[0], layer[1], tokens[part], _at(reference, part))
                values = _values(*inputs, ctx.kl_forward_share)
            # All but the reference's, which have no graph.
            graphs = [number for number, value in enumerate(values) if value.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [values[number] for number in graphs],
                    [leaf for leaf, is_wanted in zip(leaves, wanted, strict=True) if is_wanted],
                    [grads[number][part] for number in graphs],
                )
            )
            del values
            for index, total in enumerate(totals):
                if total is not None:
                    (total[part] if index == 0 else total).add_(next(found))
        return *totals, None, None, None, None


def _chunks(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _at(states: Tensor | None, part: slice) -> Tensor | None:
    return None if states is None else states[part]
