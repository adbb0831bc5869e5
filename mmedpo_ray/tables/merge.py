"""Merges the parts of a table into its files: sorted by id, cut into ranges of ids, checked.

Parts come in any order and of any size. The ids are cut into one range per file. A task gathers the rows of
its range from the parts that overlap it, sorts, checks and writes them, so memory is bounded by the size of a
file, however large the table. The ranges depend on the set of ids alone: the files are the same after a crash
and with any number of workers.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import ray

from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.parts import Part

DROPPED = "dropped"
ROWS_PER_FILE = 16_384

_ROW_GROUP = 1024
# If parts are read more often than this on average, they are sorted into longer runs first.
_MAX_READS = 8


@dataclass(frozen=True)
class Target:
    """What a merge writes.

    Attributes:
        folder: of the new files; those of dropped rows go to ``dropped/`` in it.
        schema: of the final table.
        id_column: unique id of a row, kept or dropped.
        name: the stage's, for messages.
    """

    folder: str
    schema: pa.Schema
    id_column: str
    name: str


@dataclass
class Merged:
    """What is in the files that a merge wrote.

    Attributes:
        rows: kept rows.
        dropped: dropped rows by reason.
        repeated: number of ids that occur more than once.
        example: one of these ids, and how often it occurs; None: there is none.
        digests: hash of the content of each file, in order.
    """

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    example: tuple[str, int] | None = None
    digests: list[str] = field(default_factory=list)

    def add(self, other: Merged) -> None:
        """Adds the figures of the next file."""
        self.rows += other.rows
        self.dropped += other.dropped
        self.repeated += other.repeated
        self.example = self.example or other.example
        self.digests += other.digests


def merge(parts: Sequence[Part], target: Target, num_cpus: float) -> Merged:
    """Sorts the rows of all parts by id into new files of about 16,000 rows.

    Args:
        parts: with all rows of the table.
        target: where the files go, and what they hold.
        num_cpus: CPUs of a task.

    Raises:
        UserError: a required value is missing.
    """
    lows = _range_starts(parts, -(-sum(part.rows for part in parts) // ROWS_PER_FILE))
    in_tasks = len(lows) > 1 and ray.is_initialized()
    paths = _overlapping(parts, lows)
    if in_tasks and sum(map(len, paths)) > _MAX_READS * (len(parts) + len(lows)):
        paths = _overlapping(_sort_into_runs(parts, target, num_cpus), lows)
    ranges = zip(range(len(lows)), paths, lows, [*lows[1:], None], strict=True)
    if in_tasks:
        # Plain tasks, not Ray Data, whose start-up would take longer than the merge of a small table.
        write = ray.remote(_write_file).options(num_cpus=num_cpus, max_retries=-1)
        files = ray.get([write.remote(*each, target) for each in ranges])
    else:
        files = [_write_file(*each, target) for each in ranges]
    merged = Merged()
    for file in files:
        merged.add(file)
    return merged


def _range_starts(parts: Sequence[Part], count: int) -> list[str]:
    """The first id of each of about ``count`` ranges, as quantiles of sampled ids; the first is ``""``."""
    sample = sorted({name for part in parts for name in part.sample})
    quantiles = [sample[len(sample) * number // count] for number in range(1, count)] if sample else []
    return ["", *dict.fromkeys(quantiles)]


def _overlapping(parts: Sequence[Part], lows: Sequence[str]) -> list[list[str]]:
    """The paths of the parts that overlap each range."""
    paths: list[list[str]] = [[] for _ in lows]
    for part in parts:
        first, last = (bisect_right(lows, name) - 1 for name in (part.low, part.high))
        for overlapping in paths[first : last + 1]:
            overlapping.append(part.path)
    return paths


def _write_file(index: int, paths: list[str], low: str, high: str | None, target: Target) -> Merged:
    """Writes the kept rows of a range to one file and the dropped rows to another; no file without a row."""
    name = f"part-{index:05d}.parquet"
    rows = _read_sorted(paths, low, high, target)
    is_dropped = pc.is_valid(rows[schemas.DROP_REASON])
    dropped, kept = rows.filter(is_dropped), rows.filter(pc.invert(is_dropped))
    kept = schemas.check(kept, target.schema, target.name)
    content = hashlib.sha256(
        json.dumps(dropped.select([target.id_column, schemas.DROP_REASON]).to_pydict()).encode()
    )
    if kept.num_rows:
        path = storage.join(target.folder, name)
        content.update(storage.write_parquet(path, kept, row_group_size=_ROW_GROUP).encode())
    if dropped.num_rows:
        path = storage.join(target.folder, DROPPED, name)
        storage.write_parquet(path, dropped, row_group_size=_ROW_GROUP)
    ids = pc.value_counts(rows[target.id_column])
    repeated = ids.filter(pc.greater(ids.field("counts"), 1))
    example: Any = tuple(repeated[0].as_py().values()) if len(repeated) else None
    reasons = Counter(dropped[schemas.DROP_REASON].to_pylist())
    return Merged(kept.num_rows, reasons, len(repeated), example, [content.hexdigest()])


def _read_sorted(paths: list[str], low: str, high: str | None, target: Target) -> pa.Table:
    """The rows of some files with ids from ``low`` (included) to ``high`` (excluded; None: no limit)."""
    schema = schemas.with_drop_columns(target.schema)
    if not paths:
        return schema.empty_table()
    inside = pc.field(target.id_column) >= low
    if high is not None:
        inside &= pc.field(target.id_column) < high
    filesystem, _ = storage.resolve(paths[0])
    inner = [storage.resolve(path)[1] for path in paths]
    files = pads.dataset(inner, schema=schema, filesystem=filesystem, format="parquet")
    # A part has a few hundred rows, so only a few parts need to be read ahead.
    rows = files.to_table(filter=inside, batch_readahead=4, fragment_readahead=2)
    return rows.sort_by(target.id_column).combine_chunks()


def _sort_into_runs(parts: Sequence[Part], target: Target, num_cpus: float) -> list[Part]:
    """Sorts unordered parts into files of some rows each, of which a range reads a few row groups."""
    groups: list[list[str]] = [[]]
    rows = 0
    for part in sorted(parts, key=lambda part: (part.low, part.path)):
        if rows >= 3 * ROWS_PER_FILE:
            groups.append([])
            rows = 0
        groups[-1].append(part.path)
        rows += part.rows
    write = ray.remote(_write_run).options(num_cpus=num_cpus, max_retries=-1)
    return ray.get([write.remote(index, paths, target) for index, paths in enumerate(groups)])


def _write_run(index: int, paths: list[str], target: Target) -> Part:
    rows = _read_sorted(paths, "", None, target)
    path = storage.join(target.folder, "runs", f"run-{index:05d}.parquet")
    storage.write_parquet(path, rows, row_group_size=_ROW_GROUP)
    ids = rows[target.id_column]
    return Part(path, rows.num_rows, ids[0].as_py(), ids[-1].as_py())
