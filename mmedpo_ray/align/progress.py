"""Progress of a training run: a progress bar on a terminal, a line now and then in a log.

The workers write to the shared folder and the driver reads it, so that training never waits for a terminal.
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
# Speed and figures are means over the last so many seconds or steps: a single step varies.
_SPEED_WINDOW_S = 60.0
_FIGURES_WINDOW = 10
_FORMATS = {
    "pairs_per_second": "{:,.1f} pairs/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "loss": "loss {:.3f}",
    "reward_margin": "margin {:.2f}",
    "reward_accuracy": "accuracy {:.0%}",
    "ess": "ESS {:.0%}",
    "gpu_memory_gib": "GPU {:.1f} GiB",
}


@contextlib.contextmanager
def show_progress(name: str, folder: Path) -> Iterator[None]:
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
    tail.read()  # lines of an earlier launch, which the workers rewrite
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
                    f"[dim]{name}: still waiting for workers; `ray status` shows the free resources of the "
                    "cluster[/dim]"
                )
            if plan is None or not recent.look():
                continue
            step, figures = recent.step, figures_line(recent.mean())
            if recent.has_restarted:
                # The bar must not count steps of an earlier launch in the speed of this one.
                bar.reset(task, total=plan["steps"], completed=step, note="")
            bar.update(task, completed=step, below=figures)
            if not console.is_terminal and time.monotonic() >= next_line:
                next_line = time.monotonic() + next(pauses)
                left = recent.seconds_left(plan["steps"])
                end = "" if left is None else f", {duration(left)} left"
                line = f"{name}: step {step:,} of {plan['steps']:,}{end}; {figures}"
                console.print(f"[dim]{line}[/dim]", soft_wrap=True)


class RecentSteps:
    """The steps of the last minute, for a speed that is smooth and does not depend on the start.

    Args:
        tail: yields new steps.
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
    def has_restarted(self) -> bool:
        """Whether the last look was the first, or the workers had gone back to a checkpoint."""
        return len(self._seen) == 1

    def look(self) -> bool:
        """Reads new steps; returns whether there are any."""
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
        """Until the last step, in wall-clock time: reading data and writing checkpoints count."""
        (then, first), (now, last) = self._seen[0], self._seen[-1]
        return (total - last) * (now - then) / (last - first) if last > first else None

    def mean(self) -> dict[str, float | None]:
        """The figures over the last steps; ``None`` if nothing was measured."""
        found: dict[str, float | None] = {}
        for name in {name for row in self._rows for name in row}:
            known = [value for row in self._rows if (value := row.get(name)) is not None]
            found[name] = sum(known) / len(known) if known else None
        return found


def figures_line(figures: dict[str, float | None]) -> str:
    """The figures of a step in one line; those that were not measured are left out."""
    known = ((form, figures.get(name)) for name, form in _FORMATS.items())
    return " · ".join(form.format(value) for form, value in known if value is not None)


def _read_plan(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / PLAN_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
