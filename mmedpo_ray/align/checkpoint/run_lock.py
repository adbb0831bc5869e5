"""Which launch may write into a run's folder: the one that was started last.

Ray ends the workers of a killed driver with a delay, of minutes if their machine is cut off. Until then they
continue training and would write into the folder beside the launch that resumes the run. So each launch
writes its id into the folder, and rank 0 checks it before it gives a file its final name. In the same way a
driver that has to stop asks its ranks to save first.
"""

from __future__ import annotations

import json
from pathlib import Path

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage

_OWNER_FILE, STOP_FILE = "attempt.json", "stop.json"


def claim(folder: Path, launch: str) -> None:
    """Makes this launch the only one that may write."""
    storage.write_bytes(str(folder / _OWNER_FILE), json.dumps({"attempt": launch}).encode())


def check_claim(folder: Path, launch: str) -> None:
    """Checks that this launch may still write; any may write to a folder without an owner.

    Raises:
        UserError: another launch was started on the folder.
    """
    if _launch_in(folder / _OWNER_FILE) not in (None, launch):
        raise UserError(
            f"align: another align was started on {folder} and resumes from its last checkpoint; this one "
            "ends here."
        )


def request_stop(folder: Path, launch: str) -> None:
    """Asks the ranks of this launch to save after the current step and end."""
    (folder / STOP_FILE).write_text(json.dumps({"attempt": launch}))


def is_stop_requested(folder: Path, launch: str) -> bool:
    """Whether the driver of this launch called :func:`request_stop`."""
    return _launch_in(folder / STOP_FILE) == launch


def _launch_in(path: Path) -> str | None:
    try:
        # Opened again each time: a shared file system then asks its server.
        return json.loads(path.read_text())["attempt"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
