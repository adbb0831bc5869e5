"""LoRA's forward and backward with as few passes over memory as there are matrix products.

peft computes W·x + s·B·(A·x) as four operations on tensors of the output's size (base, product, scaling,
sum), and autograd adds as many; layers that read the same input (queries, keys and values; gate and up) each
read it again. Next to matrix products with a rank of 8 to 128 these passes are not small. Here the scaling is
applied to the product of rank size, both sums happen inside a product (``addmm``), and layers of one input
share their products with A. Values are the same up to rounding.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _LoraProducts(torch.autograd.Function):
    """yᵢ = Wᵢ·x + biasᵢ + sᵢ·Bᵢ·(Aᵢ·x) for frozen Wᵢ; x is (N, in), yᵢ (N, outᵢ)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: Sequence[float], *weights: Tensor) -> tuple[Tensor, ...]:
        """``weights``: W, bias or ``None``, A and B of each layer in turn."""
        bases, biases, downs, ups = (weights[start::4] for start in range(4))
        down = torch.cat(downs) if len(downs) > 1 else downs[0]
        reduced = x @ down.t()
        ranks = [part.shape[0] for part in downs]
        for part, scaling in zip(reduced.split(ranks, dim=1), scalings, strict=True):
            part.mul_(scaling)
        ctx.save_for_backward(x, down, reduced, *bases, *ups)
        ctx.scalings, ctx.ranks = scalings, ranks
        return tuple(
            F.linear(x, base, bias).addmm_(part, up.t())
            for base, bias, up, part in zip(bases, biases, ups, reduced.split(ranks, dim=1), strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, reduced, *rest = ctx.saved_tensors
        bases, ups = rest[: len(grads)], rest[len(grads) :]
        parts = [
            (grad @ up).mul_(scaling) for grad, up, scaling in zip(grads, ups, ctx.scalings, strict=True)
        ]
        grad_reduced = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        grad_downs = (grad_reduced.t() @ x).split(ctx.ranks)
        # (rank, N)·(N, out) reads the large factor by its rows.
        grad_ups = [
            (part.t() @ grad).t() for grad, part in zip(grads, reduced.split(ctx.ranks, dim=1), strict=True)
        ]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grads[0] @ bases[0]
            for grad, base in zip(grads[1:], bases[1:], strict=True):
                grad_x.addmm_(grad, base)
            grad_x.addmm_(grad_reduced, down)
        per_layer = [
            gradient
            for down_, up_ in zip(grad_downs, grad_ups, strict=True)
            for gradient in (None, None, down_, up_)
        ]
        return grad_x, None, *per_layer


def install(model: Any, *, sharded: bool = False) -> None:
    """Gives every plain LoRA layer of a peft model the fused forward.

    Layers with dropout or several adapters, and other variants (DoRA), are left as they are.

    Args:
        model: a peft model; a model without LoRA is left as it is.
        sharded: the weights are gathered in hooks of the modules that hold them (ZeRO-3), so these must be
            called. Then only the scaling moves to the product of rank size.
    """
    from peft.tuners.lora import Linear

    plain: list[Any] = [layer for layer in model.modules() if type(layer) is Linear and _is_plain(layer)]
    for layer in plain:
        layer.forward = types.MethodType(_forward_by_modules if sharded else _forward, layer)


def project(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    """Linear layers of one input, (..., in) → (..., outᵢ); in shared products if all are fused."""
    if not all(_is_active(layer) for layer in layers):
        return [layer(x) for layer in layers]
    weights: list[Any] = []
    for layer in layers:
        (name,) = layer.lora_A.keys()
        base = layer.base_layer
        weights += [base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight]
    scalings = [next(iter(layer.scaling.values())) for layer in layers]
    outputs = _LoraProducts.apply(x.reshape(-1, x.shape[-1]), scalings, *weights)
    return [output.view(*x.shape[:-1], -1) for output in outputs]


def _is_plain(layer: Any) -> bool:
    (name, *more) = layer.lora_A.keys()
    return (
        not more
        and isinstance(layer.base_layer, torch.nn.Linear)
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and name not in layer.lora_variant
        and layer.lora_A[name].weight.dtype == layer.base_layer.weight.dtype
        and layer.lora_B[name].bias is None
        and not layer.base_layer.weight.requires_grad
    )


def _is_active(layer: Any) -> bool:
    """Whether the layer has the fused forward and its adapter is switched on."""
    is_fused = getattr(layer.forward, "__func__", None) is _forward
    return is_fused and not layer.disable_adapters and not layer.merged


def _forward(self: Any, x: Tensor) -> Tensor:
    """(..., in) → (..., out); the base layer's output if the adapter is off or merged."""
    return project(x, [self])[0] if _is_active(self) else self.base_layer(x)


def _forward_by_modules(self: Any, x: Tensor) -> Tensor:
    """As :func:`_forward`, but every weight is used by the module that holds it."""
    output = self.base_layer(x)
    if self.disable_adapters or self.merged:
        return output
    (name,) = self.lora_A.keys()
    return output + self.lora_B[name](self.lora_A[name](x) * self.scaling[name])
