"""A faster start of vLLM's CPU engine: its processes are forked from one that has already imported it.

A vLLM engine is a chain of three processes (API side, core, worker). On CPU each is started as a fresh interpreter that
imports torch and vLLM anew, one after the other, which on a small machine takes far longer than loading a small model.
Here a fork server imports them once, while the API side does the same on another core; core and worker are then forked.

    start()      # first thing in the process that will hold the engine
    ...          # vLLM's plugin (vllm_plugin.register) then calls install()

Nothing changes where ``start`` was not called or on a GPU: vLLM then starts its processes in its own way.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import context, forkserver
from pathlib import Path
from typing import Any

# Set in a process that has a fork server and, by inheritance, in the processes forked from it.
_STARTED = "MMEDPO_ENGINE_PRELOAD_PID"
_PRELOADED = ["vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llava"]
_PR_SET_PDEATHSIG = 1


def start() -> None:
    """Starts the fork server, which imports vLLM in the background; returns at once. Does nothing off Linux."""
    if not sys.platform.startswith("linux") or _STARTED in os.environ:
        return
    os.environ[_STARTED] = str(os.getpid())
    # The plugin comes first: it makes the LLaVA module importable.
    multiprocessing.set_forkserver_preload(["mmedpo_ray.compat.vllm_preload_modules", *_PRELOADED])
    with _preloaded_allocator():
        forkserver.ensure_running()


def install() -> None:
    """Makes vLLM take its processes from the fork server (or, in a forked one, fork on). Called by the vLLM plugin."""
    owner = os.environ.get(_STARTED)
    if owner is None:
        return
    chosen = _Preloaded() if owner == str(os.getpid()) else multiprocessing.get_context("fork")

    def get_mp_context() -> Any:
        return chosen

    import vllm.utils.system_utils
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

    for module in (vllm.utils.system_utils, vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        module.get_mp_context = get_mp_context  # type: ignore[attr-defined]


class _PreloadedProcess(context.ForkServerProcess):
    """A process of the fork server that gets its parent's environment and does not outlive it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self) -> None:
        os.environ.update(self._environment)
        # The fork server ends with the process that started it, however that one died; so must we.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        super().run()


class _Preloaded(context.ForkServerContext):
    Process = _PreloadedProcess


@contextlib.contextmanager
def _preloaded_allocator() -> Iterator[None]:
    """The allocator that vLLM brings along must be there when an interpreter starts."""
    before = os.environ.get("LD_PRELOAD")
    spec = importlib.util.find_spec("vllm")
    folders = [Path(item) / "libs" for item in (spec.submodule_search_locations or [])] if spec else []
    found = [str(file) for folder in folders for file in sorted(folder.glob("libtcmalloc_minimal*.so*"))]
    if found and "libtcmalloc" not in (before or ""):
        os.environ["LD_PRELOAD"] = ":".join([found[0], *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = before
