"""Which launch may write into a run's folder: the one that was started last.

Ray ends the workers of a driver that was killed, but not at once, and where their machine is cut off not for minutes. Until
then they train on and would write beside the launch that resumes the run. So each launch puts its name into the folder, and
rank 0 looks at it before anything of it appears under a final name.
"""

from __future__ import annotations

import json
from pathlib import Path

from mmedpo_ray import storage
from mmedpo_ray.errors import UserError

_FILE = "attempt.json"


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
