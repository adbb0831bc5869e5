"""The figures of every optimizer step: ``metrics.jsonl`` for reports, TensorBoard for watching."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends a line a step; a resumed run first takes out the lines it will write again.

    Args:
        folder: of the run.
        step: updates done so far.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        path = folder / METRICS_FILE
        temporary = folder / f".{METRICS_FILE}.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.rename(path)
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Adds the figures of one step; ``None`` means that there was nothing to measure."""
        self._file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name not in ("step", "seconds") and value is not None:
                self._board.add_scalar(f"align/{name}", value, row["step"])

    def close(self) -> None:
        """Writes out what is buffered."""
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The figures of all complete steps so far; a line cut off by a crash is left out."""
    path = folder / METRICS_FILE
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows
