"""The fused LoRA forward equals peft's, in values and in every gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mmedpo_ray.align.packing import fused_lora


class Block(nn.Module):
    """Layers of one input, of several widths, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(6, 4, bias=False)
        self.plain = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return fused_lora.project(x, [self.first, self.second]) + fused_lora.project(
            x, [self.first, self.plain]
        )


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        Block().double(),
        LoraConfig(
            r=2, lora_alpha=6, target_modules=["first", "second"], rank_pattern={"second": 3}, **options
        ),
        autocast_adapter_dtype=False,
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_()
    return model


def results(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the input and of the adapter."""
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    outputs = model(x)
    trained = [value for value in model.parameters() if value.requires_grad]
    loss = sum((output * torch.arange(output.numel()).view_as(output)).sum() for output in outputs)
    return outputs, list(torch.autograd.grad(loss, [x, *trained]))


@pytest.mark.parametrize("sharded", [False, True])
def test_values_and_gradients_are_peft_s(sharded: bool) -> None:
    plain = make()
    fused = copy.deepcopy(plain)
    fused_lora.install(fused, sharded=sharded)
    for ours, theirs in zip(results(fused), results(plain), strict=True):
        for left, right in zip(ours, theirs, strict=True):
            assert torch.allclose(left, right, atol=1e-10)
    with fused.disable_adapter(), plain.disable_adapter():
        x = torch.ones(1, 6, dtype=torch.float64)
        assert all(torch.equal(left, right) for left, right in zip(fused(x), plain(x), strict=True))


def test_an_input_without_gradient_gets_none() -> None:
    model = make()
    fused_lora.install(model)
    sum(output.sum() for output in model(torch.ones(1, 6, dtype=torch.float64))).backward()
    assert model.base_model.model.first.lora_B["default"].weight.grad.abs().sum() > 0


def test_layers_with_dropout_are_left_as_they_are() -> None:
    model = make(lora_dropout=0.5)
    fused_lora.install(model)
    assert "forward" not in vars(model.base_model.model.first)
