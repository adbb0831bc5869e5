"""Decodes images beside the event loop: small plain ones in threads, all others in processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.plain_images import is_small_and_plain, plain_file

_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "TMPDIR")
_HEAD_BYTES = 100_000


class ImageDecoder:
    """Turns image files into files that the engine reads as training does.

    Args:
        num_workers: processes.
        max_pixels: larger images are refused before they are decoded.
        max_bytes: DICOM that inflates to more is refused.
        timeout_s: longest time for one image in a process.
    """

    def __init__(self, num_workers: int, max_pixels: int, max_bytes: int, timeout_s: float) -> None:
        self._limits = max_pixels, max_bytes
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="image")
        # Each of these threads looks after one process.
        self._waiters = ThreadPoolExecutor(num_workers, thread_name_prefix="image-worker")
        self._own = threading.local()
        self._workers: list[_Worker] = []

    async def plain(self, data: bytes) -> tuple[bytes, str]:
        """The picture as a PNG or JPEG file, and its media type.

        See :func:`mmedpo_ray.io.plain_images.plain_file`.

        Raises:
            ImageError: it cannot be decoded, is too large, or takes too long (``image_too_slow``).
        """
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, self._if_small, data)
        if found is None:
            found = await loop.run_in_executor(self._waiters, self._in_process, data)
        return found

    def close(self) -> None:
        """Ends the threads and processes."""
        for pool in (self._threads, self._waiters):
            pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _if_small(self, data: bytes) -> tuple[bytes, str] | None:
        return plain_file(data, "the image", self._limits[0]) if is_small_and_plain(data) else None

    def _in_process(self, data: bytes) -> tuple[bytes, str]:
        if not hasattr(self._own, "worker"):
            self._own.worker = _Worker(*self._limits)
            self._workers.append(self._own.worker)
        return self._own.worker.decode(data, self._timeout_s)


class _Worker:
    """One process of :mod:`.image_worker`, started with the first image, and again after it was ended."""

    def __init__(self, max_pixels: int, max_bytes: int) -> None:
        self._arguments = [str(max_pixels), str(max_bytes)]
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def decode(self, data: bytes, timeout_s: float) -> tuple[bytes, str]:
        pipe = self._running()
        try:
            pipe.send_bytes(data)
            if not pipe.poll(timeout_s):
                self.stop()
                raise ImageError("image_too_slow", f"the image: takes more than {timeout_s:g} s to decode")
            head = json.loads(pipe.recv_bytes(_HEAD_BYTES))
            picture = pipe.recv_bytes()
        except (EOFError, OSError):
            self.stop()
            raise ImageError("image_undecodable", "the image: its decoder broke off") from None
        if "kind" not in head:
            raise ImageError(head["reason"], head["detail"])
        return picture, head["kind"]

    def stop(self) -> None:
        """Ends the process."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._pipe = None

    def _running(self) -> Connection:
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        if self._pipe is None:
            ours, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "mmedpo_ray.serve.image_worker", str(theirs.fileno()),
                     *self._arguments],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=_environment(),
                )  # fmt: skip
            self._pipe = ours
        return self._pipe


def _environment() -> dict[str, str]:
    """No keys or tokens; each process uses one core."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | threads | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
