"""Finished tables read in slices of a few hundred rows, each by the task that works on it.

The driver reads the footers of the files only. (``ray.data.read_parquet`` makes one task a file, of 50,000 rows: few
tasks, and a crash would cost as many judgements.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from mmedpo_ray.io import storage
from mmedpo_ray.tables.parts import DoneIds

_MOST_ROWS = 2048
_FEWEST_ROWS = 256
_SLICES_PER_CPU = 4

_PLAN = pa.schema([("path", pa.string()), ("start", pa.int64()), ("stop", pa.int64())])


def map_slices(
    folders: Sequence[str],
    schema: pa.Schema,
    task: Callable[[pa.Table], pa.Table],
    *,
    num_cpus: float,
    rows: int | None = None,
    alone: bool = False,
) -> ray.data.Dataset | None:
    """Runs a function over the rows of some tables; ``None`` where they have no row.

    Args:
        folders: of the tables; those without files count as empty.
        schema: columns to read; those that a file lacks are null.
        task: gets the rows of a slice.
        num_cpus: CPUs a task asks for.
        rows: rows of a slice; None: such that every CPU of the cluster gets some.
        alone: keeps what follows in tasks of its own, as an actor that gathers batches wants its rows, not slices.
    """
    plan = plan_slices(folders, num_cpus=num_cpus, rows=rows)
    if not plan:
        return None

    def work(planned: pa.Table) -> pa.Table:
        return task(read_slices(planned, schema))

    # `from_arrow` would run a task a block, to learn the block's size.
    return ray.data.from_blocks(plan).map_batches(
        work,
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=num_cpus,
        # Ray Data joins no step to one whose arguments are made task by task.
        ray_remote_args_fn=dict if alone else None,
    )


class Skip:
    """Leaves out the rows that an earlier attempt has written; what it knows of them travels through the object store.

    Args:
        done: ids that are there.
        column: column that such an id begins with.
        suffix: what follows it in the id.
    """

    def __init__(self, done: DoneIds | None, column: str, suffix: str = "") -> None:
        self._column = column
        self._suffix = suffix
        self._done = ray.put(done) if done else None

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self._done is None:
            return rows
        ids = pc.binary_join_element_wise(rows[self._column], self._suffix, "")
        return rows.filter(pc.invert(ray.get(self._done).mask(ids)))


def plan_slices(folders: Sequence[str], *, num_cpus: float = 1.0, rows: int | None = None) -> list[pa.Table]:
    """Where the slices of some tables lie, a block each; for the arguments see :func:`map_slices`.

    A row group can only be read whole, so without ``rows`` slices are whole row groups or, of small tables, parts of one.
    """
    paths = [path for folder in folders for path in storage.list_files(folder, ".parquet")]
    return plan_files(paths, num_cpus=num_cpus, rows=rows)


def plan_files(
    paths: Sequence[str], *, num_cpus: float = 1.0, rows: int | None = None, most: int = _MOST_ROWS
) -> list[pa.Table]:
    """Where the slices of some files lie, in their order, a block each; see :func:`plan_slices`.

    Args:
        paths: the files.
        num_cpus: CPUs a task asks for.
        rows: rows of a slice; None: such that every CPU of the cluster gets some.
        most: rows of a slice where ``rows`` does not say.
    """
    groups = {
        path: [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
        for path in paths
        for footer in [footer_of(path)]
    }
    if rows is None:
        about = _slice_rows(sum(map(sum, groups.values())), num_cpus, most)
        bounds = {path: _bounds(sizes, about) for path, sizes in groups.items()}
    else:
        bounds = {path: [*range(0, sum(sizes), rows), sum(sizes)] for path, sizes in groups.items()}
    return [
        pa.table([[path], [start], [stop]], schema=_PLAN)
        for path, edges in bounds.items()
        for start, stop in pairwise(edges)
    ]


def _bounds(groups: Sequence[int], about: int) -> list[int]:
    """Edges of slices of about so many rows: at those of row groups of these sizes, or within where one has several slices."""
    edges, end = [0], 0
    for size in groups:
        parts = max(1, size // about)
        if parts > 1:
            edges += [end] if end > edges[-1] else []
            edges += [end + size * part // parts for part in range(1, parts)]
        end += size
        if end - edges[-1] >= about:
            edges.append(end)
    return edges if edges[-1] == end else [*edges, end]


def read_slices(planned: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows of planned slices; columns of the schema that a file lacks are null."""
    return pa.concat_tables([_read(**item, schema=schema) for item in planned.to_pylist()])


def read_rows(path: str, start: int, stop: int, names: Sequence[str]) -> pa.Table:
    """Rows ``start`` to ``stop`` (excluded) of a file, from the row groups that hold them; those of the columns that it has."""
    filesystem, inner = storage.resolve(path)
    with filesystem.open_input_file(inner) as source:
        file = pq.ParquetFile(source)
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        first, last = (int(np.searchsorted(ends, place, side="right")) for place in (start, stop - 1))
        known = [name for name in names if name in file.schema_arrow.names]
        found = file.read_row_groups(list(range(first, last + 1)), columns=known)
    return found.slice(start - (int(ends[first]) - sizes[first]), stop - start)


def _slice_rows(total: int, num_cpus: float, most: int) -> int:
    tasks = _SLICES_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1) / num_cpus))
    return min(most, max(_FEWEST_ROWS, -(-total // tasks)))


def _read(path: str, start: int, stop: int, schema: pa.Schema) -> pa.Table:
    """Rows of a file in the types of a schema."""
    found = read_rows(path, start, stop, schema.names)
    columns = [
        found[field.name].cast(field.type)
        if field.name in found.column_names
        else pa.nulls(len(found), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=pa.schema([field.with_nullable(True) for field in schema]))


def footer_of(path: str) -> pq.FileMetaData:
    """What a Parquet file says of itself: rows, row groups, ranges of columns."""
    filesystem, inner = storage.resolve(path)
    with filesystem.open_input_file(inner) as source:
        return pq.ParquetFile(source).metadata
