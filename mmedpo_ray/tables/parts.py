"""Parts of an unfinished table: written by tasks as rows come, and found again by the next attempt."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas

# One id in this many is remembered, chosen by its digest; their quantiles are where a large table is cut.
_SAMPLED = 64


@dataclass(frozen=True)
class Part:
    """A file of rows and what is known of its ids.

    Attributes:
        path: address.
        rows: number of rows.
        low: least id.
        high: greatest id.
        sample: those of its ids that help to find the ranges.
    """

    path: str
    rows: int
    low: str
    high: str
    sample: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, path: str, ids: Sequence[str]) -> Part:
        """Describes a file of rows with these ids, at least one."""
        sample = [name for name in ids if _digest(name)[0] % _SAMPLED == 0]
        return cls(path, len(ids), min(ids), max(ids), sample)


def read_ids(path: str, id_column: str) -> list[str]:
    """The id column of a file."""
    return storage.read_parquet(path, [id_column])[id_column].to_pylist()


class DoneIds(Set):
    """The ids that are already written, in sixteen bytes each; travels to tasks through the object store.

    ``in``, ``len`` and truth work as with a set of strings. Iterating reads the ids from the files again.

    Args:
        parts: files of the rows.
        id_column: the id's column.
        codes: digests of all ids in these files, in any order.
    """

    def __init__(
        self, parts: Sequence[str] = (), id_column: str = "", codes: Sequence[np.ndarray] = ()
    ) -> None:
        self._parts = list(parts)
        self._id_column = id_column
        self._codes = np.sort(np.concatenate(codes)) if codes else np.empty(0, "S16")

    def __contains__(self, name: object) -> bool:
        if not len(self._codes) or not isinstance(name, str):
            return False
        code = np.bytes_(_digest(name))
        place = int(self._codes.searchsorted(code))
        return place < len(self._codes) and bool(self._codes[place] == code)

    def __len__(self) -> int:
        return len(self._codes)

    def __iter__(self) -> Iterator[str]:
        for path in self._parts:
            yield from read_ids(path, self._id_column)

    def __repr__(self) -> str:
        return f"DoneIds({len(self):,} ids)"

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> Any:
        """What set operators return."""
        return set(it)

    def mask(self, names: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Says of each id of a column whether it is among these."""
        if not len(self):
            return pa.array(np.zeros(len(names), bool))
        return pa.array(self._known(encode(names.to_pylist())))

    def leave_out(self, table: pa.Table, id_column: str) -> pa.Table:
        """The rows whose id is not among these."""
        return table.filter(pc.invert(self.mask(table[id_column]))) if len(self) else table

    def _known(self, codes: np.ndarray) -> np.ndarray:
        if not len(self._codes):
            return np.zeros(len(codes), bool)
        places = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return self._codes[places] == codes


def encode(names: Sequence[str]) -> np.ndarray:
    """Digests of ids, as :class:`DoneIds` takes them."""
    return np.array([_digest(name) for name in names], "S16")


class PartWriter:
    """Ray Data map function: writes a block as parts and returns their descriptions.

    A part's name comes from its ids, so a task that is repeated writes the same files.

    Args:
        folder: of the parts.
        schema: of the raw rows; columns that a block lacks are null.
        id_column: the id's column.
        rows: most rows of a part.
    """

    def __init__(self, folder: str, schema: pa.Schema, id_column: str, rows: int) -> None:
        self._folder = folder
        self._schema = schema
        self._id_column = id_column
        self._rows = rows

    def __call__(self, batch: pa.Table) -> pa.Table:
        written = [
            asdict(self.write(batch.slice(start, self._rows)))
            for start in range(0, batch.num_rows, self._rows)
        ]
        return pa.Table.from_pylist(written, _PART)

    def write(self, rows: pa.Table) -> Part:
        """Writes one part; at least one row."""
        columns = [
            rows[column.name].cast(column.type)
            if column.name in rows.column_names
            else pa.nulls(rows.num_rows, column.type)
            for column in self._schema
        ]
        ids = [str(name) for name in rows[self._id_column].to_pylist()]
        name = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:24]
        path = storage.join(self._folder, f"part-{name}.parquet")
        storage.write_parquet(path, pa.Table.from_arrays(columns, schema=self._schema))
        return Part.of(path, ids)


@dataclass(frozen=True)
class Work:
    """A dataset of work to do instead of rows.

    Its tasks write each table of rows as soon as it is made. Ray Data would gather the tables of a task, up to a hundred MiB
    of them, before another operator sees the first, and a crash would cost them all.

    Attributes:
        blocks: of work, a task each.
        make: tables of rows out of a block, one after another.
        rows: how many it will make, with those already there, if that is known.
    """

    blocks: ray.data.Dataset
    make: Callable[[pa.Table], Iterator[pa.Table]]
    rows: int | None = None


class MakingWriter:
    """Ray Data map function: makes the rows of a block of :class:`Work` and writes them as they come.

    Args:
        make: as of the work.
        write: writes a table of rows.
    """

    def __init__(self, make: Callable[[pa.Table], Iterator[pa.Table]], write: PartWriter) -> None:
        self._make = make
        self._write = write

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        return (self._write(rows) for rows in self._make(block))


def without_reasons(rows: pa.Table, reasons: Sequence[str]) -> pa.Table:
    """The rows that are kept, or dropped for none of these reasons."""
    named = pc.is_in(rows[schemas.DROP_REASON], value_set=pa.array(reasons, pa.string()))
    return rows.filter(pc.invert(named))


def leave_out_reasons(path: str, id_column: str, reasons: Sequence[str]) -> None:
    """Takes the rows that are dropped for one of these reasons out of a part."""
    given = storage.read_parquet(path, [schemas.DROP_REASON])
    if without_reasons(given, reasons).num_rows == given.num_rows:
        return
    stays = without_reasons(storage.read_parquet(path), reasons)
    if stays.num_rows:
        PartWriter(posixpath.dirname(path), stays.schema, id_column, stays.num_rows).write(stays)
    storage.remove(path)


_PART = pa.schema(
    [
        ("path", pa.string()),
        ("rows", pa.int64()),
        ("low", pa.string()),
        ("high", pa.string()),
        ("sample", pa.list_(pa.string())),
    ]
)


def _digest(name: str) -> bytes:
    # NumPy strips zero bytes from the end of a string, so none may be there.
    return hashlib.blake2b(name.encode(), digest_size=15).digest() + b"."
