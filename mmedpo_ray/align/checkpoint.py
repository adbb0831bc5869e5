"""Checkpoints of a training run: adapter, Adam's moments and the position in the plan.

    <folder>/checkpoints/step-000050/{adapter,moments}.safetensors, state.json

Everything is stored whole, so a run may go on with another number of workers. A checkpoint is written under a temporary
name and renamed: what carries a step's name is complete.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)

_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` updates.

    Attributes:
        step: updates done; the next step to run.
        key: identity of the run.
        parameters: adapter in float32, by peft name.
        moments: ``exp_avg.<name>`` and ``exp_avg_sq.<name>``.
    """

    step: int
    key: str
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint and removes all but the last ``keep``; call it on one rank only."""
    root = folder / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"{_PREFIX}{checkpoint.step:06d}"
    temporary = root / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(checkpoint.parameters, temporary / "adapter.safetensors")
    save_file(checkpoint.moments, temporary / "moments.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": checkpoint.step, "key": checkpoint.key}))
    for file in temporary.iterdir():
        _flush(file)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    for old in checkpoint_folders(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_last_checkpoint(folder: Path, key: str) -> Checkpoint | None:
    """The newest readable checkpoint of this run; damaged ones are passed over with a warning.

    Args:
        folder: of the run.
        key: identity of the run; checkpoints of another are ignored.
    """
    for path in reversed(checkpoint_folders(folder)):
        try:
            state = json.loads((path / "state.json").read_text())
            if state["key"] != key:
                continue
            return Checkpoint(
                step=state["step"],
                key=key,
                parameters=load_file(path / "adapter.safetensors"),
                moments=load_file(path / "moments.safetensors"),
            )
        except (
            Exception
        ) as error:  # safetensors raises its own types; any unreadable checkpoint is passed over
            log.warning("checkpoint %s is unreadable (%s) and is passed over", path, type(error).__name__)
    return None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob(f"{_PREFIX}*"))


def remove_checkpoints(folder: Path) -> None:
    """Deletes all checkpoints of a run."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _flush(file: Path) -> None:
    """Forces a file to disk, so that the rename never comes first."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
