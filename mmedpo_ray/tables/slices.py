"""Finished tables read in slices of a few hundred rows, each by the task that works on it.

The driver reads only the footers of the files. (``ray.data.read_parquet`` makes one task per file of 16,000
rows: few tasks, and a crash would lose as many judgements.)
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
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet

_MAX_ROWS = 2048
_MIN_ROWS = 256
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
    """Runs a function over the rows of some tables; ``None`` if they have no row.

    Args:
        folders: of the tables; those without files count as empty.
        schema: columns to read; those that a file lacks are null.
        task: gets the rows of a slice.
        num_cpus: CPUs of a task.
        rows: rows of a slice; None: few enough that every CPU of the cluster gets some.
        alone: keeps the next step in tasks of its own, because an actor that gathers batches wants rows, not
            slices.
    """
    plan = plan_slices(folders, num_cpus=num_cpus, rows=rows)
    if not plan:
        return None

    def work(planned: pa.Table) -> pa.Table:
        return task(read_slices(planned, schema))

    # `from_arrow` would run a task per block to learn its size.
    return ray.data.from_blocks(plan).map_batches(
        work,
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=num_cpus,
        # Ray Data fuses no step with one whose arguments are made per task.
        ray_remote_args_fn=dict if alone else None,
    )


class Skip:
    """Leaves out the rows that an earlier attempt has written; the ids travel through the object store.

    Args:
        done: ids that are there.
        column: column that such an id begins with.
        suffix: what follows it in the id.
    """

    def __init__(self, done: IdSet | None, column: str, suffix: str = "") -> None:
        self._column = column
        self._suffix = suffix
        self._done = ray.put(done) if done else None

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self._done is None:
            return rows
        ids = pc.binary_join_element_wise(rows[self._column], self._suffix, "")
        return rows.filter(pc.invert(ray.get(self._done).mask(ids)))


def plan_slices(folders: Sequence[str], *, num_cpus: float = 1.0, rows: int | None = None) -> list[pa.Table]:
    """The slices of some tables, one block each; for the arguments see :func:`map_slices`."""
    paths = [path for folder in folders for path in storage.list_files(folder, ".parquet")]
    return plan_files(paths, num_cpus=num_cpus, rows=rows)


def plan_files(
    paths: Sequence[str], *, num_cpus: float = 1.0, rows: int | None = None, most: int = _MAX_ROWS
) -> list[pa.Table]:
    """The slices (``path``, ``start``, ``stop``) of some files, in order, one block each.

    A row group can only be read whole. So without ``rows`` a slice is one or more whole row groups, or a part
    of one that is large.

    Args:
        paths: the files.
        num_cpus: CPUs of a task.
        rows: rows of a slice; None: few enough that every CPU of the cluster gets some.
        most: maximum rows of a slice if ``rows`` is None.
    """
    groups = {}
    for path in paths:
        footer = footer_of(path)
        groups[path] = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
    if rows is None:
        tasks = _SLICES_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1) / num_cpus))
        about = min(most, max(_MIN_ROWS, -(-sum(map(sum, groups.values())) // tasks)))
        bounds = {path: _bounds(sizes, about) for path, sizes in groups.items()}
    else:
        bounds = {path: [*range(0, sum(sizes), rows), sum(sizes)] for path, sizes in groups.items()}
    return [
        pa.table([[path], [start], [stop]], schema=_PLAN)
        for path, edges in bounds.items()
        for start, stop in pairwise(edges)
    ]


def _bounds(groups: Sequence[int], about: int) -> list[int]:
    """Edges of slices of about that many rows: at edges of row groups, or inside a large one."""
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
    tables = [read_rows(**item, names=schema.names) for item in planned.to_pylist()]
    return pa.concat_tables([schemas.fill(table, schema) for table in tables])


def read_rows(path: str, start: int, stop: int, names: Sequence[str]) -> pa.Table:
    """Rows ``start`` to ``stop`` (excluded) of a file; of the named columns those that it has."""
    filesystem, inner = storage.resolve(path)
    with filesystem.open_input_file(inner) as source:
        file = pq.ParquetFile(source)
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        first, last = (int(np.searchsorted(ends, place, side="right")) for place in (start, stop - 1))
        known = [name for name in names if name in file.schema_arrow.names]
        found = file.read_row_groups(list(range(first, last + 1)), columns=known)
    return found.slice(start - (int(ends[first]) - sizes[first]), stop - start)


def footer_of(path: str) -> pq.FileMetaData:
    """The footer of a Parquet file: its rows, row groups and ranges of columns."""
    filesystem, inner = storage.resolve(path)
    with filesystem.open_input_file(inner) as source:
        return pq.ParquetFile(source).metadata
