"""What the audit reads: pairs as Parquet or as released MMedPO JSON, in batches and unchanged.

Ingest strips white space and drops unusable rows; the audit must see all rows unchanged, so it reads the
sources itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from mmedpo_ray.datasets.embedded_images import bytes_or_name
from mmedpo_ray.datasets.json_rows import layout_of, read_json_list
from mmedpo_ray.datasets.preferences import PREFERENCE_FORMATS, format_of
from mmedpo_ray.datasets.table_location import Wanted, why_no_table, why_other_columns
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.io.text import storable

_BATCH_ROWS = 65_536
# Columns that some check looks at; everything but the first three may be absent.
_REQUIRED = ("question", "chosen", "rejected")
_TEXT_COLUMNS = (
    *_REQUIRED,
    "pair_id",
    "sample_id",
    "image_id",
    "image_uri",
    "rejected_image_uri",
    "kind",
    "dataset",
    "task",
    "answer_type",
    "tool",
    "heat_map_uri",
    "noise",
)
_NUMBER_COLUMNS = ("weight",)
_JSON_FIELDS = pa.schema(
    [
        ("pair_id", pa.string()),
        ("image_uri", pa.string()),
        ("question", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("weight", pa.float64()),
        ("kind", pa.string()),
        ("rejected_image_uri", pa.string()),
    ]
)
# What a table of text pairs alone does without.
_VISUAL_COLUMNS = {"kind", "rejected_image_uri"}


@dataclass(frozen=True)
class PairTable:
    """A table of preference pairs to audit.

    Attributes:
        path: where it is.
        num_rows: readable rows.
        columns: names of the columns that checks may use.
        fingerprint: changes with the content (for Parquet with the manifest's key, or with the files' sizes
            and times).
        malformed: positions (0-based, in the JSON list) of rows that are no preference pair; they are no rows
            here.
        source: the open Parquet data set, or the JSON as a table.
        json_rows: the JSON rows behind ``source``, in order; null for Parquet.
        is_lines: the JSON is one of lines, a row each.
    """

    path: str
    num_rows: int
    columns: frozenset[str]
    fingerprint: str
    malformed: tuple[int, ...]
    source: pads.Dataset | pa.Table
    json_rows: list[dict[str, Any]] | None = None
    is_lines: bool = False

    def batches(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The rows in order, in tables of 65,536 rows.

        Args:
            columns: names to read, as they are in the file, in any number of chunks; null reads those that
                checks use, strings in one chunk each.
        """
        wanted = columns if columns is not None else sorted(self.columns)
        if isinstance(self.source, pa.Table):
            for start in range(0, self.source.num_rows, _BATCH_ROWS):
                yield self.source.select(wanted).slice(start, _BATCH_ROWS).combine_chunks()
            return
        held: list[pa.RecordBatch] = []
        rows = 0
        scanned = self.source.to_batches(
            columns=wanted, batch_size=_BATCH_ROWS, batch_readahead=2, fragment_readahead=1
        )
        for batch in _readable(scanned, self.path):
            held.append(batch)
            rows += batch.num_rows
            if rows >= _BATCH_ROWS:
                yield self._whole(held, raw=columns is not None)
                held, rows = [], 0
        if rows:
            yield self._whole(held, raw=columns is not None)

    def _whole(self, held: list[pa.RecordBatch], *, raw: bool) -> pa.Table:
        table = pa.Table.from_batches(held)
        # Chunks of few values each may have dictionaries that are too large for their index together.
        return table if raw else as_expected(table, sorted(self.columns), self.path)

    def files(self) -> list[str]:
        """The Parquet files, in the order of the rows; none for JSON."""
        if isinstance(self.source, pa.Table):
            return []
        return parquet_files(self.path)

    def values(self, column: str, positions: np.ndarray) -> list[Any]:
        """One column at some rows (numbers of rows as strings where the table has no ids)."""
        if len(positions) == 0:
            return []
        if column not in self.columns:
            return [f"row {position}" for position in positions.tolist()]
        table = self.source
        if isinstance(table, pads.Dataset):
            # Arrow cannot take from every type that a text may have.
            expected = pc.field(column).cast(_expected_type(column))
            taken = table.scanner(columns={column: expected}).take(pa.array(np.sort(np.unique(positions))))
            found = dict(zip(np.sort(np.unique(positions)).tolist(), taken[column].to_pylist(), strict=True))
            return [found[position] for position in positions.tolist()]
        return table[column].take(pa.array(positions)).to_pylist()


def as_expected(table: pa.Table, names: Sequence[str], path: str) -> pa.Table:
    """The columns that checks use, in their types, one chunk each; null where the table has none.

    Raises:
        UserError: a column of ``path`` is of another type.
    """
    columns = []
    for name in names:
        kind = _expected_type(name)
        if name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, kind))
            continue
        try:
            columns.append(table[name].cast(kind))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"{path}: column {name!r} is {table[name].type}, expected {kind}. See the table reference."
            ) from error
    return pa.table(columns, names=list(names)).combine_chunks()


def _expected_type(name: str) -> pa.DataType:
    return pa.float64() if name in _NUMBER_COLUMNS else pa.string()


def open_pairs(path: str) -> PairTable:
    """Opens a table of pairs: Parquet files, or JSON in the released layout or that of a peer.

    Raises:
        UserError: nothing is there, it is none of these, or a required column is missing.
    """
    if is_json(path) and parquet_files(path) == [path]:
        return _open_json(path)
    if (peers := _peer_rows(path)) is not None:
        return _table_of_rows(path, peers, is_lines=False)
    source = open_parquet(path, "pairs", _REQUIRED)
    names, num_rows = set(source.schema.names), source.count_rows()
    used = frozenset(names & {*_TEXT_COLUMNS, *_NUMBER_COLUMNS})
    return PairTable(path, num_rows, used, parquet_fingerprint(path), (), source)


def is_json(path: str) -> bool:
    """Whether the name is that of a JSON list (.json) or of JSON Lines (.jsonl, .ndjson)."""
    return path.lower().endswith(".json") or layout_of(path, "list") == "lines"


def open_parquet(path: str, wanted: Wanted, required: Sequence[str]) -> pads.Dataset:
    """Opens a Parquet file or the Parquet files directly in a folder.

    Args:
        path: the file or folder.
        wanted: what it should be, for the message where it is something else.
        required: columns that it must have.

    Raises:
        UserError: there is no such file, it cannot be read, or it lacks a column.
    """
    files, (filesystem, _) = parquet_files(path), storage.resolve(path)
    if not files or not files[0].endswith(".parquet"):
        raise UserError(why_no_table(path, wanted))
    try:
        source = pads.dataset(
            [storage.resolve(name)[1] for name in files], filesystem=filesystem, format="parquet"
        )
        source.count_rows()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"cannot read {path} as Parquet: {type(error).__name__}. Write the table again."
        ) from error
    for name in required:
        if name not in source.schema.names:
            raise UserError(why_other_columns(path, source.schema.names, name, wanted))
    return source


def parquet_fingerprint(path: str) -> str:
    """The key of the table's manifest; where it has none, a hash of its files' names, sizes and times."""
    key, files = None, parquet_files(path)
    if files != [path]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            key = json.loads(storage.read_bytes(storage.join(path, "manifest.json")))["key"]
    infos = [storage.resolve(name)[0].get_file_info(storage.resolve(name)[1]) for name in files]
    facts = [key, [[posixpath.basename(item.path), item.size, item.mtime_ns] for item in infos]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def parquet_files(path: str) -> list[str]:
    """The file itself, or the Parquet files directly in a folder in name order, which is that of the rows."""
    filesystem, inside = storage.resolve(path)
    is_file = filesystem.get_file_info(inside).is_file
    return [path] if is_file else storage.list_files(path, ".parquet")


def _readable(batches: Iterator[pa.RecordBatch], path: str) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise UserError(
            f"cannot read {path} as Parquet: {type(error).__name__}. Write the table again."
        ) from error


# ---------------------------------------------------------------------- released JSON


def _open_json(path: str) -> PairTable:
    try:
        rows = read_json_list(storage.absolute(path))
    except UserError as error:
        # What reads annotation files speaks of the settings that name them.
        said = str(error).partition(" Check data.format")[0]
        raise UserError(f"{said} The audit reads the released layout, or Parquet.") from error
    return _table_of_rows(path, rows, is_lines=layout_of(path, "list") == "lines")


def _peer_rows(path: str) -> list[dict[str, Any]] | None:
    """The rows of a Parquet file in the layout of a peer; None for another file."""
    if parquet_files(path) != [path] or not path.endswith(".parquet"):
        return None
    try:
        filesystem, inside = storage.resolve(path)
        with filesystem.open_input_file(inside) as file:
            names = pq.read_schema(file).names
            if "question" in names or format_of(dict.fromkeys(names)) is None:
                return None
            return pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError):
        # Whoever opens it as a table of ours says what is wrong.
        return None


def _table_of_rows(path: str, rows: list[Any], *, is_lines: bool) -> PairTable:
    pairs, kept, malformed = [], [], []
    for position, row in enumerate(rows):
        pair = _json_pair(row, position)
        if pair is None:
            malformed.append(position)
        else:
            pairs.append(pair)
            kept.append(row)
    if not pairs:
        raise UserError(
            f"{path}: none of its {len(rows):,} rows is a preference pair. Expected the released layout, a "
            f"list of "
            '{"id", "image", "conversations", "rejected_conversations", "weighted_score"}, or that of TRL, '
            "LLaMA-Factory or ms-swift."
        )
    table = pa.Table.from_pylist(pairs, _JSON_FIELDS)
    columns = set(table.column_names)
    if table["weight"].null_count == table.num_rows:
        columns -= {"weight"}
    if not pc.any(pc.equal(table["kind"], "visual")).as_py():
        columns -= _VISUAL_COLUMNS
    content = hashlib.sha256(storage.read_bytes(storage.absolute(path))).hexdigest()[:16]
    return PairTable(
        path, table.num_rows, frozenset(columns), content, tuple(malformed), table, kept, is_lines
    )


def _json_pair(row: Any, position: int) -> dict[str, Any] | None:
    """A row of the released layout with unchanged strings, or None."""
    if not isinstance(row, dict):
        return None
    if (peer := format_of(row)) is not None:
        return _peer_pair(row, position, peer)
    preferred, other = (_turn(row.get(key)) for key in ("conversations", "rejected_conversations"))
    if preferred is None or other is None:
        return None
    given, image, weight = row.get("id"), row.get("image"), row.get("weighted_score")
    return {
        "pair_id": storable(str(given)) if given is not None else f"row {position}",
        "image_uri": storable(image) if isinstance(image, str) else None,
        "question": preferred[0].replace("<image>", " ").strip(),
        "chosen": preferred[1],
        "rejected": other[1],
        "weight": _weight(weight),
        "kind": "text",
    }


def _peer_pair(row: dict[str, Any], position: int, peer: str) -> dict[str, Any] | None:
    """A row of another project with unchanged strings, or None."""
    try:
        found = PREFERENCE_FORMATS[peer](row)
        image, other = (_image_key(bytes_or_name(value)) for value in (found.image, found.rejected_image))
    except UnusableError:
        return None
    given = row.get("id")
    visual = other is not None and other != image
    return {
        "pair_id": storable(str(given)) if given is not None else f"row {position}",
        "image_uri": image,
        "question": storable(found.question).replace("<image>", " ").strip(),
        "chosen": storable(found.chosen),
        "rejected": storable(found.rejected),
        "weight": _weight(row.get("weight", found.score)),
        "kind": "visual" if visual else "text",
        "rejected_image_uri": other if visual else image,
    }


def _image_key(value: Any) -> str | None:
    """The name of an image, or the hash of its bytes."""
    if isinstance(value, bytes):
        return f"sha256:{hashlib.sha256(value).hexdigest()}"
    return storable(value) if isinstance(value, str) else None


def _weight(value: Any) -> float | None:
    """The weight, None where there is none; NaN, which is reported as invalid, for what is no number."""
    if value is None:
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def _turn(value: Any) -> tuple[str, str] | None:
    """Question and answer of a conversation of one turn."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    question, answer = (turn.get("value") if isinstance(turn, dict) else None for turn in value)
    if not isinstance(question, str) or not isinstance(answer, str):
        return None
    return storable(question), storable(answer)
