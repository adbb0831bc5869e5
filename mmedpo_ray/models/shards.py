"""Named tensors in safetensors files of limited size: written one after another, read one at a time.

    <folder>/shard-00001.safetensors, shard-00002.safetensors, …, index.json ({"weight_map": {tensor: file}})

Memory holds one or two shards, whatever the size of the whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 2 * 1024**3
INDEX = "index.json"


class ShardWriter:
    """Collects tensors and writes a file whenever ``shard_bytes`` are reached.

    Files are written one behind in ``pool``, so that two shards at most are in memory: one being filled, one
    being written.

    Args:
        folder: an existing folder.
        pool: runs one task at a time, in order.
        shard_bytes: size limit of a file; a single larger tensor has its own file.
    """

    def __init__(self, folder: Path, pool: Executor, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._pool = pool
        self._shard_bytes = shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._size = 0
        self._weight_map: dict[str, str] = {}
        self._num_shards = 0
        self._pending: Future[None] | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy of the tensor.

        Raises:
            OSError: an earlier shard could not be written.
        """
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._size + size > self._shard_bytes:
            self._flush()
        self._shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._size += size

    def finish(self) -> Future[None]:
        """Writes what is left and the index; the future is done when all of it is on disk."""
        if self._shard:
            self._flush()
        written = self._pending

        def write_index() -> None:
            if written is not None:
                written.result()
            index = self._folder / INDEX
            index.write_text(json.dumps({"weight_map": self._weight_map}))
            flush_to_disk(index)

        return self._pool.submit(write_index)

    def _flush(self) -> None:
        if self._pending is not None:
            self._pending.result()
        self._num_shards += 1
        file = self._folder / f"shard-{self._num_shards:05d}.safetensors"
        self._weight_map |= dict.fromkeys(self._shard, file.name)
        self._pending = self._pool.submit(_write, file, self._shard)
        self._shard, self._size = {}, 0


class ShardReader:
    """Reads the tensors of a folder that :class:`ShardWriter` wrote; files are mapped, not loaded.

    Raises:
        OSError, ValueError, SafetensorError: the index or a file is missing, cut off or not what the index
            says.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        self._open: dict[str, Any] = {
            name: safe_open(folder / name, "pt") for name in sorted(set(self._files.values()))
        }
        held = {name for file in self._open.values() for name in file.keys()}  # noqa: SIM118 - no dictionary
        if missing := self._files.keys() - held:
            raise ValueError(f"{folder} lacks {sorted(missing)[0]}")

    @property
    def names(self) -> Iterable[str]:
        """Of all tensors, in the order in which they were written."""
        return self._files.keys()

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from its file."""
        return self._open[self._files[name]].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """Its shape, without reading it."""
        return list(self._open[self._files[name]].get_slice(name).get_shape())


def flush_to_disk(file: Path) -> None:
    """Forces a file to disk, so that its folder is never renamed before."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, file, {"format": "pt"})
    flush_to_disk(file)
