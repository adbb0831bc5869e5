"""Ray Train workers that save before they die: SIGTERM, as a spot machine gets it, ends a run at its next step.

Ray runs the training function in a thread of the worker process, where signals cannot be caught, and its own handler ends the
process at once. So the handler is put in from outside, on the process's main thread, when the worker group has started.
"""

from __future__ import annotations

import logging
import signal
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

log = logging.getLogger(__name__)


def _save_before_dying() -> bool:
    """Lets SIGTERM set the training loop's flag; returns whether this thread could install that."""
    from mmedpo_ray.align import loop

    def request(*_: object) -> None:
        loop.stop_requested.set()

    try:
        signal.signal(signal.SIGTERM, request)
    except ValueError:
        return False
    return True


class _StoppableBackend(_TorchBackend):
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        if not all(worker_group.execute(_save_before_dying)):
            log.warning(
                "align: SIGTERM cannot be caught in these workers; a lost machine costs the steps since the last checkpoint"
            )


@dataclass
class StoppableTorchConfig(TorchConfig):
    """``TorchConfig`` whose workers catch SIGTERM."""

    @property
    def backend_cls(self) -> type[_StoppableBackend]:
        return _StoppableBackend
