"""``--fix``: a cleaned copy of the audited table, with a log of every change.

A row is left out by the first rule of `RULES` that it meets; the rows that stay have both answers trimmed.
Nothing else
changes: columns, types and order are the input's (the index of a dictionary may be wider). What a rule cannot
decide (length, style, relevance) stays as it is.
"""

from __future__ import annotations

import json
import posixpath
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmedpo_ray.audit.checks.rows import contradictions, later_of_equal
from mmedpo_ray.audit.checks.weights import bad_weight
from mmedpo_ray.audit.features import Features
from mmedpo_ray.audit.samples import Samples
from mmedpo_ray.datasets.pair_table import PairTable
from mmedpo_ray.datasets.preferences import format_of, trimmed
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.tables.manifest import Manifest, read_manifest, versions, write_manifest

STAGE = "audit --fix"
CHANGES = "changes.jsonl"
_UNFINISHED = ".unfinished"
_MALFORMED = "malformed_row"
_PART_ROWS = 50_000
_SIDES = ("chosen", "rejected")
_INDEX_BITS = 32


def _not_alone(keys: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """(N,) bool: an earlier row that is still there has the same key."""
    mask = np.zeros(len(keys), bool)
    rows = np.flatnonzero(alive)
    mask[rows] = later_of_equal(keys[rows])
    return mask


# Rule → the rows it leaves out, given those still there. The order counts: an answer that is a leak is no
# contradiction.
RULES: dict[str, Callable[[Features, np.ndarray], np.ndarray]] = {
    "invalid_weight": lambda f, _: bad_weight(f.weight) if "weight" in f.columns else np.zeros(len(f), bool),
    "empty_side": lambda f, _: f.empty,
    "leaked_prompt": lambda f, _: f.leaked,
    "task_commentary": lambda f, _: f.leak > 0,
    "equal_sides": lambda f, _: f.text & f.equal,
    "near_equal_sides": lambda f, _: f.text & f.near_equal,
    "same_image": lambda f, _: f.visual & f.same_image & ("rejected_image_uri" in f.columns),
    "pairs_of_test_samples": lambda f, _: f.of_test,
    "images_shared_with_test": lambda f, _: f.image_in_test,
    "images_shared_with_validation": lambda f, _: f.image_in_validation,
    "contradicting_chosen": lambda f, alive: contradictions(f, alive)[0],
    "duplicate_pair": lambda f, alive: _not_alone(np.where(f.asked == 0, 0, f.content), alive),
}


@dataclass(frozen=True)
class Fixed:
    """What became of a table: ``rows_in`` = ``rows_out`` + the sum of ``removed``."""

    folder: str
    rows_in: int
    rows_out: int
    removed: dict[str, int]
    trimmed: int


def removals(features: Features) -> np.ndarray:
    """(N,) int8: the rule that leaves each row out, by its place in `RULES`; -1 where the row stays."""
    rule_of = np.full(len(features), -1, np.int8)
    for index, rule in enumerate(RULES.values()):
        alive = rule_of < 0
        rule_of[alive & rule(features, alive)] = index
    return rule_of


def check_folder(folder: str, pairs: PairTable) -> None:
    """Makes sure that nothing but an earlier fixed table can be overwritten.

    Raises:
        UserError: the folder holds other files, or the audited table itself.
    """
    absolute, source = storage.absolute(folder), storage.absolute(pairs.path)
    if absolute.rstrip("/") == source.rstrip("/") or posixpath.dirname(source) == absolute.rstrip("/"):
        raise UserError(f"--fix {folder} would write into the audited table. Give another folder.")
    filesystem, path = storage.resolve(folder)
    try:
        names = {info.base_name for info in filesystem.get_file_info(_children(path))}
    except (NotADirectoryError, OSError) as error:
        raise UserError(f"--fix {folder}: not a folder ({type(error).__name__}). Give a new one.") from error
    if names and _UNFINISHED not in names and _stage(folder) != STAGE:
        raise UserError(
            f"--fix {folder}: the folder is not empty. Give a new one, so that nothing is overwritten."
        )


def _children(path: str) -> Any:
    return pa.fs.FileSelector(path, allow_not_found=True)


def _stage(folder: str) -> str | None:
    try:
        found = json.loads(storage.read_bytes(storage.join(folder, "manifest.json")))
    except (OSError, json.JSONDecodeError):
        return None
    return found.get("stage") if isinstance(found, dict) else None


def write_fixed(
    pairs: PairTable,
    features: Features,
    samples: Samples | None,
    folder: str,
    *,
    started: float | None = None,
) -> Fixed:
    """Writes the cleaned table, ``changes.jsonl`` and, last, ``manifest.json``.

    Args:
        pairs: the audited table.
        features: its numbers.
        samples: the samples table that was given, for the key of the manifest.
        folder: new folder, or one of an earlier ``--fix``.
        started: when the audit began (`time.monotonic`), for the manifest; None: now.

    Raises:
        UserError: the folder is in use or cannot be written, or no row would stay.
    """
    started = time.monotonic() if started is None else started
    check_folder(folder, pairs)
    rule_of = removals(features)
    counts = {name: int((rule_of == index).sum()) for index, name in enumerate(RULES)}
    removed = {name: count for name, count in counts.items() if count}
    if pairs.malformed:
        removed[_MALFORMED] = len(pairs.malformed)
    kept = int((rule_of < 0).sum())
    if not kept:
        raise UserError(f"--fix: no row of {pairs.path} would stay ({_said(removed)}). Make the pairs again.")
    try:
        _clear(folder)
        with _stream(storage.join(folder, CHANGES)) as log:
            trimmed = (
                _write_json(pairs, rule_of, folder, log)
                if pairs.json_rows
                else _write_parquet(pairs, rule_of, folder, log)
            )
        fixed = Fixed(folder, len(features) + len(pairs.malformed), kept, removed, trimmed)
        _write_manifest(fixed, pairs, samples, started)
        storage.remove(storage.join(folder, _UNFINISHED))
    except OSError as error:
        raise UserError(
            f"--fix {folder}: cannot be written ({type(error).__name__}). Give another folder."
        ) from error
    return fixed


def _clear(folder: str) -> None:
    """Leaves nothing in the folder but a mark that it is ours to overwrite, should this be interrupted."""
    mark = storage.join(folder, _UNFINISHED)
    storage.write_bytes(mark, b"mmedpo audit --fix was interrupted here; run it again\n")
    filesystem, path = storage.resolve(folder)
    for info in filesystem.get_file_info(_children(path)):
        if info.base_name != _UNFINISHED:
            storage.remove(storage.join(folder, info.base_name))


def _said(removed: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in removed.items())


@contextmanager
def _stream(uri: str) -> Iterator[IO[bytes]]:
    """A file that appears when it is complete."""
    filesystem, path = storage.resolve(uri)
    filesystem.create_dir(posixpath.dirname(path), recursive=True)
    temporary = f"{path}.{uuid4().hex}.tmp"
    with filesystem.open_output_stream(temporary) as stream:
        yield stream
    filesystem.move(temporary, path)


def _log(
    log: IO[bytes], row: int, pair_id: str | None, action: str, rule: str, sides: list[str] | None = None
) -> None:
    line: dict[str, Any] = {"row": row, "pair_id": pair_id, "action": action, "rule": rule}
    if sides:
        line["sides"] = sides
    log.write((json.dumps(line) + "\n").encode())


# ---------------------------------------------------------------------- Parquet


def _write_parquet(pairs: PairTable, rule_of: np.ndarray, folder: str, log: IO[bytes]) -> int:
    names = list(RULES)
    position = part = trimmed = 0
    held: list[pa.Table] = []
    for batch in pairs.batches(pairs.source.schema.names):
        rules = rule_of[position : position + batch.num_rows]
        ids = batch["pair_id"] if "pair_id" in batch.column_names else None
        clean, sides_of = _trimmed(batch)
        touched = np.flatnonzero((rules >= 0) | sides_of[0] | sides_of[1])
        for row, pair_id in zip(touched.tolist(), _values(ids, touched), strict=True):
            if rules[row] >= 0:
                _log(log, position + row, pair_id, "removed", names[rules[row]])
            else:
                sides = [name for name, changed in zip(_SIDES, sides_of, strict=True) if changed[row]]
                _log(log, position + row, pair_id, "trimmed", "untrimmed_text", sides)
                trimmed += 1
        held.append(_kept(clean, rules < 0))
        position += batch.num_rows
        part = _flush(held, folder, part, all_rows=False)
    _flush(held, folder, part, all_rows=True)
    return trimmed


def _trimmed(batch: pa.Table) -> tuple[pa.Table, list[np.ndarray]]:
    """The batch with both answers trimmed, and per side which rows that changed."""
    changed = []
    for name in _SIDES:
        column = batch[name]
        before = column.cast(pa.string())
        after = pc.utf8_trim_whitespace(before)
        changed.append(pc.fill_null(pc.not_equal(before, after), False).to_numpy())
        if changed[-1].any():
            index = batch.column_names.index(name)
            # Chunk by chunk, since each has a dictionary of its own.
            trimmed = pa.chunked_array([chunk.cast(column.type) for chunk in after.chunks], column.type)
            batch = batch.set_column(index, batch.schema.field(index), trimmed)
    return batch, changed


def _kept(batch: pa.Table, stays: np.ndarray) -> pa.Table:
    """The rows that stay ((rows,) bool), whatever the types of the columns."""
    columns = [_widely_indexed(column) for column in batch.columns]
    fields = [field.with_type(column.type) for field, column in zip(batch.schema, columns, strict=True)]
    table = pa.table(columns, schema=pa.schema(fields, batch.schema.metadata))
    try:
        return table.filter(pa.array(stays))
    except pa.ArrowNotImplementedError:
        # Views, and what holds some, cannot be filtered, but sliced.
        edges = np.flatnonzero(np.diff(stays, prepend=False, append=False)).tolist()
        runs = zip(edges[::2], edges[1::2], strict=True)
        return pa.concat_tables(
            [table.slice(0, 0), *(table.slice(start, stop - start) for start, stop in runs)]
        )


def _widely_indexed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A dictionary column with indices of at least 32 bits, which joined chunks may need."""
    kind = column.type
    if not pa.types.is_dictionary(kind) or kind.index_type.bit_width >= _INDEX_BITS:
        return column
    wide = pa.dictionary(pa.int32(), kind.value_type, kind.ordered)
    chunks = [
        pa.DictionaryArray.from_arrays(chunk.indices.cast(pa.int32()), chunk.dictionary, ordered=kind.ordered)
        for chunk in column.chunks
    ]
    return pa.chunked_array(chunks, wide)


def _values(column: pa.ChunkedArray | None, rows: np.ndarray) -> list[str | None]:
    if column is None:
        return [None] * len(rows)
    return column.cast(pa.string()).take(pa.array(rows)).to_pylist()


def _flush(held: list[pa.Table], folder: str, part: int, *, all_rows: bool) -> int:
    """Writes whole parts (at the end the rest too) and keeps what is over."""
    table = pa.concat_tables(held)
    while table.num_rows >= _PART_ROWS or (all_rows and table.num_rows):
        chunk = table.slice(0, _PART_ROWS)
        storage.write_parquet(storage.join(folder, f"part-{part:05d}.parquet"), chunk, row_group_size=1024)
        table, part = table.slice(_PART_ROWS), part + 1
    held[:] = [table]
    return part


# ---------------------------------------------------------------------- released JSON


def _write_json(pairs: PairTable, rule_of: np.ndarray, folder: str, log: IO[bytes]) -> int:
    assert pairs.json_rows is not None and isinstance(pairs.source, pa.Table)
    names = list(RULES)
    places = np.setdiff1d(np.arange(len(rule_of) + len(pairs.malformed)), np.array(pairs.malformed, np.int64))
    kept: list[dict[str, Any]] = []
    trimmed_count = 0
    for place in pairs.malformed:
        _log(log, place, None, "removed", _MALFORMED)
    for place, rule, pair_id, row in zip(
        places.tolist(), rule_of.tolist(), pairs.source["pair_id"].to_pylist(), pairs.json_rows, strict=True
    ):
        if rule >= 0:
            _log(log, place, pair_id, "removed", names[rule])
            continue
        clean, sides = _trimmed_row(row)
        if sides:
            _log(log, place, pair_id, "trimmed", "untrimmed_text", sides)
            trimmed_count += 1
        kept.append(clean)
    name = storage.join(folder, posixpath.basename(pairs.path))
    if pairs.path.endswith(".parquet"):
        filesystem, inside = storage.resolve(pairs.path)
        with filesystem.open_input_file(inside) as file:
            schema = pq.read_schema(file)
        storage.write_parquet(name, pa.Table.from_pylist(kept, schema), row_group_size=256)
        return trimmed_count
    # Lone surrogates cannot be written as UTF-8; as escapes they can.
    text = _as_text(kept, is_lines=pairs.is_lines, is_ascii=False)
    data = (text if _encodable(text) else _as_text(kept, is_lines=pairs.is_lines, is_ascii=True)).encode()
    storage.write_bytes(name, data)
    return trimmed_count


def _as_text(rows: list[dict[str, Any]], *, is_lines: bool, is_ascii: bool) -> str:
    """The rows in the layout that they came in."""
    if is_lines:
        return "".join(json.dumps(row, ensure_ascii=is_ascii) + "\n" for row in rows)
    return json.dumps(rows, indent=2, ensure_ascii=is_ascii)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _trimmed_row(row: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    if (peer := format_of(row)) is not None:
        return trimmed(row, peer)
    clean, sides = dict(row), []
    for side, key in zip(_SIDES, ("conversations", "rejected_conversations"), strict=True):
        asked, answered = row[key]
        value = answered["value"].strip()
        if value != answered["value"]:
            clean[key] = [asked, {**answered, "value": value}]
            sides.append(side)
    return clean, sides


# ---------------------------------------------------------------------- manifest


def _write_manifest(fixed: Fixed, pairs: PairTable, samples: Samples | None, started: float) -> None:
    """The manifest of a table, so that stages can read it; its key is new, because its rows are."""
    from mmedpo_ray.tables.stage_runner import digest

    inputs: dict[str, str] = {}
    # A file, or a folder whose manifest is not ours.
    with suppress(OSError, ValueError):
        source = read_manifest(pairs.path)
        inputs = source.inputs if source is not None else {}
    manifest = Manifest(
        stage=STAGE,
        key=digest(STAGE, list(RULES), pairs.fingerprint, samples.fingerprint if samples else None),
        rows_in=fixed.rows_in,
        rows_out=fixed.rows_out,
        dropped=fixed.removed,
        seconds=round(time.monotonic() - started, 2),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        inputs=inputs,
        extra={"source": storage.absolute(pairs.path), "trimmed": fixed.trimmed},
    )
    write_manifest(fixed.folder, manifest)
