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

from mmedpo_ray.compat import ray_serve_shutdown
from mmedpo_ray.config.tree import RayConfig
from mmedpo_ray.errors import UserError, first_line

log = logging.getLogger(__name__)

# Passed to every worker process, so that actors are as quiet, as offline and as sparing with memory as the
# driver.
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

# For actors that hold a model. Without a limit Ray Data restarts an actor that always dies (out of memory,
# say) forever.
MODEL_RESTARTS = {"max_restarts": 5}

# Nothing listens there.
_NO_DASHBOARD = "http://127.0.0.1:9"

_FEWEST_LOCAL_CPUS = 4


def start(settings: RayConfig) -> None:
    """Joins the configured cluster, or starts a local one; does nothing if Ray is already initialised.

    A local cluster gets at least four logical CPUs: an engine holds one while the stages around it need
    theirs, and on a small machine they would otherwise wait for each other forever. It gets not many more,
    because Ray starts a worker process for each.

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
            reason = first_line(error)[:300]
            raise UserError(
                f"a local Ray cluster does not start: {reason}. Try again when the machine is less busy; "
                f"check that {ray_folder()} can be written to, is not full and has a short path (RAY_TMPDIR "
                f"sets another one). Logs: {ray_folder()}/session_latest/logs."
            ) from error
        log.debug("started a local Ray cluster with %d logical CPUs", cpus)
    _quiet_data()
    ray_serve_shutdown.install()


def _own_cluster(address: str | None) -> dict[str, str]:
    """Environment variables that make actors ask the cluster they belong to.

    Ray Train's PlacementGroupCleaner asks the newest dashboard of the machine whether its controller lives
    (Ray 2.60). The dashboard of another cluster does not know the controller, and the cleaner then ends the
    training.
    """
    if address is None:
        return {"RAY_API_SERVER_ADDRESS": _NO_DASHBOARD}
    return {} if address == "auto" or "://" in address else {"RAY_ADDRESS": address}


def _init(**options: Any) -> None:
    """``ray.init`` that keeps the SIGTERM handler: Ray's own prints a stack trace and ends the process."""
    handler = signal.getsignal(signal.SIGTERM)
    with _without_line("RAY_BACKEND_LOG_LEVEL"):
        ray.init(**options)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _without_line(text: str) -> Iterator[None]:
    """Removes lines with this text from the process's stderr, below Python too; others come at the end.

    Ray reports that it honours the variable that makes it quiet, whatever its level.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            for line in captured:
                if text.encode() not in line:
                    os.write(2, line)


def ray_folder() -> str:
    """Where Ray keeps its sessions and logs on this machine."""
    return f"{os.environ.get('RAY_TMPDIR') or tempfile.gettempdir()}/ray"


def address_of(settings: RayConfig) -> str | None:
    """The cluster that settings or environment name; ``None`` for a local one."""
    return settings.address or os.environ.get("RAY_ADDRESS") or None


def _check_reachable(address: str) -> None:
    """Fails at once if nothing listens there; Ray itself would try for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UserError:
    return UserError(
        f"the Ray cluster at {address!r} does not answer: {error}. Start one with `ray start --head`, "
        "correct ray.address or RAY_ADDRESS, or leave both unset to start a local cluster."
    )


def has_gpu() -> bool:
    """Whether the cluster has a GPU."""
    return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1


def room_for(resources: dict[str, float]) -> int:
    """How many workers with these resources fit on the cluster's nodes at once when nothing else runs."""
    needed = {name: amount for name, amount in resources.items() if amount > 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        # 0.3 / 0.1 is a little less than 3.
        min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in needed.items())
        for node in nodes
    )


def may_grow() -> bool:
    """Whether the cluster has an autoscaler, so that what does not fit now may fit in a minute."""
    from ray._private.state import state

    return bool(state.get_max_resources_from_cluster_config())


def _quiet_data() -> None:
    if not log.isEnabledFor(logging.DEBUG):
        # What it logs as errors is also raised, and shown once.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # `max_restarts`, `scheduling_strategy` and "do not fuse this step" have no other name yet (Ray 2.60).
    warnings.filterwarnings("ignore", message="`ray_remote_args(_fn)?` is deprecated")
