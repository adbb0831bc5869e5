"""Before and after a verb: whether its inputs are there, and what it made, where, and what comes next."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.markup import escape

from mmedpo_ray import storage
from mmedpo_ray.config import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.manifest import Manifest, counts_in_words, image_example, read_manifest
from mmedpo_ray.run_folder import RunFolder

# Verb → the verb that writes what it reads.
_WRITER = {
    "curate": "ingest",
    "score": "curate",
    "align": "score",
    "export": "align",
    "evaluate": "ingest",
}
_NEXT = {
    "ingest": "curate",
    "curate": "score",
    "score": "audit",
    "audit": "align",
    "align": "export",
    "export": "evaluate",
    "evaluate": "report",
    "report": "serve",
}
_MADE = {
    "ingest": "samples",
    "curate": "preference pairs",
    "score": "scored pairs",
    "align": "trained weights",
    "export": "models",
    "evaluate": "answers",
}
_DROPPED = "dropped"


def check_inputs(verb: str, config: Config) -> None:
    """Looks for what a verb reads; reads a few small files, starts and writes nothing.

    Raises:
        UserError: a station that it builds on has not run, the data set is not there, or the model cannot be had.
    """
    run = RunFolder(config.run.folder)
    if Path(run.root).is_file():
        raise UserError(f"run.folder: {run.root} is a file. Set it to a folder that you may write to.")
    if verb in ("run", "ingest"):
        _check_root(config)
    if (writer := _WRITER.get(verb)) and read_manifest(_folder(writer, run)) is None:
        raise UserError(
            f"{verb} needs {_folder(writer, run)}, which is missing or unfinished. Run the station that writes it first: "
            f"`{command(writer, config)}` (`mmedpo run` runs all in order), or correct run.folder."
        )
    if _needs_model(verb, config):
        from mmedpo_ray.models.loading import check_available

        check_available(config.model.path)


def print_outcome(verb: str, config: Config) -> None:
    """Prints what a verb has made, what was left out and why, where it lies, and the next command."""
    run = RunFolder(config.run.folder)
    if verb == "report":
        console.print(f"{escape(run.report)}: open it in a browser", soft_wrap=True)
    elif verb in _MADE and (manifest := read_manifest(_folder(verb, run))) is not None:
        console.print(escape(outcome(verb, _folder(verb, run), manifest)), soft_wrap=True)
    console.print(f"next: [bold]{escape(command(_NEXT[verb], config))}[/bold]", soft_wrap=True)


def outcome(verb: str, folder: str, manifest: Manifest) -> str:
    """What a verb has made, in a line."""
    count = f"{manifest.rows_out:,} " if manifest.rows_in else ""
    made = f"{count}{_MADE[verb]} in {folder}"
    total = sum(manifest.dropped.values())
    if not total:
        return made
    return (
        f"{made}; {total:,} dropped ({counts_in_words(manifest.dropped)}), see {storage.join(folder, _DROPPED)}"
        f"{image_example(storage.join(folder, _DROPPED))}"
    )


def command(verb: str, config: Config) -> str:
    """How a verb is called for this run; its settings are in the run folder by then."""
    return f"mmedpo {verb} run.folder={shlex.quote(config.run.folder)}"


def _folder(verb: str, run: RunFolder) -> str:
    return {
        "ingest": run.samples,
        "curate": run.pairs,
        "score": run.scored,
        "align": str(run.align()),
        "export": str(run.model()),
        "evaluate": run.evaluate,
    }[verb]


def _check_root(config: Config) -> None:
    root = config.data.root
    if config.data.format == "phantom" or root is None or "://" in root:
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
        return config.curate.text.method == "on_policy"
    return verb in ("run", "align", "export", "serve")
