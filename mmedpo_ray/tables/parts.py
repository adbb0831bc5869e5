"""Parts of an unfinished table: tasks write them as rows come, and the next attempt finds them again."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import hash_ids

# One id in this many is remembered, chosen by its hash; the quantiles of these ids are where a table is cut.
_SAMPLED = 64

_PART = pa.schema(
    [
        ("path", pa.string()),
        ("rows", pa.int64()),
        ("low", pa.string()),
        ("high", pa.string()),
        ("sample", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Part:
    """A file of rows and what is known of its ids.

    Attributes:
        path: address.
        rows: number of rows.
        low: smallest id.
        high: greatest id.
        sample: about one in 64 of its ids.
    """

    path: str
    rows: int
    low: str
    high: str
    sample: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: str, ids: Sequence[str]) -> Part:
        """Describes a file of rows with these ids, at least one."""
        sampled = (hash_ids(ids) % _SAMPLED == 0).nonzero()[0]
        return cls(path, len(ids), min(ids), max(ids), [ids[index] for index in sampled])


@dataclass(frozen=True)
class Work:
    """A dataset of work to do instead of rows.

    Its tasks write each table of rows as soon as it is made. Ray Data would gather the tables of a task, up to
    100 MiB of them, before another operator sees the first, and a crash would lose them all.

    Attributes:
        blocks: the work, one task per block.
        make: yields tables of rows for a block.
        rows: total number of rows, those already written included; None: unknown.
    """

    blocks: ray.data.Dataset
    make: Callable[[pa.Table], Iterator[pa.Table]]
    rows: int | None = None


class PartWriter:
    """Ray Data map function: writes the rows of a block as parts and returns a description of each part.

    A part is named after its ids, so a repeated task writes the same files.

    Args:
        folder: of the parts.
        schema: of the raw rows; columns that a block lacks are null.
        id_column: the id's column.
        rows: maximum rows of a part.
        make: yields tables of rows for a block (see :class:`Work`); None: the block holds the rows.
    """

    def __init__(
        self,
        folder: str,
        schema: pa.Schema,
        id_column: str,
        rows: int,
        make: Callable[[pa.Table], Iterator[pa.Table]] | None = None,
    ) -> None:
        self._folder = folder
        self._schema = schema
        self._id_column = id_column
        self._rows = rows
        self._make = make

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        for table in self._make(block) if self._make else [block]:
            starts = range(0, table.num_rows, self._rows)
            written = [asdict(self.write(table.slice(start, self._rows))) for start in starts]
            yield pa.Table.from_pylist(written, _PART)

    def write(self, rows: pa.Table) -> Part:
        """Writes one part; at least one row."""
        ids = [str(name) for name in rows[self._id_column].to_pylist()]
        name = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:24]
        path = storage.join(self._folder, f"part-{name}.parquet")
        storage.write_parquet(path, schemas.fill(rows, self._schema))
        return Part.of(path, ids)


def without_reasons(rows: pa.Table, reasons: Sequence[str]) -> pa.Table:
    """The rows that are kept, or dropped for none of these reasons."""
    named = pc.is_in(rows[schemas.DROP_REASON], value_set=pa.array(reasons, pa.string()))
    return rows.filter(pc.invert(named))


def leave_out_reasons(path: str, id_column: str, reasons: Sequence[str]) -> None:
    """Removes the rows that are dropped for one of these reasons from a part."""
    reasons_given = storage.read_parquet(path, [schemas.DROP_REASON])
    if without_reasons(reasons_given, reasons).num_rows == reasons_given.num_rows:
        return
    remaining = without_reasons(storage.read_parquet(path), reasons)
    if remaining.num_rows:
        PartWriter(posixpath.dirname(path), remaining.schema, id_column, remaining.num_rows).write(remaining)
    storage.remove(path)
