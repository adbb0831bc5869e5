"""Parts become the files of a table: sorted by id, cut by ranges of it, checked.

Parts come in any order and any size. The ids are cut into ranges of about 4,000 rows, and each range is gathered from the
parts that reach into it, sorted, checked and written, up to twelve of them to a file: memory is bounded by a range, however large
the table. Where the ranges begin depends on the set of ids alone, and how many share a file on their number, so the files do
too, whatever crashed before and however many workers there were.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray

from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.parts import Part

ROWS_PER_RANGE = 4_096
# Smaller tables are merged where the stage runs: a task would cost more than the work.
DRIVER_ROWS = 8_192
DROPPED = "dropped"

_RANGES_PER_FILE = 12
# A table of fewer than a hundred ranges is cut into about so many files, for as many tasks.
_FILES = 8
_ROW_GROUP = 1024
# Where a range meets more parts than this many times their mean number, they are sorted into longer runs first.
_MOST_VISITS = 8


@dataclass(frozen=True)
class Merge:
    """How parts become the files of a table.

    Attributes:
        target: folder of the new files; those of dropped rows go to ``dropped/`` in it.
        schema: of the final table.
        id_column: unique id of a row, kept or dropped.
        name: the stage's, for messages.
    """

    target: str
    schema: pa.Schema
    id_column: str
    name: str


@dataclass
class Merged:
    """What is in the files that a merge wrote.

    Attributes:
        rows: kept rows.
        dropped: dropped rows by reason.
        repeated: ids that occur more than once.
        example: one of these, and how often it occurs.
        digests: of the content of each file, in order.
    """

    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    repeated: int = 0
    example: Sequence[Any] | None = None
    digests: list[str] = field(default_factory=list)

    def add(self, other: Merged) -> None:
        """Adds the figures of the next ranges."""
        self.rows += other.rows
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.repeated += other.repeated
        self.example = self.example or other.example
        self.digests += other.digests


def merge(parts: Sequence[Part], how: Merge, num_cpus: float) -> Merged:
    """Sorts the rows of all parts by id into new files of 4,000 to 50,000 rows.

    Args:
        parts: with all rows of the table.
        how: where to and as what.
        num_cpus: CPUs a task asks for.

    Raises:
        UserError: a required value is missing.
    """
    total = sum(part.rows for part in parts)
    limits = _limits(parts, -(-total // ROWS_PER_RANGE))
    in_tasks = total > DRIVER_ROWS and ray.is_initialized()
    meeting = _meeting(parts, limits)
    if in_tasks and sum(map(len, meeting)) > _MOST_VISITS * (len(parts) + len(limits)):
        meeting = _meeting(_sort_runs(parts, how, num_cpus), limits)
    ranges = [_Range(low, high, paths) for (low, high), paths in zip(limits, meeting, strict=True)]
    per_file = min(_RANGES_PER_FILE, -(-len(ranges) // _FILES))
    files = [ranges[start : start + per_file] for start in range(0, len(ranges), per_file)]
    if not in_tasks:
        return _sum(_write_file(index, file, how) for index, file in enumerate(files))

    # Bare tasks: a dataset's start-up would take longer than merging a small table.
    write = ray.remote(_write_file).options(num_cpus=num_cpus, max_retries=-1)
    return _sum(ray.get([write.remote(index, file, how) for index, file in enumerate(files)]))


@dataclass(frozen=True)
class _Range:
    """Ids from ``low`` (included) to ``high`` (excluded; None: no limit), and the files that hold some of them."""

    low: str
    high: str | None
    paths: list[str]


def _limits(parts: Sequence[Part], count: int) -> list[tuple[str, str | None]]:
    """First id (included) and last (excluded, None: no limit) of each range, from the quantiles of the sampled ids."""
    sample = sorted({name for part in parts for name in part.sample})
    inner = [sample[len(sample) * number // count] for number in range(1, count)] if sample else []
    lows = ["", *dict.fromkeys(inner)]
    return list(zip(lows, [*lows[1:], None], strict=True))


def _meeting(parts: Sequence[Part], limits: Sequence[tuple[str, str | None]]) -> list[list[str]]:
    """The files that hold ids of each range; as long as few meet a range, this takes little more than a look at each part."""
    lows = [low for low, _ in limits]
    found: list[list[str]] = [[] for _ in limits]
    for part in parts:
        first, last = (bisect_right(lows, name) - 1 for name in (part.low, part.high))
        for paths in found[first : last + 1]:
            paths.append(part.path)
    return found


def _write_file(index: int, ranges: Sequence[_Range], how: Merge) -> Merged:
    """Writes one file of kept rows and one of dropped rows, range by range."""
    name = f"part-{index:05d}.parquet"
    raw = schemas.with_drop_columns(how.schema)
    kept_file = _Sink(storage.join(how.target, name), how.schema)
    dropped_file = _Sink(storage.join(how.target, DROPPED, name), raw)
    merged, content = Merged(), hashlib.sha256()
    for item in ranges:
        rows = _read_sorted(item, raw, how.id_column)
        is_dropped = pc.is_valid(rows[schemas.DROP_REASON])
        dropped = rows.filter(is_dropped)
        kept = rows.filter(pc.invert(is_dropped)) if dropped.num_rows else rows
        kept_file.add(schemas.check(kept, how.schema, how.name))
        dropped_file.add(dropped)
        content.update(json.dumps(dropped.select([how.id_column, schemas.DROP_REASON]).to_pydict()).encode())
        reasons = pc.value_counts(dropped[schemas.DROP_REASON]).to_pylist()
        counts = {reason["values"]: reason["counts"] for reason in reasons}
        merged.add(Merged(kept.num_rows, counts, *_repeated(rows[how.id_column])))
    content.update(kept_file.close().encode())
    dropped_file.close()
    merged.digests.append(content.hexdigest())
    return merged


class _Sink:
    """A Parquet file that grows by tables and appears whole; none without a row."""

    def __init__(self, path: str, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        self._buffer = pa.BufferOutputStream()
        self._writer: pq.ParquetWriter | None = None

    def add(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._buffer, self._schema, compression="zstd")
        self._writer.write_table(rows.combine_chunks(), row_group_size=_ROW_GROUP)

    def close(self) -> str:
        """Writes the file; returns the SHA-256 of its bytes."""
        if self._writer is None:
            return ""
        self._writer.close()
        data = self._buffer.getvalue()
        storage.write_bytes(self._path, data)
        return hashlib.sha256(data).hexdigest()


def _read_sorted(item: _Range, schema: pa.Schema, id_column: str) -> pa.Table:
    if not item.paths:
        return schema.empty_table()
    filesystem, _ = storage.resolve(item.paths[0])
    wanted = pc.field(id_column) >= item.low
    if item.high is not None:
        wanted &= pc.field(id_column) < item.high
    inner = [storage.resolve(path)[1] for path in item.paths]
    found = pads.dataset(inner, schema=schema, filesystem=filesystem, format="parquet")
    # A part is a few hundred rows, so few of them need be read ahead.
    return found.to_table(filter=wanted, batch_readahead=4, fragment_readahead=2).sort_by(id_column)


def _repeated(ids: pa.ChunkedArray) -> tuple[int, tuple[str, int] | None]:
    """How many ids of a sorted column occur more than once, and the first of them."""
    if len(ids) == pc.count_distinct(ids).as_py():
        return 0, None
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    return len(repeated), (repeated[0]["values"].as_py(), repeated[0]["counts"].as_py())


def _sort_runs(parts: Sequence[Part], how: Merge, num_cpus: float) -> list[Part]:
    """Sorts parts whose ids lie anywhere into files of about 50,000 rows, from which a range reads a few row groups."""
    groups: list[list[Part]] = [[]]
    for part in sorted(parts, key=lambda part: (part.low, part.path)):
        if sum(item.rows for item in groups[-1]) >= ROWS_PER_RANGE * _RANGES_PER_FILE:
            groups.append([])
        groups[-1].append(part)
    write = ray.remote(_write_run).options(num_cpus=num_cpus, max_retries=-1)
    ray.get([write.remote(index, [part.path for part in group], how) for index, group in enumerate(groups)])
    return [
        Part(
            _run_path(how, index),
            sum(part.rows for part in group),
            min(part.low for part in group),
            max(part.high for part in group),
        )
        for index, group in enumerate(groups)
    ]


def _write_run(index: int, paths: list[str], how: Merge) -> None:
    run = _read_sorted(_Range("", None, paths), schemas.with_drop_columns(how.schema), how.id_column)
    storage.write_parquet(_run_path(how, index), run.combine_chunks(), row_group_size=_ROW_GROUP)


def _run_path(how: Merge, index: int) -> str:
    return storage.join(how.target, "runs", f"run-{index:05d}.parquet")


def _sum(found: Iterable[Merged]) -> Merged:
    total = Merged()
    for item in found:
        total.add(item)
    return total
