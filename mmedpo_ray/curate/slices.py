"""A table between stations, cut into slices that tasks read themselves, and joined to others by the sample's id.

Every finished table is sorted by its id and keeps the range of its columns in the footers of its files. So the driver
reads footers only, a task reads its own slice, and the rows of another table that belong to it come from the few row groups
whose range meets the slice's. No process ever holds a table.

(``ray.data.read_parquet`` makes one task a file of 50,000 rows, and a join is a shuffle there.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray

from mmedpo_ray import storage

_PLAN = pa.schema(
    [("path", pa.string()), ("first_group", pa.int64()), ("num_groups", pa.int64()), ("rows", pa.int64())]
)


def cut(folder: str, rows: int) -> ray.data.Dataset:
    """The slices of a finished table, one block each, about ``rows`` rows; for :func:`read`."""
    planned: list[dict[str, str | int]] = []
    for path in storage.list_files(folder, ".parquet"):
        sizes = _row_group_sizes(path)
        first = 0
        while first < len(sizes):
            end, size = first + 1, sizes[first]
            while end < len(sizes) and size + sizes[end] <= rows:
                size += sizes[end]
                end += 1
            planned.append({"path": path, "first_group": first, "num_groups": end - first, "rows": size})
            first = end
    return ray.data.from_arrow([pa.Table.from_pylist([slice_], _PLAN) for slice_ in planned])


def read(slice_: pa.Table, columns: Sequence[str]) -> pa.Table:
    """The rows of a slice made by :func:`cut`."""
    parts = []
    for planned in slice_.to_pylist():
        filesystem, path = storage.resolve(planned["path"])
        groups = range(planned["first_group"], planned["first_group"] + planned["num_groups"])
        with filesystem.open_input_file(path) as source:
            parts.append(pq.ParquetFile(source).read_row_groups(list(groups), columns=list(columns)))
    return pa.concat_tables(parts)


def num_rows(folder: str, **equal: str) -> int:
    """Rows of a table in which each named column has the given value."""
    return storage.dataset(folder).count_rows(filter=_all_equal(equal))


def column(folder: str, name: str, **equal: str) -> pa.Array:
    """One column of a table, of the rows in which each named column has the given value."""
    found = storage.dataset(folder).to_table(columns=[name], filter=_all_equal(equal))
    return found[name].combine_chunks()


def _all_equal(values: dict[str, str]) -> pc.Expression | None:
    condition = None
    for name, value in values.items():
        term = pc.field(name) == value
        condition = term if condition is None else condition & term
    return condition


@dataclass(frozen=True)
class Range:
    """The least and greatest ``sample_id`` of a file."""

    path: str
    low: str
    high: str


class BySample:
    """Looks up the rows of a finished table by ``sample_id``, in tasks. Made on the driver, small, travels to the tasks.

    Args:
        folders: of the table; its ``dropped/`` can be given too, its rows then have a reason.
        columns: columns to read; those that a file lacks are null.
    """

    def __init__(self, folders: Sequence[str], columns: pa.Schema) -> None:
        self._columns = columns
        self._ranges = [_range(path) for folder in folders for path in storage.list_files(folder, ".parquet")]

    def rows(self, sample_ids: pa.ChunkedArray) -> dict[str, list[dict]]:
        """The table's rows of these samples, in the table's order."""
        found: dict[str, list[dict]] = {}
        if not len(sample_ids):
            return found
        limits = pc.min_max(sample_ids).as_py()
        paths = [
            item.path for item in self._ranges if item.low <= limits["max"] and item.high >= limits["min"]
        ]
        if not paths:
            return found
        filesystem, _ = storage.resolve(paths[0])
        inside = (pc.field("sample_id") >= limits["min"]) & (pc.field("sample_id") <= limits["max"])
        table = pads.dataset(
            [storage.resolve(path)[1] for path in paths],
            schema=self._columns,
            filesystem=filesystem,
            format="parquet",
        ).to_table(filter=inside)
        table = table.filter(pc.is_in(table["sample_id"], value_set=sample_ids.combine_chunks()))
        for row in table.to_pylist():
            found.setdefault(row["sample_id"], []).append(row)
        return found


def _row_group_sizes(path: str) -> list[int]:
    footer = _footer(path)
    return [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]


def _range(path: str) -> Range:
    footer = _footer(path)
    column = footer.schema.to_arrow_schema().get_field_index("sample_id")
    known = [footer.row_group(index).column(column).statistics for index in range(footer.num_row_groups)]
    if not known or any(item is None or not item.has_min_max for item in known):
        # Without statistics every slice looks into this file.
        return Range(path, "", chr(0x10FFFF))
    return Range(path, min(item.min for item in known), max(item.max for item in known))


def _footer(path: str) -> pq.FileMetaData:
    filesystem, inner = storage.resolve(path)
    with filesystem.open_input_file(inner) as source:
        return pq.ParquetFile(source).metadata
