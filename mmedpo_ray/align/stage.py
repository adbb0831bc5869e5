"""The align stage: scored pairs → trained weights, under Ray Train and DeepSpeed.

    align(config, "aligned")    # weighted DPO
    align(config, "control")    # supervised fine-tuning with the same number of updates on the same images

The driver starts the workers, shows progress and writes the manifest; the training itself is
:class:`~mmedpo_ray.align.loop.TrainingLoop`. A worker that dies is replaced and resumes from the last
checkpoint, and so does a stage whose driver died.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from mmedpo_ray.align.checkpoint.checkpoint import checkpoint_folders, remove_checkpoints, set_aside_unusable
from mmedpo_ray.align.checkpoint.output_weights import find_output
from mmedpo_ray.align.checkpoint.previous_runs import previous_folder, say, switch_run
from mmedpo_ray.align.checkpoint.run_lock import STOP_FILE, is_stop_requested, request_stop
from mmedpo_ray.align.data.prepare_stage import made_with, preparation_settings, prepare
from mmedpo_ray.align.graceful_shutdown import GracefulTorchConfig, training
from mmedpo_ray.align.loop import InterruptedTrainingError, TrainingLoop
from mmedpo_ray.align.metrics import read_metrics
from mmedpo_ray.align.plan.preview import announce
from mmedpo_ray.align.plan.resources import check_cluster, rank_resources, wants_gpu
from mmedpo_ray.align.policy import TrainingSpec, check_model
from mmedpo_ray.align.progress import PLAN_FILE, show_progress
from mmedpo_ray.align.settings import LoraConfig
from mmedpo_ray.align.trackers import check_trackers, tracker_environment
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.models.loading import resolve_model
from mmedpo_ray.tables.provenance import MADE_WITH, by_name
from mmedpo_ray.tables.run_folder import Role, RunFolder
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner

log = logging.getLogger(__name__)

_ERROR_FILE = "error.json"
# Settings that change how a run is carried out but not its result.
_OPERATIONAL = {
    *("num_workers", "resize_check_seconds", "cpus_per_worker", "threads_per_worker", "use_gpu"),
    *("max_failures", "checkpoint_every", "keep_checkpoints", "trackers", "strategy", "attention"),
    *("gradient_checkpointing", "pairs_per_forward", "tokens_per_forward"),
}


def align(config: Config, role: Role = "aligned") -> Manifest:
    """Trains a model.

    Args:
        config: all settings.
        role: ``aligned``, or ``control``: the same images in the same order and as many updates, with the
            likelihood of the chosen answers as objective and ``control.learning_rate``.

    Returns:
        The manifest; the trained weights are in ``RunFolder.align(role)``
        (:mod:`mmedpo_ray.align.checkpoint.output_weights`).

    Raises:
        UserError: an input is missing, the cluster is too small, or the loss is not finite.
    """
    resolve_model(config.model.path)
    check_trackers(config.align.trackers)
    if config.align.train == "full" and config.align.lora != LoraConfig():
        log.warning("align.lora has no effect with align.train=full")
    run = RunFolder(config.run.folder)
    folder = run.align(role)
    prepared = prepare(config)
    name, settings = "align", config.align
    if role == "control":
        name = "align control"
        rate = config.control.learning_rate or settings.learning_rate
        settings = settings.model_copy(update={"objective": "sft", "learning_rate": rate})
    identity = [settings.model_dump(exclude=_OPERATIONAL), preparation_settings(config), config.run.seed]
    stage = StageRunner(name, str(folder), config, settings=identity, inputs=[run.prepared])
    # Everything that the key is a hash of, by name.
    chosen = by_name("align", settings.model_dump(mode="json", exclude=_OPERATIONAL))
    known = {**made_with(config), **chosen, "run.seed": config.run.seed}
    launch = uuid.uuid4().hex[:12]
    if previous_folder(folder, stage.key).is_dir():
        switch_run(folder, stage.key, known, launch)
    if (done := stage.finished()) is not None:
        # A driver may have died between the manifest and this.
        remove_checkpoints(folder)
        return done
    check_model(config.model.path, settings)
    use_gpu = wants_gpu(settings)
    check_cluster(settings, use_gpu=use_gpu)
    announce(name, settings, config)
    switch_run(folder, stage.key, known, launch)
    _prepare_folder(folder, stage.key)
    spec = TrainingSpec(
        align=settings,
        model=config.model.path,
        seed=config.run.seed,
        folder=folder,
        prepared=run.prepared,
        key=stage.key,
        use_gpu=use_gpu,
        launch=launch,
        prepared_key=prepared.key,
        prepared_with=prepared.extra.get(MADE_WITH),
    )
    with show_progress(name, folder):
        _fit(spec)
    return _finish(stage, folder)


def _prepare_folder(folder: Path, key: str) -> None:
    """Prints where the run resumes and what it skips, and removes what the last launch left for its workers.

    Raises:
        UserError: a checkpoint cannot be read.
    """
    try:
        for path in set_aside_unusable(folder, key):
            say(f"align: a checkpoint is damaged or of another run; it is skipped and kept as {path}")
        found = checkpoint_folders(folder)
    except OSError as error:
        raise UserError(f"align: {error}. Run align again when the file can be read.") from error
    if found:
        say(f"align: resuming from {found[-1].name}")
    for name in (_ERROR_FILE, PLAN_FILE, STOP_FILE):
        storage.remove(str(folder / name))


def _fit(spec: TrainingSpec) -> None:
    """Runs the workers to the end.

    Raises:
        UserError: an error that a worker found, or that killed it more often than ``align.max_failures``.
        KeyboardInterrupt: Ctrl-C, or SIGTERM after which the ranks have saved.
    """
    align = spec.align
    if align.min_workers < align.max_workers:
        # After a loss Ray tries the old size for this long: no longer than it takes to learn of lost nodes.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"spec": spec},
        torch_config=GracefulTorchConfig(backend="nccl" if spec.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            # ray.train's own form of [min, max]; its types do not name it.
            num_workers=align.num_workers,  # type: ignore[arg-type]
            use_gpu=spec.use_gpu,
            resources_per_worker=rank_resources(align, use_gpu=spec.use_gpu),
            elastic_resize_monitor_interval_s=align.resize_check_seconds,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            name=spec.launch,
            storage_path=str(spec.folder / "ray"),
            failure_config=FailureConfig(max_failures=align.max_failures),
            # ray.train's own RunConfig; its types name the older one of ray.air.
            worker_runtime_env={"env_vars": _worker_environment(spec)},  # type: ignore[call-arg]
        ),
    )
    try:
        with _interruptible(spec):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        _raise_user_error(spec)
        if is_stop_requested(spec.folder, spec.launch):
            raise KeyboardInterrupt from None
        failures = getattr(error, "worker_failures", {}).values()
        causes = sorted({str(cause).strip().split("\n", 1)[0] for cause in failures})
        raise UserError(
            f"align: the workers failed more than align.max_failures={align.max_failures} times: "
            f"{'; '.join(causes) or str(error).strip()}. Checkpoints are in {spec.folder / 'checkpoints'}; "
            "running align again resumes from the last one."
        ) from error
    finally:
        storage.remove(str(spec.folder / "ray"))
    _raise_user_error(spec)
    if is_stop_requested(spec.folder, spec.launch) and find_output(spec.folder) is None:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _interruptible(spec: TrainingSpec) -> Iterator[None]:
    """Makes Ctrl-C a ``KeyboardInterrupt`` as usual, and lets the ranks save and end on SIGTERM.

    Ray Train's handler of Ctrl-C exits with status 0, and stays installed; SIGTERM ends a driver and its
    ranks at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(*_: object) -> None:
        console.print("align: told to stop; the ranks save after the current step")
        request_stop(spec.folder, spec.launch)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _worker(settings: dict[str, Any]) -> None:
    """The training function of every rank."""
    import torch

    spec: TrainingSpec = settings["spec"]
    if _user_error(spec) or is_stop_requested(spec.folder, spec.launch):
        return
    torch.set_num_threads(spec.align.threads_per_worker)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with training():
            TrainingLoop(spec).run()
    except InterruptedTrainingError:
        # Ray restarts the group after any error, and nothing is to be started when the driver ends.
        if not is_stop_requested(spec.folder, spec.launch):
            raise
    except UserError as error:
        # Another attempt would fail in the same way: note it, so that the restarted group ends at once.
        content = json.dumps({"attempt": spec.launch, "message": str(error)})
        storage.write_bytes(str(spec.folder / _ERROR_FILE), content.encode())
        raise


def _user_error(spec: TrainingSpec) -> str | None:
    """The message of the user error that a worker of this launch met, if any."""
    found = _read_json(spec.folder / _ERROR_FILE)
    return found["message"] if found is not None and found["attempt"] == spec.launch else None


def _raise_user_error(spec: TrainingSpec) -> None:
    if message := _user_error(spec):
        raise UserError(message)


def _worker_environment(spec: TrainingSpec) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(spec.align.threads_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        **tracker_environment(),
        **({} if spec.use_gpu else {"DS_ACCELERATOR": "cpu"}),
    }


def _finish(stage: StageRunner, folder: Path) -> Manifest:
    plan, metrics, output = _read_json(folder / PLAN_FILE), read_metrics(folder), find_output(folder)
    if plan is None or not metrics or output is None:
        raise UserError(
            f"align: the workers ended without trained weights in {folder}. All nodes must share this folder "
            "(NFS, Lustre, FSx)."
        )
    validated = [row for row in metrics if row.get("validation_loss") is not None]
    best = min(validated, key=lambda row: row["validation_loss"], default=None)
    rows_in, dropped = plan.pop("rows_in"), plan.pop("dropped")
    manifest = stage.finish(
        rows_in=rows_in,
        rows_out=plan["pairs"] + plan["validation_pairs"],
        dropped=dropped,
        extra={
            **plan,
            **{name: metrics[-1][name] for name in ("loss", "reward_margin", "reward_accuracy", "nll")},
            "training_seconds": round(sum(row["seconds"] for row in metrics), 2),
            "best_step": best["step"] if best else None,
            "best_validation_loss": best["validation_loss"] if best else None,
            "trained": os.fspath(output),
        },
    )
    # Last: until there is a manifest, a run resumes from them.
    remove_checkpoints(folder)
    return manifest


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
