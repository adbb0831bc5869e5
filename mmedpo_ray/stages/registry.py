"""The verbs in their order: which one writes what another reads, and what one has made, where, and what comes next."""

from __future__ import annotations

import shlex

from rich.markup import escape

from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.io import storage
from mmedpo_ray.tables.manifest import Manifest, counts_in_words, image_example, read_manifest
from mmedpo_ray.tables.run_folder import RunFolder

# Verb → the verb that writes what it reads.
WRITER = {
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


def print_outcome(verb: str, config: Config) -> None:
    """Prints what a verb has made, what was left out and why, where it lies, and the next command."""
    run = RunFolder(config.run.folder)
    if verb == "report":
        console.print(f"{escape(run.report)}: open it in a browser", soft_wrap=True)
    elif verb in _MADE and (manifest := read_manifest(folder_of(verb, run))) is not None:
        console.print(escape(outcome(verb, folder_of(verb, run), manifest)), soft_wrap=True)
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


def folder_of(verb: str, run: RunFolder) -> str:
    """Where a verb writes."""
    return {
        "ingest": run.samples,
        "curate": run.pairs,
        "score": run.scored,
        "align": str(run.align()),
        "export": str(run.model()),
        "evaluate": run.evaluate,
    }[verb]
