"""The figures of every optimizer step: ``metrics.jsonl`` for reports, and trackers for watching."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmedpo_ray.errors import UserError

METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Where figures are watched."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Adds the figures of one step."""

    def close(self) -> None:
        """Writes out what is buffered."""


class TensorBoardTracker:
    """TensorBoard files under the run's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._board.add_scalar(f"align/{name}", value, step)

    def close(self) -> None:
        self._board.close()


class MlflowTracker:
    """An MLflow run named after the folder; the server is ``MLFLOW_TRACKING_URI``, else files under the run's folder."""

    def __init__(self, folder: Path, step: int) -> None:  # noqa: ARG002
        import mlflow

        self._mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri((folder / "mlruns").as_uri())
        mlflow.set_experiment("mmedpo")
        mlflow.start_run(run_name=folder.parent.name)

    def log(self, figures: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics({f"align/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class WandbTracker:
    """A Weights & Biases run; ``WANDB_MODE=offline`` keeps it on this machine."""

    def __init__(self, folder: Path, step: int) -> None:  # noqa: ARG002
        import wandb

        self._run = wandb.init(
            project="mmedpo", name=folder.parent.name, dir=str(folder), id=folder.parent.name, resume="allow"
        )

    def log(self, figures: dict[str, float], step: int) -> None:
        self._run.log({f"align/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "mlflow": MlflowTracker,
    "wandb": WandbTracker,
}


def check_trackers(names: Sequence[str]) -> None:
    """Fails before training where a tracker's package is absent.

    Raises:
        UserError: it is.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"align.trackers names {name}, which is not installed: pip install {name}.")


class MetricsWriter:
    """Appends a line a step; a resumed run first takes out the lines it will write again.

    Args:
        folder: of the run.
        step: updates done so far.
        trackers: names in :data:`TRACKERS`.
    """

    def __init__(self, folder: Path, step: int, trackers: Sequence[str] = ("tensorboard",)) -> None:
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        path = folder / METRICS_FILE
        temporary = folder / f".{METRICS_FILE}.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.rename(path)
        self._file = path.open("a", buffering=1)
        self._trackers = [TRACKERS[name](folder, step) for name in trackers]

    def write(self, row: dict[str, Any]) -> None:
        """Adds the figures of one step; ``None`` means that there was nothing to measure."""
        self._file.write(json.dumps(row) + "\n")
        figures = {
            name: value
            for name, value in row.items()
            if name not in ("step", "seconds") and value is not None
        }
        for tracker in self._trackers:
            tracker.log(figures, row["step"])

    def close(self) -> None:
        """Writes out what is buffered."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


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
