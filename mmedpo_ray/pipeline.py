"""Runs the pipeline, or one stage of it, in a run folder that this process holds alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape

from mmedpo_ray.compat import cluster
from mmedpo_ray.config.load import dump, resolve_run_folder
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.stages import preflight
from mmedpo_ray.stages.registry import Stage, pipeline_stages
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.saved_settings import changes_since, read_manifests


def run_stage(stage: Stage, config: Config) -> None:
    """Runs one stage on a cluster that is joined or started for it."""
    with _prepared(stage.name, config) as resolved:
        stage.run(resolved)


def run_all(config: Config) -> None:
    """Runs every stage of the pipeline; finished ones are skipped, an interrupted one resumes.

    Prints the table of scores, the path of the report and the next command at the end.
    """
    started = time.monotonic()
    with _prepared("run", config) as resolved:
        stages = pipeline_stages(resolved)
        for number, stage in enumerate(stages, start=1):
            console.print(f"[bold cyan]\\[{number}/{len(stages)}][/bold cyan] {stage.name}")
            stage.run(resolved)
        _print_end(resolved, time.monotonic() - started)


@contextlib.contextmanager
def _prepared(command: str, config: Config) -> Iterator[Config]:
    """Checks inputs, locks the run folder and connects to Ray; saves the settings after success.

    The first command saves its settings before it starts, so that the folder's name is enough to resume it.
    Once a table is finished there, only the settings of commands that succeed replace them.
    """
    config = resolve_run_folder(config)
    preflight.check(command, config)
    folder = storage.local_folder(config.run.folder, "run.folder")
    run = RunFolder(config.run.folder)
    with _exclusive(folder):
        preflight.announce(command, config)
        manifests = read_manifests(run)
        if not manifests:
            _save(config, run)
        elif changed := changes_since(config, manifests):
            console.print(
                f"[yellow]settings differ from those that finished tables here were made with: "
                f"{escape(changed)}[/yellow]",
                soft_wrap=True,
            )
        cluster.start(config.ray)
        yield config
        _save(config, run)


def _save(config: Config, run: RunFolder) -> None:
    storage.write_bytes(run.config, dump(config).encode())


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Locks the run folder for this process, so that two commands never write the same tables.

    Raises:
        UserError: another process holds it.
    """
    path = folder / ".lock"
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise UserError(
                f"another process ({handle.read().strip() or 'unknown'}) is working in {folder}. Wait for "
                "it, end it, or give this run its own folder with run.folder=DIR."
            ) from None
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {os.uname().nodename}")
        handle.flush()
        yield


def _print_end(config: Config, seconds: float) -> None:
    run = RunFolder(config.run.folder)
    summary = json.loads(storage.read_bytes(storage.join(run.evaluate, "summary.json")))
    from mmedpo_ray.evaluate.stage import summary_table

    console.print(summary_table(summary))
    console.print(f"finished in {seconds / 60:.1f} min")
    console.print(f"report   {escape(run.report)}", soft_wrap=True)
    models = sorted(path.name for path in run.model("aligned").iterdir() if path.is_dir())
    console.print(f"models   {escape(str(run.model('aligned')))}/{{{','.join(models)}}}", soft_wrap=True)
    console.print(f"serve it [bold]mmedpo serve run.folder={escape(str(run.root))}[/bold]", soft_wrap=True)
