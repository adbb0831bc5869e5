"""Comparing finished training runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmedpo_ray.align.metrics import read_metrics


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The trained adapter of a run."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_training(found: Path, expected: Path, tolerance: float = 2e-5) -> None:
    """The same figures at every step and the same adapter at the end, up to the order of float32 sums.

    ``tolerance`` is absolute on weights; an update moves them by up to the learning rate of 2e-3.
    """
    left, right = read_metrics(found), read_metrics(expected)
    assert [row["step"] for row in left] == [row["step"] for row in right]
    for row, other in zip(left, right, strict=True):
        for key in ("loss", "nll", "reward_margin", "reward_accuracy", "grad_norm", "lr", "pairs", "ess"):
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), (row["step"], key)
    ours, theirs = adapter(found), adapter(expected)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=0, atol=tolerance), name
    assert max(float(value.abs().max()) for name, value in ours.items() if "lora_B" in name) > 1e-3, (
        "nothing was learnt"
    )
