"""Checkpoints of a training run: the trained parameters, Adam's moments and the position in the plan.

    <folder>/checkpoints/step-000050/{shard-00001.safetensors, …, index.json, state.json}

Tensors are stored whole, so a run may resume with another number of workers, and in shards, so that no rank
holds all of them. A checkpoint is written under a temporary name and renamed: a folder with a step's name is
complete. If it is damaged nevertheless, it is renamed (``.damaged-step-000050``) and not deleted during the
run. ``state.json`` has the step and, if the held-out images were evaluated at it, their loss: the best
checkpoint is the one with the lowest.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from mmedpo_ray.align.checkpoint.run_lock import check_claim
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.shards import SHARD_BYTES, ShardReader, ShardWriter, flush_to_disk

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Name of the folder that holds them."""
PARAMETER = "parameter"
MOMENTS = ("exp_avg", "exp_avg_sq")
_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}([0-9]+)")
_DAMAGED = ".damaged-"
_TEMPORARY = ".tmp"
_STATE = "state.json"


class DamagedCheckpointError(Exception):
    """A folder with the name of a checkpoint does not hold one."""


@dataclass(frozen=True)
class State:
    """Position of a run.

    Attributes:
        step: updates done; the next step to run.
        key: identity of the run.
        validation_loss: of the held-out images at this step; ``None`` if they were not evaluated.
    """

    step: int
    key: str
    validation_loss: float | None = None


class Checkpoint:
    """The state of a run after ``step`` updates, on disk; a tensor is read when it is requested.

    Args:
        path: folder of the checkpoint.

    Attributes:
        step, key, validation_loss: see :class:`State`.

    Raises:
        DamagedCheckpointError: a file is missing, cut off or has the wrong content.
        OSError: an existing file cannot be read, which says nothing about its content.
    """

    def __init__(self, path: Path) -> None:
        try:
            # safetensors reports any file that it cannot open as missing.
            for file in sorted(path.iterdir()):
                with file.open("rb") as opened:
                    opened.read(1)
            state = State(**json.loads((path / _STATE).read_text()))
            self._shards = ShardReader(path)
        except (
            FileNotFoundError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            SafetensorError,
        ) as error:
            raise DamagedCheckpointError(f"{path} ({type(error).__name__})") from error
        self.path = path
        self.step, self.key, self.validation_loss = state.step, state.key, state.validation_loss

    @property
    def names(self) -> list[str]:
        """Names of the trained parameters, sorted."""
        prefix = f"{PARAMETER}."
        return sorted(name.removeprefix(prefix) for name in self._shards.names if name.startswith(prefix))

    def parameter(self, name: str) -> Tensor:
        """A trained parameter, whole, float32."""
        return self._shards.tensor(f"{PARAMETER}.{name}")

    def moment(self, moment: str, name: str) -> Tensor:
        """One of :data:`MOMENTS` of a parameter, whole, float32."""
        return self._shards.tensor(f"{moment}.{name}")


class CheckpointWriter:
    """Writes a checkpoint parameter by parameter; on one rank only.

    Args:
        folder: of the run.
        state: position of the run.
        keep: checkpoints to keep, this one included; the best is kept in addition.
        pool: writes while training continues; runs one task at a time, in order.
        launch: that writes, see :mod:`mmedpo_ray.align.checkpoint.run_lock`.
        shard_bytes: see :class:`~mmedpo_ray.models.shards.ShardWriter`.

    Raises:
        UserError: another launch owns the folder; also raised at the end. Nothing is changed.
    """

    def __init__(
        self,
        folder: Path,
        state: State,
        keep: int,
        pool: Executor,
        launch: str = "",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        check_claim(folder, launch)
        self._folder, self._state, self._keep, self._pool, self._launch = folder, state, keep, pool, launch
        root = folder / CHECKPOINTS
        for unfinished in root.glob(f".{_PREFIX}*{_TEMPORARY}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        self._target = root / f"{_PREFIX}{state.step:06d}"
        # A launch that was replaced may write the same step at the same time.
        self._temporary = root / f".{self._target.name}.{launch}{_TEMPORARY}"
        self._temporary.mkdir(parents=True)
        self._shards = ShardWriter(self._temporary, pool, shard_bytes)

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Takes a parameter and its moments: :data:`PARAMETER`, :data:`MOMENTS` → whole float32 tensor."""
        for kind, tensor in tensors.items():
            self._shards.add(f"{kind}.{name}", tensor)

    def finish(self) -> Future[Path]:
        """Ends the checkpoint; the future is done when it has its name and older ones are removed."""
        return self._pool.submit(self._commit, self._shards.finish())

    def _commit(self, written: Future[None]) -> Path:
        written.result()
        state = self._temporary / _STATE
        state.write_text(json.dumps(asdict(self._state)))
        flush_to_disk(state)
        try:
            check_claim(self._folder, self._launch)
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
    """The newest usable checkpoint of this run; damaged ones are skipped with a warning.

    Args:
        folder: of the run.
        key: identity of the run; checkpoints of another are ignored.

    Raises:
        OSError: names an existing file that cannot be read.
    """
    for path in reversed(checkpoint_folders(folder)):
        found = _read(path)
        if found is None:
            log.warning("align: the checkpoint %s is damaged and is skipped", path)
        elif found.key == key:
            return found
    return None


def load_best_checkpoint(folder: Path, key: str | None) -> Checkpoint | None:
    """The usable checkpoint with the lowest validation loss, if any; the earliest of equals.

    Args:
        folder: of the run.
        key: identity of the run; ``None`` accepts any.

    Raises:
        OSError: names an existing file that cannot be read.
    """
    measured = [
        found
        for path in checkpoint_folders(folder)
        if (found := _read(path)) is not None
        and found.validation_loss is not None
        and key in (None, found.key)
    ]
    return min(measured, key=lambda found: (found.validation_loss or 0.0, found.step), default=None)


def checkpoint_folders(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; other files beside them are ignored.

    Raises:
        OSError: the folder exists and cannot be read.
    """
    try:
        # Not glob: pathlib treats a folder that it may not read as empty.
        found = [path for path in (folder / CHECKPOINTS).iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[len(_PREFIX) :]))


def remove_checkpoints(folder: Path) -> None:
    """Deletes all checkpoints of a run."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def set_aside_unusable(folder: Path, key: str) -> list[Path]:
    """Renames checkpoints that a resumed run skips, so that they are neither counted nor overwritten.

    Args:
        folder: of the run.
        key: identity of the run.

    Returns:
        The new names (``.damaged-step-…``) of checkpoints that are damaged or of another run.

    Raises:
        OSError: names an existing file that cannot be read.
    """
    renamed = []
    for path in checkpoint_folders(folder):
        found = _read(path)
        if found is None or found.key != key:
            target = path.with_name(f"{_DAMAGED}{path.name}")
            if target.exists():
                shutil.rmtree(target)
            renamed.append(path.rename(target))
            log.warning("align: %s is damaged or of another run; it is kept as %s", path, target)
    return renamed


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
        best = load_best_checkpoint(folder, None)
    except OSError as error:
        log.warning("align: all checkpoints are kept, because the best one is unknown: %s", error)
        return
    for path in paths[:-keep]:
        if best is None or path != best.path:
            shutil.rmtree(path)
