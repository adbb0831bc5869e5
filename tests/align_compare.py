"""Comparing finished training runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmedpo_ray.align.metrics import read_metrics
from mmedpo_ray.models.shards import ShardReader

_FIGURES = (
    "loss",
    "nll",
    "reward_margin",
    "reward_accuracy",
    "grad_norm",
    "lr",
    "pairs",
    "ess",
    "kl",
    "validation_loss",
    "validation_reward_margin",
    "validation_reward_accuracy",
    "validation_nll",
)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The trained adapter of a run."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """What a run trained: its adapter, or the weights of a whole model."""
    if not (folder / "weights").is_dir():
        return adapter(folder)
    reader = ShardReader(folder / "weights")
    return {name: reader.tensor(name) for name in reader.names}


def assert_same_training(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """The same figures at every step and the same weights at the end, up to the order of float32 sums.

    ``tolerance`` is absolute on weights; an update moves them by up to the learning rate of 2e-3.
    """
    left, right = read_metrics(found), read_metrics(expected)
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for row, other in zip(left, right, strict=True):
        for key in _FIGURES:
            value, reference = row.get(key), other.get(key)
            same = None if reference is None else pytest.approx(reference, rel=1e-3, abs=1e-5)
            assert value == same, (row["step"], key)
    ours, theirs = trained(found), trained(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=tolerance), name
    moved = [float(value.abs().max()) for name, value in ours.items() if "lora_B" in name]
    assert not moved or max(moved) > 1e-3, "nothing was learnt"
