"""A training run as a person sees it while it runs: progress bar on a terminal, a line now and then elsewhere.

The workers write the shared folder and the driver reads it, so that nothing in training waits for a terminal.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmedpo_ray.align.metrics import MetricsTail
from mmedpo_ray.console import console, duration, line_times, progress_bar

PLAN_FILE = "plan.json"
_LOOK_EVERY_S = 0.5
_HINT_AFTER_S = 120.0
# Speed and figures are those of the last so many seconds or steps: one step says little.
_SPEED_WINDOW_S = 60.0
_FIGURES_WINDOW = 10


@contextlib.contextmanager
def watch(name: str, folder: Path) -> Iterator[None]:
    """Shows the steps while the workers write them.

    Args:
        name: of the stage.
        folder: of the run.
    """
    stop = threading.Event()
    watcher = threading.Thread(target=_show, args=(name, folder, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join(timeout=5)


def _show(name: str, folder: Path, stop: threading.Event) -> None:
    tail = MetricsTail(folder)
    tail.read()  # what an earlier launch left; the workers write it anew, up to where they resume
    recent = RecentSteps(tail)
    plan: dict[str, Any] | None = None
    pauses = line_times()
    next_line = time.monotonic() + next(pauses)
    hint_at = time.monotonic() + _HINT_AFTER_S
    with progress_bar(says_lines=False) as bar:
        task = bar.add_task(name, total=None, note="starting workers")
        while not stop.wait(_LOOK_EVERY_S):
            plan = plan or _read_plan(folder)
            if plan is None and time.monotonic() >= hint_at:
                hint_at = math.inf
                console.print(
                    f"[dim]{name}: still waiting for workers; `ray status` shows what the cluster has room for[/dim]"
                )
            if plan is None or not recent.look():
                continue
            step, figures = recent.step, figures_line(recent.mean())
            if recent.has_jumped:
                # The bar must not take steps of an earlier launch for the speed of this one.
                bar.reset(task, total=plan["steps"], completed=step, note="")
            bar.update(task, completed=step, below=figures)
            if not console.is_terminal and time.monotonic() >= next_line:
                next_line = time.monotonic() + next(pauses)
                left = recent.seconds_left(plan["steps"])
                end = "" if left is None else f", {duration(left)} left"
                console.print(
                    f"[dim]{name}: step {step:,} of {plan['steps']:,}{end}; {figures}[/dim]", soft_wrap=True
                )


class RecentSteps:
    """The steps of the last minute, for speeds that neither jump nor remember the start.

    Args:
        tail: where new steps come from.
    """

    def __init__(self, tail: MetricsTail) -> None:
        self._tail = tail
        self._rows: deque[dict[str, Any]] = deque(maxlen=_FIGURES_WINDOW)
        self._seen: deque[tuple[float, int]] = deque()

    @property
    def step(self) -> int:
        """The newest step; 0 before the first."""
        return self._rows[-1]["step"] if self._rows else 0

    @property
    def has_jumped(self) -> bool:
        """Whether the last look began anew: the first one, or the workers went back to a checkpoint."""
        return len(self._seen) == 1

    def look(self) -> bool:
        """Takes in what is new; returns whether something is."""
        rows = self._tail.read()
        if not rows:
            return False
        if rows[0]["step"] <= self.step:
            self._rows.clear()
            self._seen.clear()
        self._rows.extend(rows[-_FIGURES_WINDOW:])
        now = time.monotonic()
        self._seen.append((now, rows[-1]["step"]))
        while len(self._seen) > 2 and now - self._seen[0][0] > _SPEED_WINDOW_S:
            self._seen.popleft()
        return True

    def seconds_left(self, total: int) -> float | None:
        """Until the last step, by the clock on the wall: reading data and writing checkpoints count."""
        (then, first), (now, last) = self._seen[0], self._seen[-1]
        return (total - last) * (now - then) / (last - first) if last > first else None

    def mean(self) -> dict[str, float | None]:
        """The figures over the last steps; ``None`` where there was nothing to measure."""
        names = {name for row in self._rows for name in row}
        return {name: _mean([row.get(name) for row in self._rows]) for name in names}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def figures_line(figures: dict[str, float | None]) -> str:
    """The figures of a step in less than 95 columns; those that were not measured are left out."""
    forms = {
        "pairs_per_second": "{:,.1f} pairs/s",
        "tokens_per_second": "{:,.0f} tokens/s",
        "loss": "loss {:.3f}",
        "reward_margin": "margin {:.2f}",
        "reward_accuracy": "accuracy {:.0%}",
        "ess": "ESS {:.0%}",
        "gpu_memory_gib": "GPU {:.1f} GiB",
    }
    return " · ".join(
        form.format(value) for name, form in forms.items() if (value := figures.get(name)) is not None
    )


def _read_plan(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / PLAN_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
