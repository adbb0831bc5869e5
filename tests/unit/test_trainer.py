"""What the driver of `align` does with a folder that was trained in before."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mmedpo_ray.align.checkpoint import previous_runs
from mmedpo_ray.align.checkpoint.checkpoint import CheckpointWriter, State, checkpoint_folders
from mmedpo_ray.align.checkpoint.previous_runs import has_earlier, read_identity
from mmedpo_ray.align.metrics import METRICS_FILE
from mmedpo_ray.align.stage import _prepare_folder, _take_up
from mmedpo_ray.errors import UserError
from mmedpo_ray.tables.provenance import by_name

BETAS = {"one": 0.1, "two": 0.2, "three": 0.3}


def begin(folder: Path, key: str) -> None:
    """What :func:`~mmedpo_ray.align.stage.align` does before the ranks start."""
    if has_earlier(folder, key):
        _take_up(folder, key)
    _prepare_folder(folder, key, {"align.beta": BETAS[key], "run.seed": 0})


def train(folder: Path, key: str, step: int = 2) -> None:
    """Leaves a checkpoint, metrics and a tracker's files."""
    begin(folder, key)
    save(folder, key, step)
    (folder / METRICS_FILE).write_text(key)
    (folder / "tensorboard").mkdir(exist_ok=True)
    (folder / "tensorboard/events").write_text(key)


def save(folder: Path, key: str, step: int) -> Path:
    with ThreadPoolExecutor(1) as pool:
        writer = CheckpointWriter(folder, State(step, key), keep=5, pool=pool)
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
    return sorted(path.name for path in folder.glob(".earlier-*"))


def files(folder: Path) -> dict[str, bytes]:
    """Content by name of all that belongs to the training in the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != "attempt.json"
        and not path.relative_to(folder).parts[0].startswith(".")
    }


@pytest.mark.parametrize("leave", [train, finish])
def test_changed_settings_set_aside_and_going_back_takes_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], leave: Any
) -> None:
    leave(tmp_path, "one")
    before = files(tmp_path)
    begin(tmp_path, "two")
    said = capsys.readouterr().err
    assert "align.beta 0.1 → 0.2" in said and "run.seed" not in said
    assert str(tmp_path / ".earlier-one") in said
    assert list(files(tmp_path)) == ["key.json"]
    train(tmp_path, "two", step=7)
    begin(tmp_path, "one")
    assert files(tmp_path) == before
    assert kept(tmp_path) == [".earlier-two"]
    assert ".earlier-two" in capsys.readouterr().err
    begin(tmp_path, "two")
    assert steps(tmp_path) == ["step-000007"] and kept(tmp_path) == [".earlier-one"]


def test_one_earlier_training_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "one")
    train(tmp_path, "two")
    assert kept(tmp_path) == [".earlier-one"]
    train(tmp_path, "three")
    assert kept(tmp_path) == [".earlier-two"]
    assert f"removed {tmp_path / '.earlier-one'}" in capsys.readouterr().err


def test_an_attempt_that_trained_nothing_displaces_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "one")
    begin(tmp_path, "two")
    begin(tmp_path, "three")
    assert kept(tmp_path) == [".earlier-one"]
    assert "nothing had been trained" in capsys.readouterr().err
    begin(tmp_path, "one")
    assert steps(tmp_path) == ["step-000002"] and kept(tmp_path) == []


@pytest.mark.parametrize("back", ["one", "two"])
@pytest.mark.parametrize("moves", range(6))
def test_a_crash_while_files_move_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int, back: str
) -> None:
    finish(tmp_path, "one")
    before = files(tmp_path)
    left = moves
    real = previous_runs.storage.move

    def crash(source: str, target: str) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        real(source, target)

    for key in ("two", back):
        left = moves
        with monkeypatch.context() as patched:
            patched.setattr(previous_runs.storage, "move", crash)
            with contextlib.suppress(KeyboardInterrupt):
                begin(tmp_path, key)
    begin(tmp_path, "one")
    assert files(tmp_path) == before
    assert kept(tmp_path) == []


def test_an_identity_without_settings_is_that_of_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As folders of earlier versions have it."""
    save(tmp_path, "one", 2)
    (tmp_path / "key.json").write_text('"one"')
    begin(tmp_path, "one")
    assert "resuming from step-000002" in capsys.readouterr().err
    assert read_identity(tmp_path) == ("one", {"align.beta": 0.1, "run.seed": 0})
    (tmp_path / "key.json").write_text('"one"')
    begin(tmp_path, "two")
    assert "settings that were not recorded" in capsys.readouterr().err
    assert kept(tmp_path) == [".earlier-one"]


@pytest.mark.parametrize("content", ["", "{", "[1]", None])
def test_a_folder_whose_identity_is_gone_is_set_aside(tmp_path: Path, content: str | None) -> None:
    train(tmp_path, "one")
    (tmp_path / "key.json").unlink()
    if content is not None:
        (tmp_path / "key.json").write_text(content)
    begin(tmp_path, "one")
    assert steps(tmp_path) == []
    assert steps(tmp_path / ".earlier-unrecorded") == ["step-000002"]


def test_a_damaged_checkpoint_is_named_and_not_resumed_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "one", 2)
    (save(tmp_path, "one", 4) / "state.json").write_text("{")
    (tmp_path / "checkpoints/step-000010 (copy)").mkdir()
    begin(tmp_path, "one")
    said = capsys.readouterr().err
    assert str(tmp_path / "checkpoints/.damaged-step-000004") in said
    assert "resuming from step-000002" in said


def test_a_checkpoint_that_cannot_be_read_stops_the_driver(tmp_path: Path) -> None:
    train(tmp_path, "one", 2)
    state = tmp_path / "checkpoints/step-000002/state.json"
    state.unlink()
    state.symlink_to(state)
    with pytest.raises(UserError, match=r"state\.json.* Run align again"):
        begin(tmp_path, "one")
    assert steps(tmp_path) == ["step-000002"]


def test_settings_have_the_names_of_the_command_line() -> None:
    assert by_name("align", {"beta": 1, "lora": {"rank": 4}}) == {"align.beta": 1, "align.lora.rank": 4}
