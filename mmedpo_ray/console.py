"""What a person at the terminal sees: one console, quiet libraries, progress on long work."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
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
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
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


def line_times(first: float = 30.0, growth: float = 1.5, longest: float = 300.0) -> Iterator[float]:
    """Seconds from one line to the next in a log: soon at first, seldom in a long run."""
    while True:
        yield first
        first = min(first * growth, longest)


def duration(seconds: float) -> str:
    """``h:mm:ss``, as progress bars show it."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class _Progress(Progress):
    """Progress bars, some with a line of figures below; plain lines without a terminal."""

    def __init__(self, *columns: ProgressColumn, says_lines: bool, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._says_lines = says_lines
        self._stopped = threading.Event()
        self._first: dict[TaskID, float] = {}

    def start(self) -> None:
        super().start()
        if self._says_lines:
            threading.Thread(target=self._say_lines, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        super().stop()

    def add_task(self, *arguments: Any, **options: Any) -> TaskID:
        task = super().add_task(*arguments, **options)
        self._first[task] = self._tasks[task].completed
        return task

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            if below := task.fields.get("below"):
                yield Text(f"  {below}", style="dim", no_wrap=True, overflow="ellipsis")

    def _say_lines(self) -> None:
        for seconds in line_times():
            if self._stopped.wait(seconds):
                return
            for task in self.tasks:
                if not task.finished:
                    console.print(
                        Text(progress_line(task, self._first[task.id]), style="dim"), soft_wrap=True
                    )


def progress_line(task: Task, first: float) -> str:
    """How far a task is, in a line; ``first`` is what was done before it began."""
    done, total, elapsed = task.completed, task.total, task.elapsed or 0.0
    rate = (done - first) / elapsed if elapsed else 0.0
    unit = task.fields.get("unit", "rows")
    share = f" ({done / total:.0%})" if total else ""
    count = f"{done:,.0f} of {total:,.0f}" if total else f"{done:,.0f}"
    line = f"{task.description}: {count} {unit}{share} after {duration(elapsed)}"
    if rate > 0:
        line += f", {rate:,.1f} {unit}/s" if rate >= 0.1 else f", {3600 * rate:,.1f} {unit}/h"
        if total:
            line += f", {duration((total - done) / rate)} left"
    return line


def progress_bar(*, says_lines: bool = True) -> Progress:
    """A progress bar with count, elapsed and remaining time; a line now and then without a terminal.

    Every task needs the field ``note``, shown behind the bar, and may have ``below``, shown on a line of its
    own, and ``unit``, what is counted (rows).

    Args:
        says_lines: whether the lines are wanted; not by who writes its own.
    """
    return _Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        says_lines=says_lines and not console.is_terminal,
    )
