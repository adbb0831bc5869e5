"""The figures of every optimizer step: writing and reading ``metrics.jsonl``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedpo_ray.align.trackers import TRACKERS, remember_logged

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends a line per step; a resumed run first removes the lines that it will write again.

    Args:
        folder: of the run.
        step: updates done so far.
        trackers: names in :data:`~mmedpo_ray.align.trackers.TRACKERS`; they get the figures too.
    """

    def __init__(self, folder: Path, step: int, trackers: Sequence[str] = ("tensorboard",)) -> None:
        rows = read_metrics(folder)
        logged = remember_logged(folder, rows[-1]["step"]) if rows else 0
        path = folder / METRICS_FILE
        temporary = folder / f".{METRICS_FILE}.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        temporary.rename(path)
        self._file = path.open("a", buffering=1)
        self._trackers = {name: TRACKERS[name](folder, step, logged) for name in trackers}

    def write(self, row: dict[str, Any]) -> None:
        """Adds the figures of one step; ``None`` means that there was nothing to measure."""
        figures = {
            f"align/{name}": value
            for name, value in row.items()
            if name not in ("step", "seconds") and value is not None
        }
        self._notify("log", figures, row["step"])
        # Last: a step in the file is in the trackers too.
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Writes out what is buffered."""
        self._file.close()
        self._notify("close")

    def _notify(self, method: str, *arguments: Any) -> None:
        """Calls a method of all trackers; one that fails, such as a lost server, gets no more calls."""
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # each client raises its own
                del self._trackers[name]
                message = "align: %s failed (%s) and gets no more figures; %s has them all"
                log.warning(message, name, error, METRICS_FILE)


class MetricsTail:
    """Reads the lines that were added to ``metrics.jsonl`` since the last call.

    Args:
        folder: of the run; the file need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE
        self._file_id: int | None = None
        self._position = 0

    def read(self) -> list[dict[str, Any]]:
        """The new complete lines; all lines if the workers resumed and wrote the file again."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file_id or status.st_size < self._position:
                    self._file_id, self._position = status.st_ino, 0
                file.seek(self._position)
                complete, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._position += len(complete) + len(newline)
        return _rows(complete.decode())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The figures of all complete steps so far; a line cut off by a crash is skipped."""
    path = folder / METRICS_FILE
    return _rows(path.read_text()) if path.is_file() else []


def _rows(text: str) -> list[dict[str, Any]]:
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
