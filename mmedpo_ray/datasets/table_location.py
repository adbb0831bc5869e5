"""What lies where a table was looked for, and what to give instead.

No name of a file inside a folder is told.
"""

from __future__ import annotations

import posixpath
from typing import Literal

from pyarrow import fs

from mmedpo_ray.io import storage
from mmedpo_ray.tables.commit import PARTS
from mmedpo_ray.tables.run_folder import command_of

Wanted = Literal["pairs", "samples"]

GIVE: dict[Wanted, str] = {
    "pairs": "Give a folder of Parquet files, a Parquet file or a released MMedPO JSON (.json, .jsonl).",
    "samples": "Give with --samples the folder samples/ that `mmedpo ingest` wrote, or a Parquet file.",
}
# Tables of a run that would do, the best first, and what writes them.
_TABLES: dict[Wanted, tuple[str, ...]] = {"pairs": ("scored", "pairs"), "samples": ("samples",)}
_NAMES = ("scored", "pairs", "samples")
_CONFIG = "config.yaml"


def why_no_table(path: str, wanted: Wanted) -> str:
    """The message for a path that is neither a Parquet file nor a folder of some."""
    filesystem, inside = storage.resolve(path)
    if not storage.exists(path):
        run, name = posixpath.split(storage.absolute(path).rstrip("/"))
        if name in _NAMES and storage.exists(storage.join(run, _CONFIG)):
            return _not_yet(run, name, wanted)
        own = " A run's own is found by run.folder=DIR." if name == _TABLES["pairs"][0] else ""
        return f"there is no {path}. {GIVE[wanted]}{own}"
    if filesystem.get_file_info(inside).is_file:
        formats = "neither a Parquet nor a JSON file" if wanted == "pairs" else "no Parquet file"
        return f"{path} is {formats}. {GIVE[wanted]}"
    names = {item.base_name for item in filesystem.get_file_info(fs.FileSelector(inside))}
    tables = [
        name for name in _NAMES if name in names and storage.list_files(storage.join(path, name), ".parquet")
    ]
    fit = [name for name in _TABLES[wanted] if name in tables]
    if fit:
        tables_there = " or ".join(storage.join(path, name) for name in fit)
        return f"{path} is the folder of a run, not a table. Give {tables_there}."
    if _CONFIG in names or tables:
        return _not_yet(path, _TABLES[wanted][0], wanted)
    if PARTS in names:
        return f"{path} is an unfinished table. Repeat the command that writes it: it resumes."
    if not names:
        return f"{path} is an empty folder. {GIVE[wanted]}"
    return f"{path} has no Parquet file directly in it, but other files. {GIVE[wanted]}"


def _not_yet(run: str, name: str, wanted: Wanted) -> str:
    return (
        f"{run} is the folder of a run without {name}/ yet: `mmedpo {command_of(name)} run.folder={run}` "
        f"writes it. Or another table: {GIVE[wanted][0].lower()}{GIVE[wanted][1:]}"
    )


def why_other_columns(path: str, columns: list[str], missing: str, wanted: Wanted) -> str:
    """The message for a table that lacks a column which the wanted one has."""
    if wanted == "pairs" and {"sample_id", "question", "answer"} <= set(columns):
        return f"{path} is a table of samples, not of pairs. Give a run's pairs/ or scored/."
    if wanted == "samples" and {"chosen", "rejected"} <= set(columns):
        return f"{path} is a table of pairs, not of samples. {GIVE[wanted]}"
    shown = ", ".join(columns[:12]) + (", …" if len(columns) > 12 else "")
    needed = "question, chosen and rejected" if wanted == "pairs" else "sample_id and answer"
    kind = "preference pairs" if wanted == "pairs" else "samples"
    return (
        f"{path} has no column {missing!r}, so it is no table of {kind} (it has {shown}; needed are "
        f"{needed}). {GIVE[wanted]}"
    )
