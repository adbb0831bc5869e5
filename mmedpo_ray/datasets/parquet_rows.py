"""Rows of a Parquet file, some neighbouring ones at a time, for formats that are read row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage


def scan(uri: str, rows_per_run: int, id_key: str) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """Cuts a file into runs that lie in one row group each: first row, row after the last, and what stands in the id column.

    Raises:
        UserError: the file is missing, no Parquet, or without a row.
    """
    with _open(uri) as file:
        if file.metadata.num_rows == 0:
            raise UserError(f"{uri} has no row: there is nothing to read.")
        columns = [id_key] if id_key in file.schema_arrow.names else []
        position = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.read_row_group(group, columns=columns).to_pylist() if columns else []
            count = file.metadata.row_group(group).num_rows
            for start in range(0, count, rows_per_run):
                stop = min(count, start + rows_per_run)
                yield position + start, position + stop, rows[start:stop] or [{}] * (stop - start)
            position += count


def read(uri: str, start: int, stop: int) -> list[dict[str, Any]]:
    """The rows of a run that :func:`scan` found.

    Raises:
        UserError: the file is gone or was changed meanwhile.
    """
    with _open(uri) as file:
        position = 0
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if start < position + count:
                return file.read_row_group(group).slice(start - position, stop - start).to_pylist()
            position += count
    raise UserError(f"{uri} was changed while it was being read. Start again.")


@contextmanager
def _open(uri: str) -> Iterator[pq.ParquetFile]:
    filesystem, path = storage.resolve(uri)
    try:
        with filesystem.open_input_file(path) as file:
            yield pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"no file {uri}. Check data.root and data.train_file.") from error
        raise UserError(f"cannot read {uri} as Parquet ({type(error).__name__}). Check the file.") from error
