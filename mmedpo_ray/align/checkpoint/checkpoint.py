"""Checkpoints of a training run: the trained parameters, Adam's moments and the position in the plan.

    <folder>/checkpoints/step-000050/{shard-00001.safetensors, …, index.json, state.json}

Tensors are stored whole, so a run may go on with another number of workers, and in shards, so that no rank holds all of them.
A checkpoint is written under a temporary name and renamed: what carries a step's name is complete. One that is found damaged
all the same is renamed (``.damaged-step-000050``) and never deleted while the run lasts. ``state.json`` has the step
and, where the held-out images were evaluated at it, their loss: the best checkpoint is the one with the lowest.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from mmedpo_ray.align.checkpoint.run_lock import check_claim
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.shards import SHARD_BYTES, ShardReader, ShardWriter, flush_to_disk

log = logging.getLogger(__name__)

_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}([0-9]+)")
_DAMAGED, _OTHER = ".damaged-", ".other-run-"
_TEMPORARY = ".tmp"
_STATE = "state.json"

CHECKPOINTS = "checkpoints"
"""Name of the folder that holds them."""
PARAMETER = "parameter"
MOMENTS = ("exp_avg", "exp_avg_sq")


# What readers raise of a file that is cut off or holds something else.
_WRONG_CONTENT = (ValueError, LookupError, TypeError, AttributeError, SafetensorError)


class DamagedCheckpointError(Exception):
    """A folder with the name of a checkpoint does not hold one."""


class Checkpoint:
    """The state of a run after ``step`` updates, on disk; tensors are read when they are asked for.

    Args:
        path: folder of the checkpoint.

    Attributes:
        step: updates done; the next step to run.
        key: identity of the run.
        validation_loss: of the held-out images at this step; ``None`` where they were not evaluated.

    Raises:
        DamagedCheckpointError: a file is missing, cut off or not what it should be.
        OSError: a file that is there cannot be read, which says nothing about what is in it.
    """

    def __init__(self, path: Path) -> None:
        try:
            # safetensors says of any file that it cannot open that it is missing.
            for file in sorted(path.iterdir()):
                with file.open("rb") as opened:
                    opened.read(1)
            state = json.loads((path / _STATE).read_text())
            self.path = path
            self.step: int = state["step"]
            self.key: str = state["key"]
            self.validation_loss: float | None = state["validation_loss"]
            self._shards = ShardReader(path)
        except (FileNotFoundError, *_WRONG_CONTENT) as error:
            raise DamagedCheckpointError(f"{path} ({type(error).__name__})") from error

    @property
    def names(self) -> list[str]:
        """Of the trained parameters, sorted."""
        prefix = f"{PARAMETER}."
        return sorted(name.removeprefix(prefix) for name in self._shards.names if name.startswith(prefix))

    def parameter(self, name: str) -> Tensor:
        """A trained parameter, whole, float32."""
        return self._shards.tensor(f"{PARAMETER}.{name}")

    def moment(self, moment: str, name: str) -> Tensor:
        """One of :data:`MOMENTS` of a parameter, whole, float32."""
        return self._shards.tensor(f"{moment}.{name}")


@dataclass(frozen=True)
class State:
    """What ``state.json`` holds; see :class:`Checkpoint`. ``attempt``, the launch that writes it, is not stored."""

    step: int
    key: str
    validation_loss: float | None = None
    attempt: str = ""


class CheckpointWriter:
    """Writes a checkpoint parameter by parameter; on one rank only.

    Args:
        folder: of the run.
        state: position of the run.
        keep: checkpoints to keep, this one included; the best stays besides.
        pool: writes while training goes on; runs one task at a time, in order.
        shard_bytes: see :class:`~mmedpo_ray.models.shards.ShardWriter`.

    Raises:
        UserError: the folder is another launch's by now; also when it is found out at the end. Nothing is changed.
    """

    def __init__(
        self, folder: Path, state: State, keep: int, pool: Executor, shard_bytes: int = SHARD_BYTES
    ) -> None:
        check_claim(folder, state.attempt)
        self._folder = folder
        self._state = state
        self._keep = keep
        self._pool = pool
        self._target = _root(folder) / f"{_PREFIX}{state.step:06d}"
        for unfinished in _root(folder).glob(f".{_PREFIX}*{_TEMPORARY}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        # A launch that was given up may write the same step at the same time.
        owner = state.attempt and f".{state.attempt}"
        self._temporary = self._target.with_name(f".{self._target.name}{owner}{_TEMPORARY}")
        self._temporary.mkdir(parents=True)
        self._shards = ShardWriter(self._temporary, pool, shard_bytes)

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Takes a parameter and its moments (:data:`PARAMETER` and :data:`MOMENTS` → whole float32 tensors)."""
        for kind, tensor in tensors.items():
            self._shards.add(f"{kind}.{name}", tensor)

    def finish(self) -> Future[Path]:
        """Ends the checkpoint; the future is done once it has its name and older ones are removed."""
        return self._pool.submit(self._commit, self._shards.finish())

    def _commit(self, written: Future[None]) -> Path:
        written.result()
        state = self._temporary / _STATE
        state.write_text(
            json.dumps(
                {
                    "step": self._state.step,
                    "key": self._state.key,
                    "validation_loss": self._state.validation_loss,
                }
            )
        )
        flush_to_disk(state)
        try:
            check_claim(self._folder, self._state.attempt)
        except UserError:
            shutil.rmtree(self._temporary)
            raise
        if self._target.exists():
            shutil.rmtree(self._target)
        self._temporary.rename(self._target)
        flush_to_disk(self._target.parent)
        _remove_old(self._folder, self._keep)
        return self._target


def load_last_checkpoint(folder: Path, key: str) -> Checkpoint | None:
    """The newest readable checkpoint of this run; damaged ones are passed over with a warning.

    Args:
        folder: of the run.
        key: identity of the run; checkpoints of another are ignored.

    Raises:
        OSError: names a file that is there and cannot be read.
    """
    return next(_readable(folder, key), None)


def load_best_checkpoint(folder: Path, key: str) -> Checkpoint | None:
    """The readable checkpoint with the lowest validation loss, the earliest of equals; ``None`` without validation.

    Raises:
        OSError: names a file that is there and cannot be read.
    """
    measured = [
        (found.validation_loss, found.step, found)
        for found in _readable(folder, key)
        if found.validation_loss is not None
    ]
    return min(measured)[-1] if measured else None


def checkpoint_folders(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; what else lies beside them is left out.

    Raises:
        OSError: the folder is there and cannot be read.
    """
    try:
        # Not a pattern: pathlib takes a folder that it may not read for an empty one.
        found = [path for path in _root(folder).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(found, key=_step)


def remove_checkpoints(folder: Path) -> None:
    """Deletes all checkpoints of a run."""
    shutil.rmtree(_root(folder), ignore_errors=True)


def set_aside_passed_over(folder: Path, key: str) -> list[Path]:
    """Takes the step's name from what a resumed run passes over, so that it is neither kept for one nor written over.

    Args:
        folder: of the run.
        key: identity of the run.

    Returns:
        Where the damaged checkpoints (``.damaged-step-…``) and those of another run (``.other-run-step-…``) are now.

    Raises:
        OSError: names a file that is there and cannot be read.
    """
    aside = []
    for path in checkpoint_folders(folder):
        found = _read(path)
        if found is not None and found.key == key:
            continue
        target = path.with_name(f"{_OTHER if found else _DAMAGED}{path.name}")
        if target.exists():
            shutil.rmtree(target)
        path.rename(target)
        log.warning(
            "align: %s is %s; it is kept as %s", path, "of another run" if found else "damaged", target
        )
        aside.append(target)
    return aside


def _readable(folder: Path, key: str) -> Iterator[Checkpoint]:
    """Readable checkpoints of this run, newest first."""
    for path in reversed(checkpoint_folders(folder)):
        found = _read(path)
        if found is None:
            log.warning("align: the checkpoint %s is damaged and is passed over", path)
        elif found.key == key:
            yield found


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint; ``None`` if it is damaged."""
    try:
        return Checkpoint(path)
    except DamagedCheckpointError:
        return None
    except OSError as error:
        # With its number an error keeps its class.
        why = f"the checkpoint cannot be read ({error.strerror or error}); nothing was changed"
        raise OSError(error.errno, why, error.filename or str(path)) from error


def _remove_old(folder: Path, keep: int) -> None:
    """Removes all but the last ``keep`` checkpoints and the best."""
    paths = checkpoint_folders(folder)
    try:
        measured = [(loss, path) for path in paths if (loss := _validation_loss(path)) is not None]
    except OSError as error:
        log.warning("align: all checkpoints stay, since which of them is the best cannot be read: %s", error)
        return
    best = min(measured, default=None)
    for path in paths[:-keep]:
        if best is None or path != best[1]:
            shutil.rmtree(path)


def _validation_loss(path: Path) -> float | None:
    """Of a checkpoint; ``None`` where it was not measured or the file is missing or damaged."""
    try:
        return json.loads((path / _STATE).read_text())["validation_loss"]
    except (FileNotFoundError, *_WRONG_CONTENT):
        return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _root(folder: Path) -> Path:
    return folder / CHECKPOINTS
