"""Ray Train workers that save a checkpoint before they stop.

They do so on SIGTERM, which spot machines send, and when Ray resizes the group.

Ray runs the training function in a thread of the worker process, where signals cannot be caught, and its own
handler ends the process at once. So the handler is installed from outside, on the process's main thread, when
the worker group has started. When an elastic run's group changes its size, Ray kills the workers in the
middle of a step; here they are asked to save first.
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

from mmedpo_ray.align import loop

log = logging.getLogger(__name__)

# Set while the training function is not running in this process.
_idle = threading.Event()
_idle.set()


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Marks the time in which this process trains: only then is it worth waiting for it to stop."""
    _idle.clear()
    try:
        yield
    finally:
        _idle.set()


def _save_on_sigterm() -> bool:
    """Lets SIGTERM set the training loop's flag; returns whether this thread could install the handler."""
    try:
        signal.signal(signal.SIGTERM, lambda *_: loop.stop_requested.set())
    except ValueError:
        return False
    return True


def _stop_and_wait(seconds: float) -> bool:
    """Asks this worker's training loop to save and end; returns whether it ended in time."""
    loop.stop_requested.set()
    return _idle.wait(seconds)


class _GracefulBackend(_TorchBackend):
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        if not all(worker_group.execute(_save_on_sigterm)):
            log.warning(
                "align: SIGTERM cannot be caught in these workers; a lost machine costs the steps since the "
                "last checkpoint"
            )

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        status = worker_group.get_latest_poll_status()
        # If a rank has failed, the others wait for it in vain.
        if status is None or not status.errors:
            _stop_group(worker_group, backend_config.stop_seconds)
        super().on_shutdown(worker_group, backend_config)


def _stop_group(worker_group: Any, seconds: float) -> None:
    """Lets running ranks save, all after the same step; ranks that have ended answer at once."""
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
class GracefulTorchConfig(TorchConfig):
    """``TorchConfig`` whose workers save on SIGTERM and before their group changes its size.

    Attributes:
        stop_seconds: time that a group has for the current step and its checkpoint before it is resized.
    """

    stop_seconds: float = 120.0

    @property
    def backend_cls(self) -> type[_GracefulBackend]:
        return _GracefulBackend
