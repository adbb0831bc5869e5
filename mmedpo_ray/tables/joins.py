"""Joins finished tables on ``sample_id``, inside the tasks that read a slice of one of them.

Every finished table is sorted by its id, and the footers of its files hold the ranges of its columns. So the
driver reads only footers, and a task reads the few row groups of the other table that overlap its slice. No
process holds a whole table. (With ``ray.data`` a join is a shuffle.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from mmedpo_ray.io import storage
from mmedpo_ray.tables.slices import footer_of


def num_rows(folder: str, **equal: str) -> int:
    """The number of rows of a table in which each named column has the given value."""
    return storage.dataset(folder).count_rows(filter=_all_equal(equal))


def column(folder: str, name: str, **equal: str) -> pa.Array:
    """One column of a table, of the rows in which each named column has the given value."""
    found = storage.dataset(folder).to_table(columns=[name], filter=_all_equal(equal))
    return found[name].combine_chunks()


def _all_equal(values: Mapping[str, str]) -> pc.Expression | None:
    return (
        pq.filters_to_expression([(name, "==", value) for name, value in values.items()]) if values else None
    )


class BySample:
    """Looks up the rows of a finished table by ``sample_id``. Made on the driver, small, travels to the tasks.

    Args:
        folders: of the table; with its ``dropped/``, dropped rows are found too and have a reason.
        columns: columns to read; those that a file lacks are null.
    """

    def __init__(self, folders: Sequence[str], columns: pa.Schema) -> None:
        self._columns = columns
        paths = [path for folder in folders for path in storage.list_files(folder, ".parquet")]
        self._ranges = [(path, *_range(path)) for path in paths]

    def rows(self, sample_ids: pa.ChunkedArray) -> dict[str, list[dict]]:
        """The table's rows of these samples, in the table's order."""
        found: dict[str, list[dict]] = {}
        if not len(sample_ids):
            return found
        least, greatest = pc.min_max(sample_ids).as_py().values()
        paths = [path for path, low, high in self._ranges if low <= greatest and high >= least]
        if not paths:
            return found
        filesystem, _ = storage.resolve(paths[0])
        inner = [storage.resolve(path)[1] for path in paths]
        files = pads.dataset(inner, schema=self._columns, filesystem=filesystem, format="parquet")
        inside = (pc.field("sample_id") >= least) & (pc.field("sample_id") <= greatest)
        table = files.to_table(filter=inside)
        table = table.filter(pc.is_in(table["sample_id"], value_set=sample_ids.combine_chunks()))
        for row in table.to_pylist():
            found.setdefault(row["sample_id"], []).append(row)
        return found


def _range(path: str) -> tuple[str, str]:
    """The smallest and the greatest ``sample_id`` of a file; the widest range if its footer does not say."""
    footer = footer_of(path)
    index = footer.schema.to_arrow_schema().get_field_index("sample_id")
    known = [footer.row_group(group).column(index).statistics for group in range(footer.num_row_groups)]
    if not known or any(item is None or not item.has_min_max for item in known):
        return "", chr(0x10FFFF)
    return min(item.min for item in known), max(item.max for item in known)
