"""A set of ids in eight bytes each, for tables whose ids would not fit in memory as strings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class IdSet:
    """A growing set of ids, kept as 64-bit hashes in a few sorted arrays. Small enough to travel to tasks.

    Two different ids share a hash in one of 2⁶⁵/n² tables of n ids (n = 10⁶: one in 37 million). The later
    row then counts as a repetition.

    Args:
        ids: the first ids.
    """

    def __init__(self, ids: Sequence[str] = ()) -> None:
        self._arrays: list[np.ndarray] = []
        self.add(ids)

    def add(self, ids: Sequence[str]) -> list[bool]:
        """Adds ids in order; returns for each whether it was there before, among these or earlier ones."""
        hashes = hash_ids(ids)
        new, first = np.unique(hashes, return_index=True)
        repeated = np.ones(len(hashes), bool)
        known = self._contains(new)
        repeated[first[~known]] = False
        self._merge(new[~known])
        return repeated.tolist()

    def mask(self, ids: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Whether each id of a column is in the set."""
        return pa.array(self._contains(hash_ids(ids.to_pylist())))

    def leave_out(self, table: pa.Table, id_column: str) -> pa.Table:
        """The rows whose id is not in the set."""
        return table.filter(pc.invert(self.mask(table[id_column]))) if len(self) else table

    def __contains__(self, name: str) -> bool:
        return len(self) > 0 and bool(self._contains(hash_ids([name]))[0])

    def __len__(self) -> int:
        return sum(map(len, self._arrays))

    def __repr__(self) -> str:
        return f"IdSet({len(self):,} ids)"

    def _contains(self, hashes: np.ndarray) -> np.ndarray:
        known = np.zeros(len(hashes), bool)
        for array in self._arrays:
            places = np.minimum(np.searchsorted(array, hashes), len(array) - 1)
            known |= array[places] == hashes
        return known

    def _merge(self, array: np.ndarray) -> None:
        """Keeps every array more than twice as long as the next: few to search, each id is moved log n times."""
        while self._arrays and len(self._arrays[-1]) <= 2 * len(array):
            # A stable sort merges two sorted arrays in linear time.
            array = np.sort(np.concatenate([self._arrays.pop(), array]), kind="stable")
        if len(array):
            self._arrays.append(array)


def hash_ids(ids: Sequence[str]) -> np.ndarray:
    """(N,) uint64, a hash of each id that is the same in every process."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, ">u8").astype(np.uint64)
