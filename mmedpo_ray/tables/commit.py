"""A merged table takes the place of the one before it; a crash in the middle is mended by the next attempt.

What is to be moved is written down first (``.merged/publish.json``), so the moves can be repeated from any point. The manifest
goes first and comes last: a table without one is unfinished.
"""

from __future__ import annotations

import posixpath

from pydantic import BaseModel

from mmedpo_ray.io import storage
from mmedpo_ray.tables.manifest import MANIFEST, Manifest, write_manifest
from mmedpo_ray.tables.merge import DROPPED

# Folder of the parts that a table is merged from; they go when it is there.
PARTS = ".parts"

_MERGED = ".merged"
_PUBLISH = "publish.json"


class _Publication(BaseModel):
    """What is left to do once a table is merged: these files into its folder, then the manifest."""

    manifest: Manifest
    files: list[str]


def staged(folder: str) -> str:
    """Where the new files of a table are until they are published."""
    return storage.join(folder, _MERGED)


def publish(folder: str, manifest: Manifest) -> None:
    """Puts the staged files in the place of the table's."""
    names = [
        storage.join(*inner, posixpath.basename(path))
        for inner in ((), (DROPPED,))
        for path in storage.list_files(storage.join(staged(folder), *inner), ".parquet")
    ]
    plan = _Publication(manifest=manifest, files=names)
    storage.write_bytes(storage.join(staged(folder), _PUBLISH), plan.model_dump_json().encode())
    _carry_out(folder, plan)


def resume(folder: str, key: str) -> None:
    """Finishes what an attempt with this key had begun to publish; what one with another key had is deleted."""
    try:
        plan = _Publication.model_validate_json(storage.read_bytes(storage.join(staged(folder), _PUBLISH)))
    except FileNotFoundError:
        return
    if plan.manifest.key == key:
        _carry_out(folder, plan)
    else:
        storage.remove(staged(folder))


def _carry_out(folder: str, plan: _Publication) -> None:
    """Moves the files, deletes the table's other ones, writes the manifest; may be repeated from any point."""
    storage.remove(storage.join(folder, MANIFEST))
    for name in plan.files:
        if storage.exists(storage.join(staged(folder), name)):
            storage.move(storage.join(staged(folder), name), storage.join(folder, name))
    wanted = {storage.join(folder, name) for name in plan.files}
    for inner in (folder, storage.join(folder, DROPPED)):
        for path in storage.list_files(inner, ".parquet"):
            if path not in wanted:
                storage.remove(path)
    if not any(name.startswith(DROPPED) for name in plan.files):
        storage.remove(storage.join(folder, DROPPED))
    storage.remove_temporary(folder)
    write_manifest(folder, plan.manifest)
    storage.remove(storage.join(folder, PARTS))
    storage.remove(staged(folder))
