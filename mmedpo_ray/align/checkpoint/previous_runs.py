"""Runs with other settings: kept when the settings change, and resumed when they change back.

<run>/align/                   the current run; key.json has its key and the settings that the key stands for
<run>/align-previous-<key>/    another run; at most one is kept
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.markup import escape

from mmedpo_ray.align.checkpoint.checkpoint import checkpoint_folders
from mmedpo_ray.align.checkpoint.output_weights import find_output
from mmedpo_ray.align.checkpoint.run_lock import claim
from mmedpo_ray.console import console
from mmedpo_ray.io import storage
from mmedpo_ray.tables.provenance import Parts, changes

_KEY_FILE = "key.json"


def previous_folder(folder: Path, key: str) -> Path:
    """Where the run with this key is kept while another one is in ``folder``."""
    return folder.with_name(f"{folder.name}-previous-{key}")


def switch_run(folder: Path, key: str, settings: Parts, launch: str) -> None:
    """Makes ``folder`` that of one run, and prints what happened to the run that was in it.

    A run that has a checkpoint or a result is kept; it then replaces the one that was kept before.

    Args:
        folder: of `align`.
        key: identity of the run.
        settings: what the key stands for, by name.
        launch: the only one that may write from now on (:mod:`mmedpo_ray.align.checkpoint.run_lock`).

    Raises:
        OSError: the folder cannot be read.
    """
    # First, because ranks of a killed driver may still write into the folder.
    claim(folder, launch)
    before = _read_key(folder)
    if before.get("key") != key:
        target = previous_folder(folder, key)
        kept = _keep(folder, before.get("key", "unrecorded"))
        where = f"what was trained before is kept in {kept}" if kept else "nothing had been trained before"
        if target.is_dir():
            target.rename(folder)
            say(f"align: continuing the run that these settings had before; {where}")
        elif kept or before:
            say(f"align: starting a new run; {where}. Changed: {changes(before.get('settings'), settings)}")
        for other in folder.parent.glob(previous_folder(folder, "*").name) if kept else ():
            if other != kept:
                storage.remove(str(other))
                say(f"align: removed {other}, a run before that")
        claim(folder, launch)
    content = json.dumps({"key": key, "settings": dict(settings)}, indent=2)
    storage.write_bytes(str(folder / _KEY_FILE), content.encode())


def say(line: str) -> None:
    """Prints a line about the folder."""
    console.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True)


def _read_key(folder: Path) -> dict[str, Any]:
    """Key and settings of the run in the folder; empty if they are missing or damaged."""
    try:
        stored = json.loads((folder / _KEY_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _keep(folder: Path, key: str) -> Path | None:
    """Clears the folder; returns where its files are now, or ``None`` if there was nothing worth keeping."""
    if not (checkpoint_folders(folder) or find_output(folder)):
        storage.remove(str(folder))
        return None
    target = previous_folder(folder, key)
    storage.remove(str(target))
    return folder.rename(target)
