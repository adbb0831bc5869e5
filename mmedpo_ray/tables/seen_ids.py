"""Which ids have occurred before, in eight bytes an id, for data sets whose ids would not fit in memory as text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class SeenIds:
    """A growing set of ids, kept as 64-bit hashes in a few sorted runs.

    Two different ids share a hash once in 2⁶⁵/n² data sets of n ids (n = 10⁶: once in 37 million), and the later row
    would then be taken for a repetition.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, names: Sequence[str]) -> list[bool]:
        """Adds ids in order; says of each whether it was there before, among these or earlier ones."""
        codes = np.fromiter((_code(name) for name in names), np.uint64, len(names))
        fresh, first = np.unique(codes, return_index=True)
        repeated = np.ones(len(codes), bool)
        repeated[first] = False
        known = np.zeros(len(fresh), bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, fresh), len(run) - 1)
            known |= run[places] == fresh
        repeated[first[known]] = True
        self._merge(fresh[~known])
        return repeated.tolist()

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def _merge(self, run: np.ndarray) -> None:
        """Keeps every run more than twice as long as the next: few to search, and each id is moved log n times."""
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            # Two sorted runs in a row are what a stable sort merges in linear time.
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        if len(run):
            self._runs.append(run)


def _code(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
