"""Where a plan takes its pairs from: the `prepared` table, row group by row group, or a table in memory.

The table stays what it is, Parquet in one copy, compressed, readable by anything; no second format is kept beside it for training. A
rank reads the row groups (1,024 pairs) that hold the images of its own micro-batches, in the thread that reads the next step
ahead; of a small table all row groups stay in memory. Reading one takes about 1.5 ms of a core, 2.5 ms with the footer of a file that is
not open. Rows of a memory-mapped Arrow file would be quicker to take, but it has 1.7 times the bytes for random tokens and
18 times for questions and answers that repeat, on the file system that all ranks share.
"""

from __future__ import annotations

import copy
import functools
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmedpo_ray.align.data.batch import Pair
from mmedpo_ray.align.data.pair_index import PairIndex, Totals, hash_images, index_pairs, load_index
from mmedpo_ray.align.data.tokenise import make_pair
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.models.loading import PromptWriter

# Footers and row groups kept by a rank: at most about 10 and 100 MiB.
_OPEN_FILES = 64
_ROW_GROUPS = 64


class PairSource(Protocol):
    """Pairs in a fixed order, those of an image together.

    Attributes:
        index: what is known of all of them.
        coefficients: (3,) factor on the weight of each kind, in the order of :data:`~mmedpo_ray.align.data.pair_index.KINDS`.
    """

    index: PairIndex
    coefficients: np.ndarray

    def load(self, numbers: Sequence[int]) -> list[Pair]:
        """The pairs with these row numbers."""
        ...


Source = TypeVar("Source", bound=PairSource)


def hold_out(source: Source, share: float, seed: int) -> tuple[Source, Source | None]:
    """Sets images apart, with all their pairs: those that training sees, and those it is validated on.

    Which images depends on the seed and their ids alone: those with the lowest hash, so that images added later change
    little of it.

    Args:
        source: all pairs.
        share: of the images, 0 to 1; above 0 at least one image is held out and at least one is trained on.
        seed: of the choice.

    Returns:
        The pairs of training, and those held out (``None`` for a share of 0).

    Raises:
        UserError: there are not two images to share out.
    """
    if not share:
        return source, None
    images = source.index.num_images
    if images < 2:
        raise UserError(
            f"align.validation_share={share} holds out images, and there are pairs of {images}. Set it to 0."
        )
    count = min(max(round(share * images), 1), images - 1)
    order = np.argpartition(source.index.image_codes(seed), count - 1)
    rest, apart = copy.copy(source), copy.copy(source)
    rest.index, apart.index = source.index.split(order[:count])
    return rest, apart


def weights_of(source: PairSource, pairs: np.ndarray) -> np.ndarray:
    """Effective weights of records of the index."""
    return pairs["weight"] * source.coefficients[pairs["kind"]]


class StoredPairs:
    """The pairs of a `prepared` table.

    Args:
        folder: of the table; its index must be there.
        writer: of the model.
        align: coefficients of the kinds.
    """

    def __init__(self, folder: str, writer: PromptWriter, align: AlignConfig) -> None:
        self.index = load_index(folder)
        self.coefficients = _coefficients(align)
        self._writer = writer
        self._first = np.cumsum([0, *(rows for _, rows in self.index.files)]).tolist()
        self._file = functools.lru_cache(_OPEN_FILES)(self._open)
        self._row_group = functools.lru_cache(_ROW_GROUPS)(self._read)
        self._lock = threading.Lock()

    def load(self, numbers: Sequence[int]) -> list[Pair]:
        """The pairs with these row numbers."""
        with self._lock:
            return [self._pair(number) for number in numbers]

    def _pair(self, number: int) -> Pair:
        file = bisect_right(self._first, number) - 1
        place = number - self._first[file]
        _, starts = self._file(file)
        group = bisect_right(starts, place) - 1
        row = self._row_group(file, group).slice(place - starts[group], 1).to_pylist()[0]
        return _pair(self, number, row, self._writer)

    def _open(self, file: int) -> tuple[pq.ParquetFile, list[int]]:
        """A file of the table, and the first row of each of its row groups."""
        filesystem, path = storage.resolve(self.index.files[file][0])
        opened = pq.ParquetFile(filesystem.open_input_file(path))
        sizes = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
        return opened, np.cumsum([0, *sizes[:-1]]).tolist()

    def _read(self, file: int, group: int) -> pa.RecordBatch:
        opened, _ = self._file(file)
        return (
            opened.read_row_group(group, columns=_COLUMNS, use_threads=False).combine_chunks().to_batches()[0]
        )


_COLUMNS = [
    "pair_id",
    "image_id",
    "kind",
    "image_uri",
    "rejected_image_uri",
    "prompt",
    "chosen",
    "rejected",
    "chosen_weights",
    "rejected_weights",
    "ref_chosen_logp",
    "ref_rejected_logp",
]


class TablePairs:
    """The pairs of a table like `prepared` that is in memory.

    Args:
        table: whole trees in the order of ``tree_key``.
        writer: of the model.
        align: coefficients of the kinds.
    """

    def __init__(self, table: pa.Table, writer: PromptWriter, align: AlignConfig) -> None:
        pairs, starts = index_pairs(table)
        totals = Totals()
        totals.add(pairs, starts)
        hashes = hash_images(table["image_id"].take(pa.array(starts, pa.int64())).to_pylist())
        self.index = PairIndex(pairs, np.append(starts, len(pairs)), hashes, totals)
        self.coefficients = _coefficients(align)
        self._table = table
        self._writer = writer

    def load(self, numbers: Sequence[int]) -> list[Pair]:
        """The pairs with these row numbers."""
        rows = self._table.take(pa.array(numbers, pa.int64())).to_pylist()
        return [_pair(self, number, row, self._writer) for number, row in zip(numbers, rows, strict=True)]


def _coefficients(align: AlignConfig) -> np.ndarray:
    return np.array([1.0, align.visual_coefficient, align.reversed_visual_coefficient])


def _pair(source: PairSource, number: int, row: Mapping[str, Any], writer: PromptWriter) -> Pair:
    entry = source.index.pairs[number]
    weight = float(entry["weight"] * source.coefficients[entry["kind"]])
    return make_pair(row, writer, weight, counts_nll=bool(entry["counts_nll"]))
