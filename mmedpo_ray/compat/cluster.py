"""Joining or starting a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import ray

from mmedpo_ray.config.tree import RayConfig
from mmedpo_ray.errors import UserError

log = logging.getLogger(__name__)

# Passed to every worker process, so that actors are as quiet, as offline and as sparing with memory as the driver.
_WORKER_ENVIRONMENT = (
    "ARROW_DEFAULT_MEMORY_POOL",
    "RAY_USAGE_STATS_ENABLED",
    "VLLM_NO_USAGE_STATS",
    "DO_NOT_TRACK",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "VLLM_LOGGING_LEVEL",
    "VLLM_CONFIGURE_LOGGING",
)

# For actors that hold a model: without a limit Ray Data starts one that dies every time, as for want of memory, again for ever.
MODEL_RESTARTS = {"max_restarts": 5}

# Nothing listens there.
_NO_DASHBOARD = "http://127.0.0.1:9"

_FEWEST_LOCAL_CPUS = 4
_MOST_SECONDS_FOR_CPUS = 1.0


def start(settings: RayConfig) -> None:
    """Joins the configured cluster, or starts a local one; does nothing where Ray is already initialised.

    A local cluster gets at least four logical CPUs: an engine holds one while the stages around it want theirs, and on a
    small machine they would otherwise block one another for ever. Not many more, since Ray starts a worker process for each.

    Raises:
        UserError: the cluster does not answer.
    """
    if ray.is_initialized():
        return
    address = address_of(settings)
    environment = {key: os.environ[key] for key in _WORKER_ENVIRONMENT if key in os.environ}
    environment |= _own_cluster(address)
    options: dict = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": environment} if environment else None,
    }
    if address:
        _check_reachable(address)
        try:
            _init(address=address, **options)
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            raise _no_cluster(address, error) from error
    else:
        cpus = settings.local_cpus or max(_FEWEST_LOCAL_CPUS, os.cpu_count() or 1)
        try:
            # "local": not the cluster that somebody else may have started on this machine.
            _init(address="local", num_cpus=cpus, include_dashboard=False, **options)
        except Exception as error:
            # Ray has no class for it.
            raise UserError(
                f"a local Ray cluster does not start: {_first_line(error)} Try again when the machine is less busy; check that "
                f"{_ray_folder()} can be written to, is not full and has a short path (RAY_TMPDIR sets another one). Logs: "
                f"{_ray_folder()}/ray/session_latest/logs."
            ) from error
        log.debug("started a local Ray cluster with %d logical CPUs", cpus)
    _quiet_data()
    _quiet_shutdown()
    _learn_cpus_at_once()


def _own_cluster(address: str | None) -> dict[str, str]:
    """What makes actors ask the cluster they are in.

    Ray Train's PlacementGroupCleaner asks the newest dashboard of the machine whether its controller lives (Ray 2.60); that of
    another cluster does not know it, and the cleaner ends the training.
    """
    if address is None:
        return {"RAY_API_SERVER_ADDRESS": _NO_DASHBOARD}
    return {} if address == "auto" or "://" in address else {"RAY_ADDRESS": address}


def _init(**options: Any) -> None:
    """``ray.init`` that leaves SIGTERM to whom it was: Ray's own handler prints a stack trace and ends the process at once."""
    handler = signal.getsignal(signal.SIGTERM)
    with _without_line("RAY_BACKEND_LOG_LEVEL"):
        ray.init(**options)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _without_line(text: str) -> Iterator[None]:
    """Leaves lines with this text out of what this process writes to stderr, also past Python; the others come at the end.

    Ray reports that it honours the variable that makes it quiet, whatever its level.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            for line in said:
                if text.encode() not in line:
                    os.write(2, line)


def _ray_folder() -> str:
    return os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300].rstrip(".") + "."


def address_of(settings: RayConfig) -> str | None:
    """The cluster that settings or environment name; None: a local one."""
    return settings.address or os.environ.get("RAY_ADDRESS") or None


def _check_reachable(address: str) -> None:
    """Fails at once where nothing listens; Ray itself would try for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UserError:
    return UserError(
        f"the Ray cluster at {address!r} does not answer: {error}. Start one with `ray start --head`, correct "
        "ray.address or RAY_ADDRESS, or leave both unset to start a local cluster."
    )


def has_gpu() -> bool:
    """Whether the cluster has a GPU."""
    return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1


def room_for(resources: dict[str, float]) -> int:
    """How many workers with these resources the cluster's nodes hold at once when nothing else runs."""
    wanted = {name: amount for name, amount in resources.items() if amount > 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        # 0.3 / 0.1 is a little less than 3.
        min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in wanted.items())
        for node in nodes
    )


def may_grow() -> bool:
    """Whether an autoscaler looks after the cluster, so that what does not fit today may fit in a minute."""
    from ray._private.state import state

    return bool(state.get_max_resources_from_cluster_config())


def _quiet_data() -> None:
    if not log.isEnabledFor(logging.DEBUG):
        # What it logs as errors is raised as well, and said once.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What has no other name yet: `max_restarts`, `scheduling_strategy`, and steps that are not to be joined (Ray 2.60).
    warnings.filterwarnings("ignore", message="`ray_remote_args(_fn)?` is deprecated")


def _quiet_shutdown() -> None:
    """Ray prints that Serve's controller did not answer, when it is Serve that was told to shut down; there is no setting for it."""
    from ray._private import worker

    show = getattr(worker, "print_to_stdstream", None)
    if show is None or getattr(show, "leaves_out", False):
        return

    def show_others(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
        if not any("ServeController.graceful_shutdown" in line for line in data["lines"]):
            show(data, *arguments, **options)

    show_others.leaves_out = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = show_others


def _learn_cpus_at_once() -> None:
    """Ray Data runs one task at a time until an actor has told it the cluster's CPUs, and asks once a second (Ray 2.60).

    A table of ten thousand rows is done by then. The actor answers in milliseconds, so the first question waits for it; there is
    no public setting for that.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from ray.data._internal.cluster_autoscaler import DefaultAutoscalingCoordinator as Coordinator

        ask = Coordinator.get_reserved_resources
        if getattr(ask, "waits", False):
            return

        def ask_and_wait(self: Any) -> Any:
            found, pending = ask(self), getattr(self, "_pending_reserved_resources", None)
            if found or pending is None:
                return found
            ray.wait([pending], timeout=_MOST_SECONDS_FOR_CPUS)
            return ask(self)

        ask_and_wait.waits = True  # type: ignore[attr-defined]
        Coordinator.get_reserved_resources = ask_and_wait  # type: ignore[method-assign]
