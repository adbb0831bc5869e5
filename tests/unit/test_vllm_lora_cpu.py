"""LoRA operations of the CPU engine against the plain formula, token by token, and against vLLM's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmedpo_ray.compat import vllm_lora_cpu

ADAPTERS, INPUT, RANK, OUTPUT = 2, 6, 4, 10


@pytest.fixture(params=["few tokens", "many tokens"])
def world(request, monkeypatch):
    if request.param == "many tokens":
        monkeypatch.setattr(vllm_lora_cpu, "_FEW_ROWS", 0)
    generator = torch.Generator().manual_seed(0)
    indices = torch.tensor([0, -1, 1, 1, -1, 0, 0])
    return {
        "x": torch.randn(len(indices), INPUT, generator=generator),
        "a": torch.randn(ADAPTERS, 1, RANK, INPUT, generator=generator),
        "b": torch.randn(ADAPTERS, 1, OUTPUT, RANK, generator=generator),
        "indices": indices,
    }


def expected_delta(world, scaling: float) -> torch.Tensor:
    rows = []
    for x, index in zip(world["x"], world["indices"].tolist(), strict=True):
        if index < 0:
            rows.append(torch.zeros(OUTPUT))
        else:
            rows.append(scaling * world["b"][index, 0] @ (world["a"][index, 0] @ x))
    return torch.stack(rows)


def test_each_token_gets_its_own_adapter_and_none_without_one(world):
    hidden = torch.zeros(7, RANK)
    vllm_lora_cpu.bgmv_shrink(world["x"], world["a"], hidden, world["indices"], 2.0)
    output = torch.ones(7, OUTPUT)
    vllm_lora_cpu.bgmv_expand(hidden, world["b"], output, world["indices"], True)
    torch.testing.assert_close(output, 1 + expected_delta(world, 2.0))
    assert torch.equal(output[1], torch.ones(OUTPUT))


def test_a_slice_leaves_the_rest_alone(world):
    hidden = torch.zeros(7, RANK)
    vllm_lora_cpu.bgmv_shrink(world["x"], world["a"], hidden, world["indices"], 1.0)
    output = torch.ones(7, 3 + OUTPUT + 2)
    vllm_lora_cpu.bgmv_expand_slice(hidden, world["b"], output, world["indices"], 3, OUTPUT, False)
    torch.testing.assert_close(output[:, 3 : 3 + OUTPUT], expected_delta(world, 1.0))
    assert torch.equal(output[:, :3], torch.ones(7, 3))
    assert torch.equal(output[:, -2:], torch.ones(7, 2))


def test_sequences_equal_their_tokens(world):
    lengths, of_sequence = torch.tensor([2, 1, 4]), torch.tensor([1, -1, 0])
    of_token = torch.repeat_interleave(of_sequence, lengths)
    by_sequence, by_token = torch.zeros(7, RANK), torch.zeros(7, RANK)
    starts = torch.tensor([0, 2, 3])
    operations = vllm_lora_cpu.OPERATIONS
    operations["sgmv_shrink"](world["x"], world["a"], by_sequence, starts, lengths, of_sequence, 3, 4, 7, 0.5)
    vllm_lora_cpu.bgmv_shrink(world["x"], world["a"], by_token, of_token, 0.5)
    torch.testing.assert_close(by_sequence, by_token)
    first, second = torch.zeros(7, OUTPUT), torch.zeros(7, OUTPUT)
    operations["sgmv_expand"](by_sequence, world["b"], first, starts, lengths, of_sequence, 3, 4, 7, True)
    operations["sgmv_expand_slice"](
        by_sequence, world["b"], second, starts, lengths, of_sequence, 3, 4, 7, 0, OUTPUT, True
    )
    torch.testing.assert_close(first, second)


@pytest.fixture(scope="module")
def vllm_ops() -> ModuleType:
    """vLLM's own operations, without the rest of vLLM."""
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None
    folder = Path(next(iter(vllm.submodule_search_locations or [])))
    spec = importlib.util.spec_from_file_location("lora_ops", folder / "lora/ops/torch_ops/lora_ops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_operations_replace_vllms_where_all_tokens_have_an_adapter(world, vllm_ops):
    """All of them, with vLLM's positional parameters; a release that changes them fails here."""
    lengths, of_sequence = torch.tensor([2, 1, 4]), torch.tensor([1, 0, 0])
    metadata = (torch.tensor([0, 2, 3]), lengths, of_sequence, 3, 4, 7)
    hidden = torch.randn(7, RANK, generator=torch.Generator().manual_seed(1))
    arguments = {"shrink": (0.5,), "expand": (True,), "expand_slice": (2, OUTPUT, True)}
    for name, operation in vllm_lora_cpu.OPERATIONS.items():
        kind = name.split("_", 1)[1]
        inputs, weights = (world["x"], world["a"]) if kind == "shrink" else (hidden, world["b"])
        indices = metadata if name.startswith("sgmv") else (torch.repeat_interleave(of_sequence, lengths),)
        found, expected = (torch.ones(7, RANK if kind == "shrink" else OUTPUT + 3) for _ in range(2))
        operation(inputs, weights, found, *indices, *arguments[kind])
        getattr(vllm_ops, name)(inputs, weights, expected, *indices, *arguments[kind])
        torch.testing.assert_close(found, expected, msg=name)


def test_vllm_still_gives_tokens_without_an_adapter_the_last_one(world, vllm_ops):
    """Once this fails, the replacement is needed for speed alone."""
    hidden = torch.zeros(7, RANK)
    vllm_ops.bgmv_shrink(world["x"], world["a"], hidden, world["indices"], 1.0)
    assert hidden[world["indices"] < 0].abs().min() > 0
