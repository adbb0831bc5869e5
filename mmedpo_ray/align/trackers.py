"""Trackers that show the figures of training: TensorBoard, MLflow, Weights & Biases, on rank 0.

An interrupted run continues as the same MLflow or W&B run: their ids are in ``trackers.json``. Steps that are
repeated after a resume have the same figures, so MLflow and W&B do not get them twice; TensorBoard, which
buffers, purges the old ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage

_STORED = "trackers.json"
# The trackers' own settings that workers need too. No secrets, because Ray's dashboard shows what is passed
# on.
TRACKER_ENVIRONMENT = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    *("WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT"),
)
_PROJECT = "mmedpo"
# Modules that a tracker needs, and the packages that provide them.
_PACKAGES = {
    "tensorboard": {"tensorboard": "tensorboard"},
    "mlflow": {"mlflow": "mlflow-skinny", "sqlalchemy": "sqlalchemy", "alembic": "alembic"},
    "wandb": {"wandb": "wandb"},
}


@dataclass
class Tracker:
    """Shows figures.

    Attributes:
        send: adds the figures of a step.
        close: writes out what is buffered.
        logged: last step that the tracker already has.
    """

    send: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]
    logged: int = 0

    def log(self, figures: dict[str, float], step: int) -> None:
        """Adds the figures of one step, unless the tracker has them."""
        if step > self.logged:
            self.send(figures, step)


def _tensorboard(folder: Path, step: int, logged: int) -> Tracker:  # noqa: ARG001
    """TensorBoard files under the run's folder; figures after ``step`` are purged."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def send(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            board.add_scalar(name, value, step)

    return Tracker(send, board.close)


def _mlflow(folder: Path, step: int, logged: int) -> Tracker:  # noqa: ARG001
    """An MLflow run on the server ``MLFLOW_TRACKING_URI``, or else in a SQLite file under the run's folder.

    Raises:
        UserError: the server does not answer, or the address is wrong.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    server = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(server or f"sqlite:///{folder / 'mlflow.db'}")
    run_id = _stored(folder).get("mlflow")
    try:
        # The server may be another one by now.
        run_id = run_id and mlflow.get_run(run_id).info.run_id
    except mlflow.exceptions.MlflowException:
        run_id = None
    try:
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            if server is None and mlflow.get_experiment_by_name(name) is None:
                # Otherwise artifacts would go to ./mlruns.
                mlflow.create_experiment(name, artifact_location=(folder / "mlflow").as_uri())
            mlflow.set_experiment(name)
        run = mlflow.start_run(run_id=run_id, run_name=None if run_id else _run_name(folder))
    except mlflow.exceptions.MlflowException as error:
        raise UserError(
            f"align.trackers names mlflow, which does not start: {str(error).splitlines()[0]}. Check "
            "MLFLOW_TRACKING_URI; without it the figures go into a SQLite file under the run's folder."
        ) from error
    _store(folder, "mlflow", run.info.run_id)
    return Tracker(
        lambda figures, step: mlflow.log_metrics(figures, step=step), mlflow.end_run, logged if run_id else 0
    )


def _wandb(folder: Path, step: int, logged: int) -> Tracker:  # noqa: ARG001
    """A Weights & Biases run; ``WANDB_MODE=offline`` keeps it on this machine.

    Raises:
        UserError: W&B needs an account and finds none.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    known = _stored(folder).get("wandb")
    run_id = known or uuid.uuid4().hex[:12]
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=_run_name(folder),
            dir=str(folder),
            id=run_id,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.UsageError as error:
        raise UserError(
            f"align.trackers names wandb, which does not start: {str(error).splitlines()[0]}. Set "
            "WANDB_API_KEY for the workers, or WANDB_MODE=offline to keep the figures under the run's folder."
        ) from error
    _store(folder, "wandb", run_id)
    return Tracker(
        lambda figures, step: run.log(figures, step=step, commit=True), run.finish, logged if known else 0
    )


TRACKERS: dict[str, Callable[[Path, int, int], Tracker]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
"""Name → function of (folder of the run, updates done so far, last step logged before)."""


def check_trackers(names: Sequence[str]) -> None:
    """Fails before training if a tracker's package is missing.

    Raises:
        UserError: it is.
    """
    for name in names:
        for module in _PACKAGES[name]:
            if importlib.util.find_spec(module) is None:
                raise UserError(
                    f"align.trackers names {name}, but {module} is not installed: pip install "
                    f"{' '.join(_PACKAGES[name].values())}, or pip install 'mmedpo-ray[trackers]' for all of "
                    "them."
                )


def tracker_environment() -> dict[str, str]:
    """The trackers' settings in this process, for the workers."""
    return {name: os.environ[name] for name in TRACKER_ENVIRONMENT if name in os.environ}


def _run_name(folder: Path) -> str:
    """A name for ``<run>/align`` or ``<run>/control/align``."""
    is_control = folder.parent.name == "control"
    return f"{folder.parent.parent.name} control" if is_control else folder.parent.name


def remember_logged(folder: Path, step: int) -> int:
    """Stores the last step that an interrupted launch logged; returns the last of all launches."""
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
