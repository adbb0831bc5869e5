"""Where the figures of training are watched: TensorBoard, MLflow, Weights & Biases. Rank 0 alone has trackers.

A run that was interrupted goes on as the same MLflow or W&B run: their ids are kept in ``trackers.json``. Steps that are done
again after a resume have the same figures, so MLflow and W&B do not get them twice; TensorBoard, which buffers, takes the old
ones out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage

# What trackers leave in a run's folder; another run takes it away.
TRACKER_FILES = ("trackers.json", "tensorboard", "mlflow.db", "mlflow", "wandb")
_STORED, _BOARD, _MLFLOW_DB, _MLFLOW_ARTIFACTS, _ = TRACKER_FILES

# Settings of the trackers' own that workers need too. Not secrets: what Ray passes on is shown in its dashboard.
TRACKER_ENVIRONMENT = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "WANDB_MODE",
    "WANDB_BASE_URL",
    "WANDB_ENTITY",
    "WANDB_PROJECT",
)
_PROJECT = "mmedpo"
# Modules that a tracker needs, and what brings them.
_MODULES = {"tensorboard": ["tensorboard"], "mlflow": ["mlflow", "sqlalchemy", "alembic"], "wandb": ["wandb"]}
_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny sqlalchemy alembic", "wandb": "wandb"}


class Tracker(Protocol):
    """Where figures are watched."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Adds the figures of one step."""

    def close(self) -> None:
        """Writes out what is buffered."""


class TensorBoardTracker:
    """TensorBoard files under the run's folder.

    Args:
        folder: of the run.
        step: updates done so far; figures of later steps are purged.
    """

    def __init__(self, folder: Path, step: int, logged: int) -> None:  # noqa: ARG002
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / _BOARD), purge_step=step + 1)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class MlflowTracker:
    """An MLflow run; the server is ``MLFLOW_TRACKING_URI``, else a SQLite file under the run's folder.

    Args:
        folder: of the run.
        logged: the last step that an interrupted launch wrote down.

    Raises:
        UserError: the server does not answer, or is none.
    """

    def __init__(self, folder: Path, step: int, logged: int) -> None:  # noqa: ARG002
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        self._mlflow = mlflow
        server = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(server or f"sqlite:///{folder / _MLFLOW_DB}")
        try:
            run_id = self._known_run(folder)
            if run_id is None:
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
                if server is None and mlflow.get_experiment_by_name(name) is None:
                    # Otherwise artifacts would go to ./mlruns.
                    mlflow.create_experiment(name, artifact_location=(folder / _MLFLOW_ARTIFACTS).as_uri())
                mlflow.set_experiment(name)
            run = mlflow.start_run(run_id=run_id, run_name=None if run_id else _run_name(folder))
        except mlflow.exceptions.MlflowException as error:
            raise UserError(
                f"align.trackers names mlflow, which does not start: {str(error).splitlines()[0]}. Check MLFLOW_TRACKING_URI; "
                "without it the figures go into a SQLite file under the run's folder."
            ) from error
        _store(folder, "mlflow", run.info.run_id)
        self._logged = logged if run_id else 0

    def _known_run(self, folder: Path) -> str | None:
        """The run of an earlier launch, if it is on this server."""
        run_id = _stored(folder).get("mlflow")
        try:
            return run_id and self._mlflow.get_run(run_id).info.run_id
        except self._mlflow.exceptions.MlflowException:
            return None

    def log(self, figures: dict[str, float], step: int) -> None:
        if step > self._logged:
            self._mlflow.log_metrics(figures, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class WandbTracker:
    """A Weights & Biases run; ``WANDB_MODE=offline`` keeps it on this machine.

    Args:
        folder: of the run.
        logged: the last step that an interrupted launch wrote down.

    Raises:
        UserError: W&B wants an account and finds none.
    """

    def __init__(self, folder: Path, step: int, logged: int) -> None:  # noqa: ARG002
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        known = _stored(folder).get("wandb")
        run_id = known or uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=_run_name(folder),
                dir=str(folder),
                id=run_id,
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.UsageError as error:
            raise UserError(
                f"align.trackers names wandb, which does not start: {str(error).splitlines()[0]}. Set WANDB_API_KEY for the "
                "workers, or WANDB_MODE=offline to keep the figures under the run's folder."
            ) from error
        _store(folder, "wandb", run_id)
        self._logged = logged if known else 0

    def log(self, figures: dict[str, float], step: int) -> None:
        if step > self._logged:
            self._run.log(figures, step=step, commit=True)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, int, int], Tracker]] = {
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
        for module in _MODULES[name]:
            if importlib.util.find_spec(module) is None:
                raise UserError(
                    f"align.trackers names {name}, but {module} is not installed: pip install {_PACKAGES[name]}, or "
                    "pip install 'mmedpo-ray[trackers]' for all of them."
                )


def tracker_environment() -> dict[str, str]:
    """The trackers' settings in this process, for the workers."""
    return {name: os.environ[name] for name in TRACKER_ENVIRONMENT if name in os.environ}


def _run_name(folder: Path) -> str:
    """``<run>/align`` or ``<run>/control/align`` as people call it."""
    is_control = folder.parent.name == "control"
    return f"{folder.parent.parent.name} control" if is_control else folder.parent.name


def remember_logged(folder: Path, step: int) -> int:
    """Notes the last step that an interrupted launch wrote down; returns the last of all launches."""
    logged = max(step, _stored(folder).get("logged", 0))
    _store(folder, "logged", logged)
    return logged


def _stored(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _STORED).read_text())
    except FileNotFoundError:
        return {}


def _store(folder: Path, name: str, value: str | int) -> None:
    storage.write_bytes(str(folder / _STORED), json.dumps(_stored(folder) | {name: value}).encode())
