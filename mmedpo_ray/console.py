"""What a person at the terminal sees: one console, quiet libraries, progress on long work."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True, highlight=False)

# Set before Ray, vLLM or transformers are imported: no usage statistics, no progress bars of their own.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def configure(*, verbose: bool = False) -> None:
    """Sets up logging for a command: our own lines always, other libraries' from warnings up."""
    for key, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    handler = RichHandler(console=console, show_path=verbose, markup=False, log_time_format="%H:%M:%S")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[handler],
        force=True,
    )
    logging.getLogger("mmedpo_ray").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        # DeepSpeed sets its own level when imported; a filter outlives that.
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


class _Progress(Progress):
    """Bars with a line of figures under those that have one (the field ``below``)."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if below := task.fields.get("below"):
                yield Text(f"  {below}", style="dim", no_wrap=True, overflow="ellipsis")


def progress_bar() -> Progress:
    """A progress bar with count, elapsed and remaining time; nothing is drawn where there is no terminal.

    Every task needs the field ``note``, shown behind the bar, and may have ``below``, shown on a line of its own.
    """
    return _Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
