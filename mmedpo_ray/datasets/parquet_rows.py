"""Rows of a Parquet file, a few at a time whatever the size of its row groups.

Parquet cannot be entered in the middle of a row group. Where a large one is shared among n tasks, each reads
over the rows before its own, and together they read the group (n + 1) / 2 times: at most 4.5 times, which is
little beside decoding all its images on one CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise, repeat
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage

# Stands for every row from where a row group is damaged.
DAMAGED = object()

_TAIL = 8
# Rows decoded at a time: their images are in memory together.
_ROWS_AT_A_TIME = 16
# A row group is shared among up to so many tasks, if each gets as many rows at least.
_MOST_SHARES = 8
_ROWS_OF_A_SHARE = 4_096
# What reading damaged files raises.
_DAMAGE = (pa.ArrowException, OSError)
# Bytes read at once where only that they can be read counts.
_PIECE = 1 << 20
# Errors of values that Python cannot hold: strings that are not UTF-8, distant dates.
_NO_VALUE = (ValueError, OverflowError)


def scan(uri: str, rows_per_run: int, id_key: str | None) -> Iterator[tuple[int, int, int, list[Any]]]:
    """Cuts a file into runs of neighbouring rows: some row groups, one, or a share of a very large one.

    Yields:
        First row group, the one after the last, position of the first row, and the rows with their id alone;
        `DAMAGED` from where their row groups are.

    Raises:
        UserError: the file is missing or no Parquet, or storage failed.
    """
    with open_parquet(uri) as file:
        columns = [id_key] if id_key is not None and id_key in file.schema_arrow.names else []
        for start, stop, first, total in _row_groups(file.metadata, rows_per_run):
            ids = _rows(uri, file, start, stop, columns, 0, total) if columns else repeat({}, total)
            for position, count in _shares(first, total):
                yield start, stop, position, list(islice(ids, count))


def read(
    uri: str, start: int, stop: int, position: int, count: int, columns: list[str] | None = None
) -> Iterator[Any]:
    """The rows of a run that :func:`scan` found, as dictionaries; `DAMAGED` from where their row groups are.

    Args:
        uri: the file.
        start: first row group.
        stop: row group after the last.
        position: of the first row in the file.
        count: how many rows.
        columns: names of columns to read; None: all.

    Raises:
        UserError: the file is gone, or storage failed.
    """
    with open_parquet(uri) as file:
        before = sum(file.metadata.row_group(number).num_rows for number in range(start))
        yield from _rows(uri, file, start, stop, columns, position - before, count)


def column_names(uri: str) -> list[str]:
    """The columns of a file.

    Raises:
        UserError: it is missing or no Parquet.
    """
    with open_parquet(uri) as file:
        return file.schema_arrow.names


def footer_sha256(uri: str) -> str:
    """Size of a file and hash of its footer, which changes with the rows.

    Raises:
        UserError: the file is missing or no Parquet.
    """
    with open_file(uri) as file:
        size = file.size()
        file.seek(max(0, size - _TAIL))
        tail = file.read()
        length = int.from_bytes(tail[:4], "little")
        if not tail.endswith(b"PAR1") or length + _TAIL > size:
            raise UserError(f"{uri} is no Parquet file. Check data.root and the file.")
        file.seek(size - _TAIL - length)
        return f"{size} {hashlib.sha256(file.read()).hexdigest()}"


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file for reading page by page.

    Raises:
        UserError: it is missing or no Parquet.
    """
    with open_file(uri) as file:
        try:
            # Without reading ahead, a row group of gigabytes is taken page by page.
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_PIECE)
        except _DAMAGE as error:
            raise UserError(
                f"{uri} is no Parquet file ({type(error).__name__}). Check data.root and the file."
            ) from error
        yield parquet


@contextmanager
def open_file(uri: str) -> Iterator[pa.NativeFile]:
    """Opens a file for reading at any place.

    Raises:
        UserError: it is missing or cannot be read.
    """
    filesystem, path = storage.resolve(uri)
    try:
        file = filesystem.open_input_file(path)
    except OSError as error:
        raise UserError(
            f"cannot read {uri} ({type(error).__name__}). Check data.root, data.train_file and "
            f"data.test_file."
        ) from error
    with file:
        yield file


def _rows(
    uri: str, file: pq.ParquetFile, start: int, stop: int, columns: list[str] | None, skip: int, count: int
) -> Iterator[Any]:
    """``count`` rows of some row groups, after the first ``skip`` of them."""
    left = count
    try:
        for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=range(start, stop), columns=columns):
            passed = min(skip, batch.num_rows)
            skip -= passed
            rows = _python_rows(batch.slice(passed, left))
            left -= len(rows)
            yield from rows
            if not left:
                return
    except _DAMAGE:
        _check_bytes(uri, file.metadata, start, stop)
        yield from repeat(DAMAGED, left)


def _check_bytes(uri: str, metadata: pq.FileMetaData, start: int, stop: int) -> None:
    """Tells damage from storage that fails, which Parquet's reader reports alike: damaged bytes can be read.

    Raises:
        UserError: the bytes of these row groups cannot be read.
    """
    try:
        with open_file(uri) as file:
            for group in range(start, stop):
                for number in range(metadata.num_columns):
                    column = metadata.row_group(group).column(number)
                    file.seek(max(0, column.dictionary_page_offset or column.data_page_offset))
                    size = max(0, column.total_compressed_size)
                    for done in range(0, size, _PIECE):
                        file.read(min(_PIECE, size - done))
    except OSError as error:
        raise UserError(
            f"{uri} could not be read to its end ({type(error).__name__}): storage failed. Run again, which "
            f"goes on from here."
        ) from error


def _row_groups(metadata: pq.FileMetaData, rows_per_run: int) -> Iterator[tuple[int, int, int, int]]:
    """Groups neighbouring row groups: (first, past the last, first row, rows) each."""
    start = position = rows = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= rows_per_run or group == metadata.num_row_groups - 1:
            if rows:
                yield start, group + 1, position, rows
            start, position, rows = group + 1, position + rows, 0


def _shares(position: int, rows: int) -> Iterator[tuple[int, int]]:
    """First row and rows of each run that some row groups make: one, or several of a large group."""
    count = min(_MOST_SHARES, rows // _ROWS_OF_A_SHARE) or 1
    limits = [position + rows * number // count for number in range(count + 1)]
    yield from ((start, stop - start) for start, stop in pairwise(limits))


def _python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch; None in the place of a value that Python cannot hold."""
    try:
        return batch.to_pylist()
    except _NO_VALUE:
        columns = [[_python_value(value) for value in column] for column in batch.columns]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _python_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except _NO_VALUE:
        return None
