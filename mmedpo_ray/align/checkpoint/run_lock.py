"""Which launch may write into a run's folder: the one that was started last.

Ray ends the workers of a driver that was killed, but not at once, and where their machine is cut off not for minutes. Until
then they train on and would write beside the launch that resumes the run. So each launch puts its name into the folder, and
rank 0 looks at it before anything of it appears under a final name. In the same way a driver that is told to end asks its ranks to
save first, however they were started.
"""

from __future__ import annotations

import json
from pathlib import Path

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage

_FILE = "attempt.json"
STOP_FILE = "stop.json"


def claim(folder: Path, attempt: str) -> None:
    """Makes this launch the one that may write."""
    storage.write_bytes(str(folder / _FILE), json.dumps({"attempt": attempt}).encode())


def check_claim(folder: Path, attempt: str) -> None:
    """Looks whether this launch may still write; a folder that nobody claimed is everybody's.

    Raises:
        UserError: another launch was started on the folder.
    """
    try:
        # Opened anew each time: a shared file system then asks its server.
        owner = json.loads((folder / _FILE).read_text())["attempt"]
    except FileNotFoundError:
        return
    if owner != attempt:
        raise UserError(
            f"align: another align was started on {folder} and goes on from its last checkpoint; this one ends here."
        )


def ask_to_stop(folder: Path, attempt: str) -> None:
    """Asks the ranks of this launch to save after the step under way and end."""
    (folder / STOP_FILE).write_text(json.dumps({"attempt": attempt}))


def is_told_to_stop(folder: Path, attempt: str) -> bool:
    """Whether the driver of this launch asked for that."""
    try:
        return json.loads((folder / STOP_FILE).read_text())["attempt"] == attempt
    except (FileNotFoundError, json.JSONDecodeError):
        return False
