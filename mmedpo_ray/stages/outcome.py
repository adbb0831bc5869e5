"""What a stage has written, for the terminal: counts, drop reasons, the folder, and the next command."""

from __future__ import annotations

from rich.markup import escape

from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.io import storage
from mmedpo_ray.stages.registry import Stage, command_line, next_stage
from mmedpo_ray.tables.manifest import Manifest, counts_in_words, image_example, read_manifest
from mmedpo_ray.tables.run_folder import RunFolder


def print_outcome(stage: Stage, config: Config) -> None:
    """Prints what a stage has written, what was dropped and why, where it is, and the next command."""
    run = RunFolder(config.run.folder)
    if stage.name == "report":
        console.print(f"{escape(run.report)}: open it in a browser", soft_wrap=True)
    elif stage.folder is not None and (manifest := read_manifest(stage.folder(run))) is not None:
        console.print(escape(outcome(stage, stage.folder(run), manifest)), soft_wrap=True)
    if (following := next_stage(stage.name)) is not None:
        console.print(f"next: [bold]{escape(command_line(following.name, config))}[/bold]", soft_wrap=True)


def outcome(stage: Stage, folder: str, manifest: Manifest) -> str:
    """One line about a finished table."""
    count = f"{manifest.rows_out:,} " if manifest.rows_in else ""
    written = f"{count}{stage.rows} in {folder}"
    total = sum(manifest.dropped.values())
    if not total:
        return written
    dropped = storage.join(folder, "dropped")
    return (
        f"{written}; {total:,} dropped ({counts_in_words(manifest.dropped)}), see "
        f"{dropped}{image_example(dropped)}"
    )
