"""Checkpoints: whole or not there."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from mmedpo_ray.align.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    load_last_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from mmedpo_ray.align.metrics import MetricsWriter, read_metrics
from mmedpo_ray.align.policy import learning_rate_factor


def checkpoint(step: int, key: str = "run") -> Checkpoint:
    weight = torch.full((2, 3), float(step))
    return Checkpoint(step, key, {"a": weight}, {"exp_avg.a": weight / 2, "exp_avg_sq.a": weight / 4})


def test_the_last_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    found = load_last_checkpoint(tmp_path, "run")
    assert found is not None and found.step == 10
    assert torch.equal(found.parameters["a"], checkpoint(10).parameters["a"])
    assert torch.equal(found.moments["exp_avg_sq.a"], checkpoint(10).moments["exp_avg_sq.a"])
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-000004", "step-000010"]


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(2, key="other"), keep=2)
    assert load_last_checkpoint(tmp_path, "run") is None
    assert load_last_checkpoint(tmp_path / "empty", "run") is None


@pytest.mark.parametrize("name", ["adapter.safetensors", "moments.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, checkpoint(2), keep=3)
    save_checkpoint(tmp_path, checkpoint(4), keep=3)
    (tmp_path / "checkpoints" / "step-000004" / name).write_bytes(b"{")
    found = load_last_checkpoint(tmp_path, "run")
    assert found is not None and found.step == 2
    assert "step-000004" in caplog.text


def test_what_a_crash_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(2), keep=2)
    unfinished = tmp_path / "checkpoints" / ".step-000004.tmp"
    unfinished.mkdir()
    (unfinished / "adapter.safetensors").write_bytes(b"half")
    found = load_last_checkpoint(tmp_path, "run")
    assert found is not None and found.step == 2
    save_checkpoint(tmp_path, checkpoint(4), keep=2)
    assert not unfinished.exists()
    remove_checkpoints(tmp_path)
    assert checkpoint_folders(tmp_path) == []


def test_a_resumed_run_writes_its_figures_once(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": float(step), "reward_margin": None})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 4, "lo')
    second = MetricsWriter(tmp_path, 2)
    second.write({"step": 3, "loss": 30.0})
    second.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_learning_rate_rises_then_decays() -> None:
    cosine = [learning_rate_factor("cosine", step, 20, 0.2) for step in range(20)]
    assert cosine[:4] == [0.25, 0.5, 0.75, 1.0]
    assert cosine[4] == 1.0 and all(a > b for a, b in itertools.pairwise(cosine[4:])) and cosine[-1] > 0
    assert learning_rate_factor("linear", 12, 20, 0.2) == pytest.approx(0.5)
    assert [learning_rate_factor("constant", step, 3, 0.0) for step in range(3)] == [1.0, 1.0, 1.0]
