"""Where a plan gets its pairs: from the `prepared` table, row group by row group, or from a table in memory.

No second format is kept for training: the table stays compressed Parquet in one copy. A rank reads the row
groups (1,024 pairs) that hold the images of its own micro-batches, in the thread that reads the next step
ahead; of a small table all row groups stay in memory. Reading one takes about 1.5 ms of a core, 2.5 ms with
the footer of a file that is not open. Rows of a memory-mapped Arrow file would be quicker to read, but it has
1.7 times the bytes for random tokens and 18 times for questions and answers that repeat, on the file system
that all ranks share.
"""

from __future__ import annotations

import copy
import functools
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmedpo_ray.align.data.batch import Pair
from mmedpo_ray.align.data.pair_index import PairIndex, hash_images, index_pairs, load_index, sum_pairs
from mmedpo_ray.align.data.tokenise import make_pair
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.models.prompts import PromptWriter

# Footers and row groups kept by a rank: at most about 10 and 100 MiB.
_OPEN_FILES = 64
_ROW_GROUPS = 64
_COLUMNS = [
    *("pair_id", "image_id", "kind", "image_uri", "rejected_image_uri", "prompt", "chosen", "rejected"),
    "prompt_tokens",
    *("chosen_weights", "rejected_weights", "ref_chosen_logp", "ref_rejected_logp"),
]


class PairSource(ABC):
    """Pairs in a fixed order, with those of an image together.

    Args:
        index: of all pairs.
        align: coefficients of the kinds.

    Attributes:
        index: of the pairs that take part.
        coefficients: (3,) factor on the weight of each kind, as in
            :data:`~mmedpo_ray.align.data.pair_index.KINDS`.
    """

    def __init__(self, index: PairIndex, align: AlignConfig) -> None:
        self.index = index
        self.coefficients = np.array([1.0, align.visual_coefficient, align.reversed_visual_coefficient])

    @abstractmethod
    def load(self, numbers: Sequence[int]) -> list[Pair]:
        """The pairs with these row numbers."""

    def weights(self, pairs: np.ndarray) -> np.ndarray:
        """Effective weights of records of the index."""
        return pairs["weight"] * self.coefficients[pairs["kind"]]

    def hold_out(self, share: float, seed: int) -> tuple[PairSource, PairSource | None]:
        """Splits off images, with all their pairs, for validation.

        The choice depends on the seed and the image ids only: images with the lowest hash are held out, so
        images added later change little of it.

        Args:
            share: of the images, 0 to 1; above 0 at least one image is held out and at least one is trained
                on.
            seed: of the choice.

        Returns:
            The pairs of training, and those held out (``None`` for a share of 0).

        Raises:
            UserError: there are fewer than two images.
        """
        if not share:
            return self, None
        images = self.index.num_images
        if images < 2:
            raise UserError(
                f"align.validation_share={share} holds out images, and there are pairs of {images}. Set it "
                "to 0."
            )
        count = min(max(round(share * images), 1), images - 1)
        order = np.argpartition(self.index.image_codes(seed), count - 1)
        rest, apart = copy.copy(self), copy.copy(self)
        rest.index, apart.index = self.index.split(order[:count])
        return rest, apart

    def _pair(self, number: int, row: Mapping[str, Any], writer: PromptWriter) -> Pair:
        entry = self.index.pairs[number]
        return make_pair(row, writer, float(self.weights(entry)), counts_nll=bool(entry["counts_nll"]))


class StoredPairs(PairSource):
    """The pairs of a `prepared` table.

    Args:
        folder: of the table; its index must exist.
        writer: of the model.
        align: coefficients of the kinds.
    """

    def __init__(self, folder: str, writer: PromptWriter, align: AlignConfig) -> None:
        super().__init__(load_index(folder), align)
        self._writer = writer
        self._first = np.cumsum([0, *(rows for _, rows in self.index.files)]).tolist()
        self._file = functools.lru_cache(_OPEN_FILES)(self._open)
        self._row_group = functools.lru_cache(_ROW_GROUPS)(self._read)
        self._lock = threading.Lock()

    def load(self, numbers: Sequence[int]) -> list[Pair]:
        with self._lock:
            return [self._pair(number, self._row(number), self._writer) for number in numbers]

    def _row(self, number: int) -> dict[str, Any]:
        file = bisect_right(self._first, number) - 1
        place = number - self._first[file]
        _, starts = self._file(file)
        group = bisect_right(starts, place) - 1
        return self._row_group(file, group).slice(place - starts[group], 1).to_pylist()[0]

    def _open(self, file: int) -> tuple[pq.ParquetFile, list[int]]:
        """A file of the table, and the first row of each of its row groups."""
        filesystem, path = storage.resolve(self.index.files[file][0])
        opened = pq.ParquetFile(filesystem.open_input_file(path))
        sizes = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
        return opened, np.cumsum([0, *sizes[:-1]]).tolist()

    def _read(self, file: int, group: int) -> pa.RecordBatch:
        opened, _ = self._file(file)
        table = opened.read_row_group(group, columns=_COLUMNS, use_threads=False)
        return table.combine_chunks().to_batches()[0]


class TablePairs(PairSource):
    """The pairs of a table like `prepared` that is in memory.

    Args:
        table: whole trees in the order of ``tree_key``.
        writer: of the model.
        align: coefficients of the kinds.
    """

    def __init__(self, table: pa.Table, writer: PromptWriter, align: AlignConfig) -> None:
        pairs, starts = index_pairs(table)
        hashes = hash_images(table["image_id"].take(pa.array(starts, pa.int64())).to_pylist())
        index = PairIndex(pairs, np.append(starts, len(pairs)), hashes, sum_pairs(pairs, starts))
        super().__init__(index, align)
        self._table = table
        self._writer = writer

    def load(self, numbers: Sequence[int]) -> list[Pair]:
        rows = self._table.take(pa.array(numbers, pa.int64())).to_pylist()
        return [self._pair(number, row, self._writer) for number, row in zip(numbers, rows, strict=True)]
