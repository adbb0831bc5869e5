"""vLLM 0.32: in a Ray actor a CPU engine imports torch and vLLM three times in sequence; here only once.

An engine is a chain of three processes (API side, core, worker). vLLM starts each of them as a new
interpreter and, in a Ray actor, allows no other way (``vllm.utils.system_utils._maybe_force_spawn``). Here a
fork server imports vLLM while the API side does the same on another core; core and worker are then forked
from the server. The embedded model's endpoint starts in 24 to 31 s instead of 47 to 52 s on 2 cores.

    start()      # first thing in the process that will hold the engine
    ...          # vLLM's plugin (vllm_plugin.register) then calls install()

Without ``start``, or on a GPU, vLLM starts its processes in its own way.
"""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import os
import signal
import sys
from multiprocessing import context, forkserver
from pathlib import Path
from typing import Any

# The process that has a fork server; processes forked from the server inherit it.
_OWNER = "MMEDPO_ENGINE_PRELOAD_PID"
_PRELOADED = [
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llava",
]
_PR_SET_PDEATHSIG = 1


def start() -> None:
    """Starts the fork server, which imports vLLM in the background; returns at once. Only on Linux."""
    if not sys.platform.startswith("linux") or _OWNER in os.environ:
        return
    os.environ[_OWNER] = str(os.getpid())
    multiprocessing.set_forkserver_preload(_PRELOADED)
    # As vLLM does for its own processes; the allocator must be there when an interpreter starts.
    spec = importlib.util.find_spec("vllm")
    for folder in (spec and spec.submodule_search_locations) or []:
        for allocator in list(Path(folder).glob("libs/libtcmalloc_minimal*.so*"))[:1]:
            os.environ["LD_PRELOAD"] = f"{allocator}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":")
    forkserver.ensure_running()


def install() -> None:
    """Makes vLLM take its processes from the fork server; called by the vLLM plugin in each process."""
    owner = os.environ.get(_OWNER)
    if owner is None:
        return
    chosen = _ForkServer() if owner == str(os.getpid()) else multiprocessing.get_context("fork")

    import vllm.utils.system_utils
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

    for module in (vllm.utils.system_utils, vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        module.get_mp_context = lambda: chosen  # type: ignore[attr-defined]


class _Process(context.ForkServerProcess):
    """A process of the fork server that has its parent's environment and ends with the server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self) -> None:
        os.environ.update(self._environment)
        # The fork server ends with the process that started it, also if that one was killed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        super().run()


class _ForkServer(context.ForkServerContext):
    Process = _Process
