"""Checkpoints: whole or not there."""

from __future__ import annotations

import errno
import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from align_world import single_rank, training_spec

from mmedpo_ray.align.checkpoint import checkpoint
from mmedpo_ray.align.checkpoint.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    State,
    checkpoint_folders,
    load_best_checkpoint,
    load_last_checkpoint,
    remove_checkpoints,
    set_aside_unusable,
)
from mmedpo_ray.align.checkpoint.manager import CheckpointManager
from mmedpo_ray.align.checkpoint.run_lock import claim
from mmedpo_ray.align.metrics import MetricsWriter, read_metrics
from mmedpo_ray.align.policy import learning_rate_factor
from mmedpo_ray.errors import UserError


def save(
    folder: Path,
    step: int,
    key: str = "run",
    keep: int = 2,
    loss: float | None = None,
    shard_bytes: int = 48,
    launch: str = "",
) -> Path:
    """A checkpoint of two parameters whose values tell the step, in more than one shard."""
    with ThreadPoolExecutor(1) as pool:
        writer = CheckpointWriter(folder, State(step, key, loss), keep, pool, launch, shard_bytes)
        for name in ("a", "b"):
            weight = torch.full((2, 3), float(step))
            writer.add(name, {"parameter": weight, "exp_avg": weight / 2, "exp_avg_sq": weight / 4})
        return writer.finish().result()


@pytest.fixture
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with single_rank(tmp_path_factory.mktemp("store")):
        yield


def manager_of(folder: Path, key: str) -> CheckpointManager:
    return CheckpointManager(replace(training_spec(folder, folder / "model", folder), key=key))


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(folder)]


def test_the_last_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        save(tmp_path, step)
    found = load_last_checkpoint(tmp_path, "run")
    assert found is not None and found.step == 10
    assert found.names == ["a", "b"]
    assert torch.equal(found.parameter("a"), torch.full((2, 3), 10.0))
    assert torch.equal(found.moment("exp_avg_sq", "b"), torch.full((2, 3), 2.5))
    assert names(tmp_path) == ["step-000004", "step-000010"]
    assert len(list(found.path.glob("*.safetensors"))) == 3


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path: Path) -> None:
    save(tmp_path, 2, key="other", loss=1.0)
    assert load_last_checkpoint(tmp_path, "run") is None
    assert load_best_checkpoint(tmp_path, "run") is None
    assert load_last_checkpoint(tmp_path / "empty", "run") is None


@pytest.mark.parametrize("name", ["shard-00002.safetensors", "index.json", "state.json"])
@pytest.mark.parametrize("content", [b"{", None])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 2, loss=3.0, keep=3)
    damaged = save(tmp_path, 4, loss=1.0, keep=3) / name
    damaged.unlink()
    if content is not None:
        damaged.write_bytes(content)
    found = load_last_checkpoint(tmp_path, "run")
    assert found is not None and found.step == 2
    best = load_best_checkpoint(tmp_path, "run")
    assert best is not None and best.step == 2
    assert "step-000004" in caplog.text
    (aside,) = set_aside_unusable(tmp_path, "run")
    assert aside.name == ".damaged-step-000004" and aside.is_dir()
    assert str(aside) in caplog.text
    assert names(tmp_path) == ["step-000002"]


@pytest.mark.parametrize("name", ["shard-00002.safetensors", "index.json", "state.json"])
@pytest.mark.parametrize(
    "load",
    [
        load_last_checkpoint,
        load_best_checkpoint,
        set_aside_unusable,
        lambda folder, key: manager_of(folder, key).resume(),
    ],
)
def test_a_read_error_is_no_damage(tmp_path: Path, one_rank: None, name: str, load: Any) -> None:
    """Nor are its checkpoints considered gone: the run would start from the beginning."""
    save(tmp_path, 2, loss=3.0)
    save(tmp_path, 4, loss=1.0)
    file = tmp_path / "checkpoints/step-000004" / name
    content = file.read_bytes()
    file.unlink()
    # It is there and cannot be opened, whoever asks.
    file.symlink_to(file)
    with pytest.raises(OSError, match=re.escape(f"'{file}'")):
        load(tmp_path, "run")
    assert names(tmp_path) == ["step-000002", "step-000004"]
    file.unlink()
    file.write_bytes(content)
    found = manager_of(tmp_path, "run").resume()
    assert found is not None and found.step == 4


def test_an_error_of_the_reader_is_no_damage(
    tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4):
        save(tmp_path, step)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "ShardReader", fail)
    with pytest.raises(OSError, match=r"Input/output error.*step-000004") as raised:
        manager_of(tmp_path, "run").resume()
    assert raised.value.errno == errno.EIO
    assert names(tmp_path) == ["step-000002", "step-000004"]


def test_a_resumed_run_sets_aside_what_it_passes_over(tmp_path: Path, one_rank: None) -> None:
    """A damaged checkpoint in the middle would count as one of those to keep, and as the best."""
    for step, loss in ((2, 0.5), (4, 0.1), (6, 0.9)):
        save(tmp_path, step, keep=9, loss=loss)
    (tmp_path / "checkpoints/step-000004/shard-00001.safetensors").write_bytes(b"{")
    save(tmp_path, 8, keep=9, key="other")
    found = manager_of(tmp_path, "run").resume()
    assert found is not None and found.step == 6
    assert names(tmp_path) == ["step-000002", "step-000006"]
    hidden = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]
    assert sorted(hidden) == [".damaged-step-000004", ".damaged-step-000008"]
    save(tmp_path, 8, keep=1)
    assert names(tmp_path) == ["step-000002", "step-000008"]


def test_the_best_checkpoint_outlives_a_read_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 2, keep=1, loss=0.1)
    state = tmp_path / "checkpoints/step-000002/state.json"
    content = state.read_bytes()
    state.unlink()
    state.symlink_to(state)
    save(tmp_path, 4, keep=1, loss=0.5)
    save(tmp_path, 6, keep=1, loss=0.5)
    assert str(state) in caplog.text
    state.unlink()
    state.write_bytes(content)
    save(tmp_path, 8, keep=1, loss=0.5)
    assert names(tmp_path) == ["step-000002", "step-000008"]


@pytest.mark.parametrize("name", ["step-000010 (copy)", "step-", "step-last", "notes"])
def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path, name: str) -> None:
    save(tmp_path, 2, keep=1)
    (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints/step-000099").write_text("a file")
    save(tmp_path, 4, keep=1)
    assert set_aside_unusable(tmp_path, "run") == []
    assert names(tmp_path) == ["step-000004"]
    assert (tmp_path / "checkpoints" / name).is_dir()


def test_what_a_crash_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 2)
    unfinished = tmp_path / "checkpoints" / ".step-000004.tmp"
    unfinished.mkdir()
    (unfinished / "shard-00001.safetensors").write_bytes(b"half")
    found = load_last_checkpoint(tmp_path, "run")
    assert found is not None and found.step == 2
    save(tmp_path, 4)
    assert not unfinished.exists()
    remove_checkpoints(tmp_path)
    assert checkpoint_folders(tmp_path) == []


def test_the_best_checkpoint_stays_beside_the_last(tmp_path: Path) -> None:
    for step, loss in ((2, None), (4, 0.5), (6, 0.3), (8, 0.3), (10, 0.9), (12, None)):
        save(tmp_path, step, keep=2, loss=loss)
    assert names(tmp_path) == ["step-000006", "step-000010", "step-000012"]
    best = load_best_checkpoint(tmp_path, "run")
    assert best is not None and (best.step, best.validation_loss) == (6, 0.3)
    save(tmp_path, 14, keep=2, loss=0.1)
    assert names(tmp_path) == ["step-000012", "step-000014"]


def test_without_validation_there_is_no_best(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    assert Checkpoint(path).validation_loss is None
    assert load_best_checkpoint(tmp_path, "run") is None


def test_a_launch_that_was_replaced_cannot_write(tmp_path: Path) -> None:
    """Ray ends the ranks of a killed driver a while after another driver has taken over."""
    claim(tmp_path, "first")
    save(tmp_path, 2, keep=1, launch="first")
    claim(tmp_path, "second")
    with pytest.raises(UserError, match="another align was started"):
        save(tmp_path, 4, keep=1, launch="first")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    save(tmp_path, 4, keep=1, launch="second")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]


def test_a_launch_that_is_replaced_while_it_writes_leaves_nothing(tmp_path: Path) -> None:
    claim(tmp_path, "first")
    save(tmp_path, 2, keep=1, launch="first")
    with ThreadPoolExecutor(1) as pool:
        writer = CheckpointWriter(tmp_path, State(4, "run"), 1, pool, "first")
        writer.add("a", {"parameter": torch.zeros(2)})
        claim(tmp_path, "second")
        with pytest.raises(UserError, match="another align was started"):
            writer.finish().result()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-999999", "step-1000000"]


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
