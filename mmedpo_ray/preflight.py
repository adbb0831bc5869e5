"""What a command says and checks before anything is started: which model, which data, and whether the models are there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape

from mmedpo_ray.config import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import EMBEDDED_NAME, resolve_model

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
    """Looks whether the models that a command will load are there, which takes no time.

    Raises:
        UserError: a path names nothing, or ``model.path`` no LLaVA.
    """
    if verb in ("run", *_checked_by(config)):
        resolve_model(config.model.path)
    for key, path in _other_models(verb, config):
        place = Path(path).expanduser()
        # What does not look like a path is a name on the hub.
        if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not place.exists():
            raise UserError(f"{key}: there is no {path}. Correct the path, or put the model there.")


def _checked_by(config: Config) -> Iterator[str]:
    """The verbs that load the model to align."""
    yield from ("align", "export")
    if config.curate.text.method == "on_policy" or config.curate.visual.tool == "self_attention":
        yield "curate"
    if config.evaluate.endpoint is None:
        yield "evaluate"


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
            if agent.kind == "vllm" and agent.model != EMBEDDED_NAME:
                yield f"score.agents.{number}.model", agent.model
