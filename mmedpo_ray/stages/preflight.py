"""What a command says and checks before anything is started: which model, which data, and whether the models are there."""

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
from mmedpo_ray.stages import registry
from mmedpo_ray.tables.manifest import read_manifest
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.saved_settings import manifests_to_report

log = logging.getLogger(__name__)

_RUNS_MODEL = ("run", "curate", "align", "export", "evaluate", "serve")


def announce(verb: str, config: Config) -> None:
    """Prints the model, the data and the run folder of a command, and that the embedded model is out of its depth."""
    data, is_embedded = config.data, config.model.path == EMBEDDED_NAME
    model = "the embedded tiny LLaVA" if is_embedded else config.model.path
    source = (
        "phantom (the embedded synthetic world)" if data.format == "phantom" else f"{data.format} {data.root}"
    )
    console.print(
        f"[bold]mmedpo {verb}[/bold]  model: {escape(model)}  data: {escape(source)}  run: {escape(config.run.folder)}",
        soft_wrap=True,
    )
    if is_embedded and data.format != "phantom" and verb in _RUNS_MODEL:
        log.warning(
            "model.path is 'phantom': the embedded tiny LLaVA knows nothing but its synthetic world, so on these data its "
            "answers and scores mean nothing. Set model.path to your model."
        )


def check(verb: str, config: Config) -> None:
    """Looks for what a verb reads and for the models that it will load; reads a few small files, starts and writes nothing.

    Raises:
        UserError: a stage that it builds on has not run, the data set is not there, or a model cannot be had.
    """
    run = RunFolder(config.run.folder)
    if Path(run.root).is_file():
        raise UserError(f"run.folder: {run.root} is a file. Set it to a folder that you may write to.")
    if verb in ("run", "ingest"):
        _check_root(config)
    if writer := registry.WRITER.get(verb):
        folder = registry.folder_of(writer, run)
        if read_manifest(folder) is None:
            raise UserError(
                f"{verb} needs {folder}, which is missing or unfinished. Run the stage that writes it first: "
                f"`{registry.command(writer, config)}` (`mmedpo run` runs all in order), or correct run.folder."
            )
    if verb == "report":
        manifests_to_report(run)
    if _needs_model(verb, config):
        check_available(config.model.path)
    for key, path in _other_models(verb, config):
        # What does not look like a path is a name on the hub.
        if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).expanduser().exists():
            raise UserError(f"{key}: there is no {path}. Correct the path, or put the model there.")


def _check_root(config: Config) -> None:
    root = config.data.root
    if root is None or "://" in root:
        return
    path = Path(storage.absolute(root))
    if not path.exists():
        raise UserError(f"data.root: there is no folder {path}. Correct data.root.")
    if not path.is_dir():
        raise UserError(
            f"data.root: {path} is a file, not a folder. Set data.root to its folder, and data.train_file to its name if "
            "the format does not find it there."
        )


def _needs_model(verb: str, config: Config) -> bool:
    if verb == "evaluate":
        return config.evaluate.endpoint is None
    if verb == "curate":
        return config.curate.text.method == "on_policy" or config.curate.visual.tool == "self_attention"
    return verb in ("run", "align", "export", "serve")


def _other_models(verb: str, config: Config) -> Iterator[tuple[str, str]]:
    """Key and path of the models of visual tools and judges."""
    visual = config.curate.visual
    if verb in ("run", "curate"):
        if visual.tool == "medklip" and visual.medklip.checkpoint:
            yield "curate.visual.medklip.checkpoint", visual.medklip.checkpoint
        if visual.tool == "text_prompted" and visual.text_prompted.model:
            yield "curate.visual.text_prompted.model", visual.text_prompted.model
    if verb in ("run", "score"):
        for number, agent in enumerate(config.score.agents):
            model = getattr(agent, "model", EMBEDDED_NAME)
            if model != EMBEDDED_NAME:
                yield f"score.agents.{number}.model", model
