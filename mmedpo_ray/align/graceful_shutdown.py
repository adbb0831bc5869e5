"""Ray Train workers that save before they stop: on SIGTERM, as a spot machine gets it, and when Ray resizes the group.

Ray runs the training function in a thread of the worker process, where signals cannot be caught, and its own handler ends the
process at once. So the handler is put in from outside, on the process's main thread, when the worker group has started. When
the group of an elastic run changes its size, Ray kills the workers in the middle of a step; here they are asked to save first.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

log = logging.getLogger(__name__)

# Whether the training function is not running in this process.
_idle = threading.Event()
_idle.set()


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Marks the time in which this process trains, so that a request to stop is worth waiting for."""
    _idle.clear()
    try:
        yield
    finally:
        _idle.set()


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


def _stop_and_wait(seconds: float) -> bool:
    """Asks this worker's training loop to save and end; returns whether it ended in time."""
    from mmedpo_ray.align import loop

    loop.stop_requested.set()
    return _idle.wait(seconds)


class _StoppableBackend(_TorchBackend):
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        if not all(worker_group.execute(_save_before_dying)):
            log.warning(
                "align: SIGTERM cannot be caught in these workers; a lost machine costs the steps since the last checkpoint"
            )

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        if not _has_failed(worker_group):
            _stop_group(worker_group, backend_config.stop_seconds)
        super().on_shutdown(worker_group, backend_config)


def _has_failed(worker_group: Any) -> bool:
    """Whether a rank is gone, so that the others wait for it in vain."""
    status = worker_group.get_latest_poll_status()
    return status is not None and bool(status.errors)


def _stop_group(worker_group: Any, seconds: float) -> None:
    """Lets running ranks save, all after the same step; those that have ended answer at once."""
    answers = worker_group.execute_async(_stop_and_wait, seconds)
    try:
        has_stopped = all(ray.get(answers, timeout=seconds + 5))
    except RayError:
        has_stopped = False
    if not has_stopped:
        log.warning(
            "align: the workers did not save within %g s; the steps since the last checkpoint are repeated",
            seconds,
        )


@dataclass
class StoppableTorchConfig(TorchConfig):
    """``TorchConfig`` whose workers save when they get SIGTERM or their group changes its size.

    Attributes:
        stop_seconds: how long a group that is to be resized may take for the step under way and its checkpoint.
    """

    stop_seconds: float = 120.0

    @property
    def backend_cls(self) -> type[_StoppableBackend]:
        return _StoppableBackend
