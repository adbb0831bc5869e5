"""The align stage: scored pairs → trained weights, under Ray Train and DeepSpeed.

    align(config, "aligned")    # weighted DPO
    align(config, "control")    # as many updates of supervised fine-tuning on the same images

The driver starts the workers, shows progress and writes the manifest; the training itself is
:class:`~mmedpo_ray.align.loop.TrainingLoop`. A worker that dies is replaced and goes on from the last checkpoint, and so does
a stage whose driver died.
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
from rich.markup import escape

from mmedpo_ray.align.checkpoint.checkpoint import (
    checkpoint_folders,
    remove_checkpoints,
    set_aside_passed_over,
)
from mmedpo_ray.align.checkpoint.output_weights import find_trained
from mmedpo_ray.align.checkpoint.previous_runs import (
    has_earlier,
    read_identity,
    remove_earlier,
    set_aside,
    take_up,
    write_identity,
)
from mmedpo_ray.align.checkpoint.run_lock import STOP_FILE, ask_to_stop, claim, is_told_to_stop
from mmedpo_ray.align.data.prepare_stage import (
    made_with,
    needs_stored_reference,
    preparation_settings,
    prepare,
)
from mmedpo_ray.align.graceful_shutdown import StoppableTorchConfig, training
from mmedpo_ray.align.metrics import read_metrics
from mmedpo_ray.align.plan.estimates import announce
from mmedpo_ray.align.plan.resources import check_cluster, rank_resources, wants_gpu
from mmedpo_ray.align.policy import TrainingSpec, check_model
from mmedpo_ray.align.progress import PLAN_FILE, watch
from mmedpo_ray.align.settings import AlignConfig, LoraConfig
from mmedpo_ray.align.trackers import check_trackers, tracker_environment
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.models.loading import resolve_model
from mmedpo_ray.tables.provenance import MADE_WITH, Parts, by_name, changes
from mmedpo_ray.tables.run_folder import Role, RunFolder
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner

log = logging.getLogger(__name__)

_ERROR_FILE = "error.json"
# Settings that change how a run is carried out and not what comes out of it.
_OPERATIONAL = {
    "num_workers",
    "resize_check_seconds",
    "cpus_per_worker",
    "threads_per_worker",
    "use_gpu",
    "checkpoint_every",
    "keep_checkpoints",
    "max_failures",
    "trackers",
    "strategy",
    "pairs_per_forward",
    "tokens_per_forward",
    "gradient_checkpointing",
    "attention",
}


def align(config: Config, role: Role = "aligned") -> Manifest:
    """Trains a model.

    Args:
        config: all settings.
        role: ``aligned``, or ``control``: the same images in the same order and as many updates, with the likelihood of
            the chosen answers as objective and ``control.learning_rate``.

    Returns:
        The manifest; what was trained is in ``RunFolder.align(role)`` (:mod:`mmedpo_ray.align.checkpoint.output_weights`).

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
    settings = _role_settings(config, role)
    identity = [settings.model_dump(exclude=_OPERATIONAL), preparation_settings(config), config.run.seed]
    stage = StageRunner(_stage_name(role), str(folder), config, settings=identity, inputs=[run.prepared])
    if has_earlier(folder, stage.key):
        _take_up(folder, stage.key)
    if (done := stage.finished()) is not None:
        # A driver may have died between the manifest and this.
        remove_checkpoints(folder)
        return done
    spec = _training_spec(config, settings, folder, stage.key, prepared)
    check_model(config.model.path, settings)
    check_cluster(settings, use_gpu=spec.use_gpu)
    announce(stage.name, settings, config)
    claim(folder, spec.attempt)
    _prepare_folder(folder, stage.key, _made_with(settings, config))
    with watch(stage.name, folder):
        _fit(spec)
    return _finish(stage, folder)


def _role_settings(config: Config, role: Role) -> AlignConfig:
    if role == "aligned":
        return config.align
    rate = config.control.learning_rate or config.align.learning_rate
    return config.align.model_copy(update={"objective": "sft", "learning_rate": rate})


def _stage_name(role: Role) -> str:
    return "align" if role == "aligned" else "align control"


def _training_spec(
    config: Config, settings: AlignConfig, folder: Path, key: str, prepared: Manifest
) -> TrainingSpec:
    return TrainingSpec(
        align=settings,
        model=config.model.path,
        seed=config.run.seed,
        folder=folder,
        prepared=RunFolder(config.run.folder).prepared,
        stored_reference=needs_stored_reference(config.align),
        key=key,
        use_gpu=wants_gpu(settings),
        attempt=uuid.uuid4().hex[:12],
        prepared_key=prepared.key,
        prepared_with=prepared.extra.get(MADE_WITH),
    )


def _made_with(settings: AlignConfig, config: Config) -> dict[str, Any]:
    """All that the key is a hash of, by the names that a message gives it."""
    chosen = by_name("align", settings.model_dump(mode="json", exclude=_OPERATIONAL))
    return {**made_with(config), **chosen, "run.seed": config.run.seed}


def _take_up(folder: Path, key: str) -> None:
    """Goes back to an earlier training of the folder, finished or not."""
    # Ranks of a driver that was killed may still write into the folder.
    claim(folder, uuid.uuid4().hex[:12])
    aside = take_up(folder, key)
    kept = f"; what the last ones trained is kept in {aside}" if aside else ""
    _say(f"align: taking up again what was trained with these settings before{kept}")


def _prepare_folder(folder: Path, key: str, settings: Parts) -> None:
    """Makes room for this run: what an interrupted attempt of it left stays, what other settings left is set aside.

    Args:
        folder: of the run.
        key: its identity.
        settings: what the key stands for, by name.

    Raises:
        UserError: a checkpoint cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before, settings_before = read_identity(folder)
    if before == key:
        _find_checkpoints(folder, key)
    else:
        aside = set_aside(folder)
        if before is not None or aside is not None:
            kept = f"what was trained before is kept in {aside}" if aside else "nothing had been trained"
            _say(f"align: beginning anew; {kept}. Changed: {changes(settings_before, settings)}")
        for removed in remove_earlier(folder, aside) if aside else ():
            _say(f"align: removed {removed}, of settings before those")
    write_identity(folder, key, settings)
    for name in (_ERROR_FILE, PLAN_FILE, STOP_FILE):
        storage.remove(str(folder / name))


def _find_checkpoints(folder: Path, key: str) -> None:
    """Says where the run resumes, and what it passes over."""
    try:
        for aside in set_aside_passed_over(folder, key):
            _say(f"align: a checkpoint is damaged or of another run; it is passed over and kept as {aside}")
        found = checkpoint_folders(folder)
    except OSError as error:
        raise UserError(f"align: {error}. Run align again when the file can be read.") from error
    if found:
        _say(f"align: resuming from {found[-1].name}")


def _say(line: str) -> None:
    console.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True)


def _fit(spec: TrainingSpec) -> None:
    """Runs the workers to the end.

    Raises:
        UserError: what a worker found wrong, or what killed it more often than ``align.max_failures``.
        KeyboardInterrupt: Ctrl-C, or SIGTERM after which the ranks have saved.
    """
    align = spec.align
    if align.min_workers < align.max_workers:
        # After a loss Ray tries the old size until this runs out: no longer than it takes to learn of lost nodes.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"spec": spec},
        torch_config=StoppableTorchConfig(backend="nccl" if spec.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            # ray.train's own form of [min, max]; its types do not name it.
            num_workers=align.num_workers,  # type: ignore[arg-type]
            use_gpu=spec.use_gpu,
            resources_per_worker=rank_resources(align, use_gpu=spec.use_gpu),
            elastic_resize_monitor_interval_s=align.resize_check_seconds,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            name=spec.attempt,
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
        if is_told_to_stop(spec.folder, spec.attempt):
            raise KeyboardInterrupt from None
        causes = {
            str(cause).strip().split("\n", 1)[0] for cause in getattr(error, "worker_failures", {}).values()
        }
        raise UserError(
            f"align: the workers failed more than align.max_failures={align.max_failures} times: "
            f"{'; '.join(sorted(causes)) or str(error).strip()}. Checkpoints are in {spec.folder / 'checkpoints'}; running align "
            "again resumes from the last one."
        ) from error
    finally:
        storage.remove(str(spec.folder / "ray"))
    _raise_user_error(spec)
    if is_told_to_stop(spec.folder, spec.attempt) and find_trained(spec.folder) is None:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _interruptible(spec: TrainingSpec) -> Iterator[None]:
    """Ctrl-C is a ``KeyboardInterrupt`` here as everywhere, and SIGTERM lets the ranks save and end.

    Ray Train's handler of Ctrl-C exits with status 0, and stays for good; SIGTERM ends a driver, and with it the ranks, at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(*_: object) -> None:
        console.print("align: told to stop; the ranks save after the step under way")
        ask_to_stop(spec.folder, spec.attempt)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _worker(settings: dict[str, Any]) -> None:
    """What every rank runs."""
    import torch

    spec: TrainingSpec = settings["spec"]
    if _is_refused(spec) or is_told_to_stop(spec.folder, spec.attempt):
        return
    torch.set_num_threads(spec.align.threads_per_worker)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from mmedpo_ray.align.loop import InterruptedTrainingError, TrainingLoop

    try:
        with training():
            TrainingLoop(spec).run()
    except InterruptedTrainingError:
        # Ray starts the group again after any error, and nothing is to be started when the driver ends.
        if not is_told_to_stop(spec.folder, spec.attempt):
            raise
    except UserError as error:
        # Another attempt would meet the same: note it, so that the restarted group ends at once.
        storage.write_bytes(
            str(spec.folder / _ERROR_FILE),
            json.dumps({"attempt": spec.attempt, "message": str(error)}).encode(),
        )
        raise


def _is_refused(spec: TrainingSpec) -> bool:
    found = _read_json(spec.folder / _ERROR_FILE)
    return found is not None and found["attempt"] == spec.attempt


def _raise_user_error(spec: TrainingSpec) -> None:
    if _is_refused(spec):
        raise UserError(_read_json(spec.folder / _ERROR_FILE)["message"])


def _worker_environment(spec: TrainingSpec) -> dict[str, str]:
    threads = str(spec.align.threads_per_worker)
    return {
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        **tracker_environment(),
        **({} if spec.use_gpu else {"DS_ACCELERATOR": "cpu"}),
    }


def _finish(stage: StageRunner, folder: Path) -> Manifest:
    plan = _read_json(folder / PLAN_FILE)
    metrics = read_metrics(folder)
    trained = find_trained(folder)
    if plan is None or not metrics or trained is None:
        raise UserError(
            f"align: the workers ended without trained weights in {folder}. All nodes must share this folder (NFS, Lustre, FSx)."
        )
    last = metrics[-1]
    validated = [row for row in metrics if row.get("validation_loss") is not None]
    best = min(validated, key=lambda row: row["validation_loss"], default=None)
    figures = {key: value for key, value in plan.items() if key not in ("rows_in", "dropped")}
    manifest = stage.finish(
        rows_in=plan["rows_in"],
        rows_out=plan["pairs"] + plan["validation_pairs"],
        dropped=plan["dropped"],
        extra={
            **figures,
            "loss": last["loss"],
            "reward_margin": last["reward_margin"],
            "reward_accuracy": last["reward_accuracy"],
            "nll": last["nll"],
            "training_seconds": round(sum(row["seconds"] for row in metrics), 2),
            "best_step": best["step"] if best else None,
            "best_validation_loss": best["validation_loss"] if best else None,
            "trained": os.fspath(trained),
        },
    )
    # Last: without a manifest they are what a run goes on from.
    remove_checkpoints(folder)
    return manifest


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
