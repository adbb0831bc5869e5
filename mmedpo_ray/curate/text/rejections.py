"""Which answers were turned down on the way to the text pairs, counted by who wrote them and why.

The tasks write what they turn down beside their rows, so that a stopped run loses no count; a pair that was made twice
counts once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from mmedpo_ray.io import storage
from mmedpo_ray.tables.id_set import IdSet

Writer = Literal["candidates", "rewrites", "rule_edits"]
_SCHEMA = pa.schema([("pair_id", pa.string()), ("writer", pa.string()), ("reason", pa.string())])
_SINGULAR = {"candidates": "sampled answer", "rewrites": "rewrite", "rule_edits": "rule edit"}


class TurnedDown(NamedTuple):
    """An answer that cannot be rejected in a pair."""

    writer: Writer
    reason: str


def write(folder: str, found: dict[str, tuple[TurnedDown, ...]]) -> None:
    """Writes what was turned down for some pairs; the same pairs always give the same file.

    Args:
        folder: of this attempt's counts.
        found: pair id → answers turned down.
    """
    rows = [{"pair_id": name} | item._asdict() for name, items in found.items() for item in items]
    if rows:
        name = hashlib.sha256("\n".join(found).encode()).hexdigest()[:24]
        storage.write_parquet(
            storage.join(folder, f"part-{name}.parquet"), pa.Table.from_pylist(rows, _SCHEMA)
        )


def count(folder: str) -> dict[str, dict[str, int]]:
    """Writer → reason → answers turned down; both in the order of their names."""
    seen = IdSet()
    counted: Counter[tuple[str, str]] = Counter()
    for path in storage.list_files(folder, ".parquet"):
        rows = storage.read_parquet(path)
        names = pc.unique(rows["pair_id"]).to_pylist()
        fresh = [name for name, is_known in zip(names, seen.add(names), strict=True) if not is_known]
        rows = rows.filter(pc.is_in(rows["pair_id"], value_set=pa.array(fresh, pa.string())))
        counted.update(zip(rows["writer"].to_pylist(), rows["reason"].to_pylist(), strict=True))
    found: dict[str, dict[str, int]] = {}
    for (writer, reason), number in sorted(counted.items()):
        found.setdefault(writer, {})[reason] = number
    return found


def in_words(counted: dict[str, dict[str, int]]) -> str:
    """One line for the terminal: "3 sampled answers turned down (same_answer 2, meta_text 1)"; empty where there is none."""
    said = []
    for writer, reasons in counted.items():
        total, ordered = sum(reasons.values()), Counter(reasons).most_common()
        named = ", ".join(f"{reason} {number:,}" for reason, number in ordered)
        said.append(f"{total:,} {_SINGULAR[writer]}{'' if total == 1 else 's'} turned down ({named})")
    return ", ".join(said)
