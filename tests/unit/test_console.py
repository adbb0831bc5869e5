"""What long work shows, on a terminal and in a log."""

from __future__ import annotations

import io
import itertools
import time

import pytest
from rich.console import Console

from mmedpo_ray import console


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> io.StringIO:
    text = io.StringIO()
    made = Console(file=text, force_terminal=request.param, width=200)
    monkeypatch.setattr(console, "console", made)
    return text


def test_lines_in_a_log_become_rarer() -> None:
    pauses = list(itertools.islice(console.line_times(), 12))
    assert pauses == sorted(pauses)
    assert pauses[0] == 30.0 and pauses[-1] == 300.0


@pytest.mark.parametrize("shown", [False], indirect=True)
@pytest.mark.parametrize(("total", "far"), [(200, "60 of 200 rows (30%)"), (None, "60 rows")])
def test_a_log_has_a_line_now_and_then(
    shown: io.StringIO, monkeypatch: pytest.MonkeyPatch, total: int | None, far: str
) -> None:
    monkeypatch.setattr(console, "line_times", lambda: iter([0.05] * 100))
    with console.progress_bar() as bar:
        task = bar.add_task("curate", total=total, completed=40, note="")
        bar.update(task, advance=20)
        time.sleep(0.3)
    lines = shown.getvalue().splitlines()
    assert lines and all(line.startswith(f"curate: {far} after 0:00:0") for line in lines)
    assert all("rows/s" in line for line in lines)
    assert all((", 0:00:" in line and line.endswith(" left")) == (total is not None) for line in lines)
    said = len(lines)
    time.sleep(0.2)
    assert len(shown.getvalue().splitlines()) == said, "nothing is said once the work is over"


@pytest.mark.parametrize("shown", [True], indirect=True)
def test_the_bar_names_its_times(shown: io.StringIO) -> None:
    with console.progress_bar() as bar:
        task = bar.add_task("score", total=10, note="")
        bar.update(task, advance=1)
        bar.refresh()
    line = next(part for part in shown.getvalue().split("\r") if "score" in part)
    assert line.index("elapsed") < line.index("left")
    assert "0:00:00\x1b[0m elapsed, " in line


def test_what_was_done_before_is_no_speed() -> None:
    bar = console.progress_bar()
    bar.add_task("score", total=100, completed=90, note="")
    line = console.progress_line(bar.tasks[0], 90)
    assert line.startswith("score: 90 of 100 rows (90%)") and "left" not in line
