"""The whole road in order, and each of its steps alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape

from mmedpo_ray.compat import cluster
from mmedpo_ray.config.load import dump, resolve_run_folder
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.stages import preflight
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.saved_settings import changes_since, read_manifests

log = logging.getLogger(__name__)

Step = Callable[[Config], Any]


def _ingest(config: Config) -> None:
    from mmedpo_ray.ingest.stage import ingest

    ingest(config)


def _curate(config: Config) -> None:
    from mmedpo_ray.curate.stage import curate

    curate(config)


def _score(config: Config) -> None:
    from mmedpo_ray.judge.stage import score

    score(config)


def _audit(config: Config) -> None:
    if config.audit.enabled:
        from mmedpo_ray.audit.stage import audit

        audit(config)


def _align(config: Config) -> None:
    from mmedpo_ray.align.stage import align

    align(config, "aligned")
    if config.control.enabled:
        align(config, "control")


def _export(config: Config) -> None:
    from mmedpo_ray.export.stage import export

    export(config, "aligned")
    if config.control.enabled:
        export(config, "control")


def _evaluate(config: Config) -> None:
    from mmedpo_ray.evaluate.stage import evaluate

    evaluate(config)


def _report(config: Config) -> None:
    from mmedpo_ray.report.stage import report

    report(config)


# Stage → what it does, in the order of the road. Imports are inside, so that `mmedpo --help` loads no library.
STEPS: dict[str, Step] = {
    "ingest": _ingest,
    "curate": _curate,
    "score": _score,
    "audit": _audit,
    "align": _align,
    "export": _export,
    "evaluate": _evaluate,
    "report": _report,
}


def run_step(name: str, config: Config) -> None:
    """Runs one stage of the road on a cluster joined or started for it."""
    with _prepared(name, config) as resolved:
        STEPS[name](resolved)


def run_all(config: Config) -> None:
    """Runs every stage; finished ones are skipped, an interrupted one resumes.

    At the end the summary table, the path of the report and the next step are printed.
    """
    started = time.monotonic()
    with _prepared("run", config) as resolved:
        for number, (name, step) in enumerate(STEPS.items(), start=1):
            console.print(f"[bold cyan]\\[{number}/{len(STEPS)}][/bold cyan] {name}")
            step(resolved)
        _print_end(resolved, time.monotonic() - started)


@contextlib.contextmanager
def _prepared(verb: str, config: Config) -> Iterator[Config]:
    """Checks what can be checked at once, locks the run folder, connects to Ray, and saves the settings of what succeeds.

    The settings are in the folder from the first command on, so that its name is enough to go on; once something has finished
    there they are replaced by those of commands that succeed alone.
    """
    config = resolve_run_folder(config)
    preflight.check(verb, config)
    folder = storage.local_folder(config.run.folder, "run.folder")
    run = RunFolder(config.run.folder)
    with _exclusive(folder):
        preflight.announce(verb, config)
        manifests = read_manifests(run)
        if not manifests:
            _save(config, run)
        elif changed := changes_since(config, manifests):
            console.print(
                f"[yellow]settings differ from those that finished tables here were made with: {escape(changed)}[/yellow]",
                soft_wrap=True,
            )
        cluster.start(config.ray)
        yield config
        _save(config, run)


def _save(config: Config, run: RunFolder) -> None:
    storage.write_bytes(run.config, dump(config).encode())


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Holds the run folder for this process, so that two runs never write into each other's tables.

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
                f"another process ({handle.read().strip() or 'unknown'}) is working in {folder}. Wait for it, end it, or "
                "give this run its own folder with run.folder=DIR."
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
