"""A folder with another run: that run is kept, and resumed when its settings return."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mmedpo_ray.align.checkpoint.checkpoint import CheckpointWriter, State, checkpoint_folders
from mmedpo_ray.align.checkpoint.previous_runs import previous_folder, switch_run
from mmedpo_ray.align.metrics import METRICS_FILE
from mmedpo_ray.align.stage import _prepare_folder
from mmedpo_ray.errors import UserError
from mmedpo_ray.tables.provenance import by_name

BETAS = {"one": 0.1, "two": 0.2, "three": 0.3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "align"


def begin(folder: Path, key: str) -> None:
    """What :func:`~mmedpo_ray.align.stage.align` does before the ranks start."""
    switch_run(folder, key, {"align.beta": BETAS[key], "run.seed": 0}, launch="launch")
    _prepare_folder(folder, key)


def train(folder: Path, key: str, step: int = 2) -> None:
    """Leaves a checkpoint, metrics and a tracker's files."""
    begin(folder, key)
    save(folder, key, step)
    (folder / METRICS_FILE).write_text(key)
    (folder / "tensorboard").mkdir(exist_ok=True)
    (folder / "tensorboard/events").write_text(key)


def save(folder: Path, key: str, step: int) -> Path:
    with ThreadPoolExecutor(1) as pool:
        writer = CheckpointWriter(folder, State(step, key), keep=5, pool=pool, launch="launch")
        writer.add("a", {"parameter": torch.ones(2)})
        return writer.finish().result()


def finish(folder: Path, key: str) -> None:
    """Leaves a result besides."""
    train(folder, key)
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_text(key)
    (folder / "manifest.json").write_text(json.dumps({"stage": "align", "key": key}))


def steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(folder)]


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


def files(folder: Path) -> dict[str, bytes]:
    """Content by name of all files of the run in the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "attempt.json"
    }


@pytest.mark.parametrize("leave", [train, finish])
def test_changed_settings_start_a_new_run_and_the_old_ones_continue_theirs(
    folder: Path, capsys: pytest.CaptureFixture[str], leave: Any
) -> None:
    leave(folder, "one")
    before = files(folder)
    begin(folder, "two")
    printed = capsys.readouterr().err
    assert "align.beta 0.1 → 0.2" in printed and "run.seed" not in printed
    assert str(previous_folder(folder, "one")) in printed
    assert list(files(folder)) == ["key.json"]
    train(folder, "two", step=7)
    begin(folder, "one")
    assert files(folder) == before
    assert kept(folder) == ["align-previous-two"]
    assert "align-previous-two" in capsys.readouterr().err
    begin(folder, "two")
    assert steps(folder) == ["step-000007"] and kept(folder) == ["align-previous-one"]


def test_one_previous_run_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(folder, "one")
    train(folder, "two")
    assert kept(folder) == ["align-previous-one"]
    train(folder, "three")
    assert kept(folder) == ["align-previous-two"]
    assert f"removed {previous_folder(folder, 'one')}" in capsys.readouterr().err


def test_a_launch_that_trained_nothing_displaces_no_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(folder, "one")
    begin(folder, "two")
    begin(folder, "three")
    assert kept(folder) == ["align-previous-one"]
    assert "nothing had been trained" in capsys.readouterr().err
    begin(folder, "one")
    assert steps(folder) == ["step-000002"] and kept(folder) == []


@pytest.mark.parametrize("back", ["one", "two"])
@pytest.mark.parametrize("renames", range(3))
def test_a_crash_between_renames_loses_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, renames: int, back: str
) -> None:
    finish(folder, "one")
    before = files(folder)
    rename = Path.rename

    def crash(path: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return rename(path, target)

    for key in ("two", back):
        left = renames
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", crash)
            with contextlib.suppress(KeyboardInterrupt):
                begin(folder, key)
    begin(folder, "one")
    assert files(folder) == before
    assert kept(folder) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", None])
def test_a_run_whose_key_is_lost_is_kept(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    train(folder, "one")
    (folder / "key.json").unlink()
    if content is not None:
        (folder / "key.json").write_text(content)
    begin(folder, "one")
    assert steps(folder) == []
    assert steps(previous_folder(folder, "unrecorded")) == ["step-000002"]
    assert "settings that were not recorded" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_not_resumed_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(folder, "one", 2)
    (save(folder, "one", 4) / "state.json").write_text("{")
    (folder / "checkpoints/step-000010 (copy)").mkdir()
    begin(folder, "one")
    said = capsys.readouterr().err
    assert str(folder / "checkpoints/.damaged-step-000004") in said
    assert "resuming from step-000002" in said


def test_a_checkpoint_that_cannot_be_read_stops_the_driver(folder: Path) -> None:
    train(folder, "one", 2)
    state = folder / "checkpoints/step-000002/state.json"
    state.unlink()
    state.symlink_to(state)
    with pytest.raises(UserError, match=r"state\.json.* Run align again"):
        begin(folder, "one")
    assert steps(folder) == ["step-000002"]


def test_settings_have_the_names_of_the_command_line() -> None:
    assert by_name("align", {"beta": 1, "lora": {"rank": 4}}) == {"align.beta": 1, "align.lora.rank": 4}
