"""Another training in a run's folder: set aside when the settings change, taken up again when they change back.

    <folder>/key.json           identity of the training whose files lie in the folder, and the settings it stands for
    <folder>/.earlier-<key>/    the files of one earlier training; at most one is kept

Files are renamed one by one, ``key.json`` last, so that what a crash left half moved is moved on by the next launch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmedpo_ray.align.checkpoint.checkpoint import CHECKPOINTS, checkpoint_folders
from mmedpo_ray.align.checkpoint.output_weights import find_trained
from mmedpo_ray.align.metrics import METRICS_FILE
from mmedpo_ray.align.trackers import TRACKER_FILES
from mmedpo_ray.io import storage
from mmedpo_ray.tables.manifest import MANIFEST
from mmedpo_ray.tables.provenance import Parts
from mmedpo_ray.tables.run_folder import ADAPTER, WEIGHTS

_KEY_FILE = "key.json"
_EARLIER = ".earlier-"
# The manifest comes first: a folder that lacks some of the others is not finished.
_FILES = (MANIFEST, ADAPTER, WEIGHTS, CHECKPOINTS, METRICS_FILE, *TRACKER_FILES)


def write_identity(folder: Path, key: str, settings: Parts) -> None:
    """Notes whose files lie in the folder from now on."""
    content = json.dumps({"key": key, "settings": dict(settings)}, indent=2)
    storage.write_bytes(str(folder / _KEY_FILE), content.encode())


def read_identity(folder: Path) -> tuple[str | None, dict[str, Any] | None]:
    """Key and settings of the training whose files lie in the folder; ``None`` where they were not recorded."""
    try:
        stored = json.loads((folder / _KEY_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None, None
    if isinstance(stored, dict):
        return stored.get("key"), stored.get("settings")
    # As written before settings were kept.
    return (stored, None) if isinstance(stored, str) else (None, None)


def has_earlier(folder: Path, key: str) -> bool:
    """Whether the training of that key was set aside here."""
    return _place(folder, key).is_dir()


def set_aside(folder: Path) -> Path | None:
    """Clears the folder of its training; of one that has a checkpoint or a result the files are kept.

    Returns:
        Where they are now; ``None`` if there was nothing to keep.

    Raises:
        OSError: the folder cannot be read.
    """
    target = _place(folder, read_identity(folder)[0] or "unrecorded")
    # A folder that is there already is one that a crash left half moved.
    if not (target.is_dir() or checkpoint_folders(folder) or find_trained(folder)):
        for name in (*_FILES, _KEY_FILE):
            storage.remove(str(folder / name))
        return None
    target.mkdir(exist_ok=True)
    _move((*_FILES, _KEY_FILE), folder, target)
    return target


def take_up(folder: Path, key: str) -> Path | None:
    """Puts the files of an earlier training back, see :func:`has_earlier`, and sets aside those in their place.

    Returns:
        Where those are now; ``None`` if there was nothing to keep.

    Raises:
        OSError: the folder cannot be read.
    """
    aside = None
    if read_identity(folder)[0] not in (None, key):
        aside = set_aside(folder)
    source = _place(folder, key)
    _move((*reversed(_FILES), _KEY_FILE), source, folder)
    shutil.rmtree(source)
    if aside is not None:
        remove_earlier(folder, aside)
    return aside


def remove_earlier(folder: Path, keep: Path) -> list[Path]:
    """Deletes all that was set aside but ``keep``; returns what that was."""
    others = [path for path in folder.glob(f"{_EARLIER}*") if path != keep]
    for path in others:
        shutil.rmtree(path)
    return others


def _place(folder: Path, key: str) -> Path:
    return folder / f"{_EARLIER}{key}"


def _move(names: tuple[str, ...], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).exists():
            storage.move(str(source / name), str(target / name))
