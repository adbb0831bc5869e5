"""Finished tables joined by the sample's id, in the tasks that read a slice of one of them (:mod:`mmedpo_ray.tables.slices`).

Every finished table is sorted by its id and keeps the range of its columns in the footers of its files. So the driver
reads footers only, and the rows of another table that belong to a slice come from the few row groups whose range meets the
slice's. No process ever holds a table. (With ``ray.data`` a join is a shuffle.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from mmedpo_ray.io import storage
from mmedpo_ray.tables.slices import footer_of


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


def _range(path: str) -> Range:
    footer = footer_of(path)
    column = footer.schema.to_arrow_schema().get_field_index("sample_id")
    known = [footer.row_group(index).column(column).statistics for index in range(footer.num_row_groups)]
    if not known or any(item is None or not item.has_min_max for item in known):
        # Without statistics every slice looks into this file.
        return Range(path, "", chr(0x10FFFF))
    return Range(path, min(item.min for item in known), max(item.max for item in known))
