"""The checkpoints of a running training: where it resumes, what it saves, and its result."""

from __future__ import annotations

import logging
import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from mmedpo_ray.align.checkpoint.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    State,
    load_best_checkpoint,
    load_last_checkpoint,
    set_aside_unusable,
)
from mmedpo_ray.align.checkpoint.output_weights import write_output
from mmedpo_ray.align.checkpoint.run_lock import check_claim
from mmedpo_ray.align.engines.base import Engine
from mmedpo_ray.align.policy import TrainingSpec
from mmedpo_ray.errors import UserError

log = logging.getLogger(__name__)


class CheckpointManager:
    """Gathers checkpoints on all ranks and writes them on rank 0.

    All ranks call every method together.

    Args:
        spec: the run. The default process group must be initialised.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        self._spec = spec
        self._rank = dist.get_rank()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[Path] | None = None
        self._saved_step = -1
        self._lowest_loss = math.inf

    def resume(self) -> Checkpoint | None:
        """The checkpoint to resume from; damaged ones are renamed and kept.

        Raises:
            UserError: the ranks see different ones.
            OSError: names an existing file of a checkpoint that cannot be read; nothing was changed.
        """
        folder, key = self._spec.folder, self._spec.key
        found, best = load_last_checkpoint(folder, key), load_best_checkpoint(folder, key)
        here = tuple(checkpoint.step if checkpoint else 0 for checkpoint in (found, best))
        seen: list[tuple[int, ...]] = [()] * dist.get_world_size()
        dist.all_gather_object(seen, here)
        if len(set(seen)) > 1:
            raise UserError(
                f"align: the ranks see different checkpoints in {folder} (steps "
                f"{[steps[0] for steps in seen]}). All nodes must share this folder (NFS, Lustre, FSx); set "
                "run.folder to one they share."
            )
        if self._rank == 0:
            set_aside_unusable(folder, key)
        if best is not None and best.validation_loss is not None:
            self._lowest_loss = best.validation_loss
        if found is not None:
            self._saved_step = found.step
        return found

    def is_best(self, validation_loss: float | None) -> bool:
        """Whether a validation loss (``None``: not measured or not finite) is the lowest so far."""
        if validation_loss is None or validation_loss >= self._lowest_loss:
            return False
        self._lowest_loss = validation_loss
        return True

    def save(self, engine: Engine, step: int, validation_loss: float | None) -> None:
        """Gathers the state by parameter; the last two shards are written while training continues."""
        if step == self._saved_step:
            return
        self.wait()
        writer = None
        if self._rank == 0:
            spec, state = self._spec, State(step, self._spec.key, validation_loss)
            writer = CheckpointWriter(
                spec.folder, state, spec.align.keep_checkpoints, self._pool, spec.launch
            )
        for name, tensors in engine.state():
            if writer is not None:
                writer.add(name, tensors)
        if writer is not None:
            self._written = writer.finish()
        self._saved_step = step

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._written is not None:
            self._written.result()
            self._written = None
        dist.barrier()

    def finish(self, engine: Engine, step: int, validation_loss: float | None) -> None:
        """Saves the last state, and writes the result: the last or the best weights (``align.keep``)."""
        self.save(engine, step, validation_loss)
        self.wait()
        if self._rank == 0:
            folder, key = self._spec.folder, self._spec.key
            chosen = load_last_checkpoint(folder, key)
            if self._spec.align.keep == "best":
                best = load_best_checkpoint(folder, key)
                if best is None:
                    log.warning("align: no validation loss was finite; the last weights are kept")
                chosen = best or chosen
            assert chosen is not None
            check_claim(folder, self._spec.launch)
            write_output(engine.policy.model, chosen, folder, self._spec.dtype)
        dist.barrier()
