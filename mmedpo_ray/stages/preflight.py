"""What a command prints and checks before it starts anything: model, data, inputs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape

from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.models.loading import EMBEDDED_NAME, check_available
from mmedpo_ray.stages.registry import Stage, command_line, stages
from mmedpo_ray.tables.manifest import read_manifest
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.saved_settings import manifests_to_report

log = logging.getLogger(__name__)


def announce(command: str, config: Config) -> None:
    """Prints model, data and run folder of a command; warns if the embedded model gets other data."""
    data, is_embedded = config.data, config.model.path == EMBEDDED_NAME
    model = "the embedded tiny LLaVA" if is_embedded else config.model.path
    source = (
        "phantom (the embedded synthetic world)" if data.format == "phantom" else f"{data.format} {data.root}"
    )
    console.print(
        f"[bold]mmedpo {command}[/bold]  model: {escape(model)}  data: {escape(source)}  run: "
        f"{escape(config.run.folder)}",
        soft_wrap=True,
    )
    if is_embedded and data.format != "phantom" and _needs_model(command, config):
        log.warning(
            "model.path is 'phantom': the embedded tiny LLaVA knows only its synthetic world, so on these "
            "data its answers and scores mean nothing. Set model.path to your model."
        )


def check(command: str, config: Config) -> None:
    """Checks that a command's input and models exist; reads a few small files, writes nothing.

    Raises:
        UserError: a stage that it needs has not run, or the data set or a model is missing.
    """
    run = RunFolder(config.run.folder)
    if Path(run.root).is_file():
        raise UserError(f"run.folder: {run.root} is a file. Set it to a folder that you may write to.")
    if command in ("run", "ingest"):
        _check_root(config)
    if command in stages():
        _check_input(stages()[command], config)
    if command == "report":
        manifests_to_report(run)
    if _needs_model(command, config):
        check_available(config.model.path)
    for key, path in _other_models(command, config):
        # A value that does not look like a path is a name on the hub.
        if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).expanduser().exists():
            raise UserError(f"{key}: there is no {path}. Correct the path, or put the model there.")


def _check_input(stage: Stage, config: Config) -> None:
    if stage.needs is None:
        return
    needed = stages()[stage.needs]
    assert needed.folder is not None, f"stage {needed.name} has no table"
    folder = needed.folder(RunFolder(config.run.folder))
    if read_manifest(folder) is None:
        raise UserError(
            f"{stage.name} needs {folder}, which is missing or unfinished. Run the stage that writes it "
            f"first: `{command_line(needed.name, config)}` (`mmedpo run` runs all in order), or correct "
            "run.folder."
        )


def _check_root(config: Config) -> None:
    root = config.data.root
    if root is None or "://" in root:
        return
    path = Path(storage.absolute(root))
    if not path.exists():
        raise UserError(f"data.root: there is no folder {path}. Correct data.root.")
    if not path.is_dir():
        raise UserError(
            f"data.root: {path} is a file, not a folder. Set data.root to its folder, and data.train_file to "
            "its name if the format does not find it there."
        )


def _needs_model(command: str, config: Config) -> bool:
    return command == "run" or (command in stages() and stages()[command].needs_model(config))


def _other_models(command: str, config: Config) -> Iterator[tuple[str, str]]:
    """Key and path of the models of visual tools and judges."""
    visual = config.curate.visual
    if command in ("run", "curate"):
        if visual.tool == "medklip" and visual.medklip.checkpoint:
            yield "curate.visual.medklip.checkpoint", visual.medklip.checkpoint
        if visual.tool == "text_prompted" and visual.text_prompted.model:
            yield "curate.visual.text_prompted.model", visual.text_prompted.model
    if command in ("run", "score"):
        for number, agent in enumerate(config.score.agents):
            model = getattr(agent, "model", EMBEDDED_NAME)
            if model != EMBEDDED_NAME:
                yield f"score.agents.{number}.model", model
