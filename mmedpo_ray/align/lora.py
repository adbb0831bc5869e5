"""LoRA's forward and backward as few passes over memory as there are matrix products.

peft computes W·x + s·B·(A·x) as four operations on tensors of the output's size (base, product, scaling, sum), and autograd
answers with as many. Next to matrix products with a rank of 8 to 128 these passes are not small. Here the scaling meets the
rank-sized product and both sums happen inside a product (``addmm``). Values are the same up to rounding.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _LoraProduct(torch.autograd.Function):
    """y = W·x + bias + s·B·(A·x) for a frozen W; x is (N, in), y (N, out)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        reduced = (x @ a.t()).mul_(scaling)
        ctx.save_for_backward(x, weight, a, b, reduced)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(reduced, b.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, reduced = ctx.saved_tensors
        grad_reduced = (grad @ b).mul_(ctx.scaling)
        grad_x = (grad @ weight).addmm_(grad_reduced, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_reduced.t() @ x, grad.t() @ reduced, None


def install(model: Any, *, sharded: bool = False) -> None:
    """Gives every plain LoRA layer of a peft model the fused forward.

    Left as they are: layers with dropout or several adapters, and other variants (DoRA).

    Args:
        model: a peft model; a model without LoRA is left as it is.
        sharded: its weights are gathered in hooks of the modules that hold them (ZeRO-3), so these must be called. Only the
            scaling is then moved to where the product is small.
    """
    from peft.tuners.lora import Linear

    plain: list[Any] = [layer for layer in model.modules() if type(layer) is Linear and _is_plain(layer)]
    for layer in plain:
        layer.forward = types.MethodType(_forward_by_modules if sharded else _forward, layer)


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


def _forward(self: Any, x: Tensor) -> Tensor:
    """The layer's output (..., out) for (..., in); the base's alone where the adapter is switched off or merged."""
    if self.disable_adapters or self.merged:
        return self.base_layer(x)
    (name,) = self.lora_A.keys()
    base = self.base_layer
    output = _LoraProduct.apply(
        x.reshape(-1, x.shape[-1]),
        base.weight,
        base.bias,
        self.lora_A[name].weight,
        self.lora_B[name].weight,
        self.scaling[name],
    )
    return output.view(*x.shape[:-1], -1)


def _forward_by_modules(self: Any, x: Tensor) -> Tensor:
    """The same with every weight used by the module that holds it."""
    output = self.base_layer(x)
    if self.disable_adapters or self.merged:
        return output
    (name,) = self.lora_A.keys()
    return output + self.lora_B[name](self.lora_A[name](x) * self.scaling[name])
