"""Publishes a merged table: its files take the place of the old ones, and a crash on the way is completed later.

The plan is written first (``.merged/publish.json``), so the moves can be repeated from any point. The manifest is
deleted first and written last: a table without one is unfinished.
"""

from __future__ import annotations

import posixpath

from pydantic import BaseModel

from mmedpo_ray.io import storage
from mmedpo_ray.tables.manifest import MANIFEST, Manifest, write_manifest
from mmedpo_ray.tables.merge import DROPPED

# Folder of the parts that a table is merged from; deleted when the table is there.
PARTS = ".parts"

_PUBLISH = "publish.json"


class _Publication(BaseModel):
    """What is left to do once a table is merged: move these files into its folder, then write the manifest."""

    manifest: Manifest
    files: list[str]


def staged(folder: str) -> str:
    """Where the new files of a table are until they are published."""
    return storage.join(folder, ".merged")


def publish(folder: str, manifest: Manifest) -> None:
    """Replaces the files of a table by the staged ones."""
    names = [
        storage.join(*inner, posixpath.basename(path))
        for inner in ((), (DROPPED,))
        for path in storage.list_files(storage.join(staged(folder), *inner), ".parquet")
    ]
    plan = _Publication(manifest=manifest, files=names)
    storage.write_bytes(storage.join(staged(folder), _PUBLISH), plan.model_dump_json().encode())
    _carry_out(folder, plan)


def resume(folder: str, key: str) -> None:
    """Completes the publication that an attempt with this key began; deletes that of an attempt with another key."""
    try:
        plan = _Publication.model_validate_json(storage.read_bytes(storage.join(staged(folder), _PUBLISH)))
    except FileNotFoundError:
        return
    if plan.manifest.key == key:
        _carry_out(folder, plan)
    else:
        storage.remove(staged(folder))


def _carry_out(folder: str, plan: _Publication) -> None:
    """Moves the files, deletes the table's old ones, writes the manifest; can be repeated from any point."""
    storage.remove(storage.join(folder, MANIFEST))
    for name in plan.files:
        if storage.exists(storage.join(staged(folder), name)):
            storage.move(storage.join(staged(folder), name), storage.join(folder, name))
    current = {storage.join(folder, name) for name in plan.files}
    for inner in (folder, storage.join(folder, DROPPED)):
        for path in storage.list_files(inner, ".parquet"):
            if path not in current:
                storage.remove(path)
    if not any(name.startswith(DROPPED) for name in plan.files):
        storage.remove(storage.join(folder, DROPPED))
    storage.remove_temporary(folder)
    write_manifest(folder, plan.manifest)
    storage.remove(storage.join(folder, PARTS))
    storage.remove(staged(folder))
