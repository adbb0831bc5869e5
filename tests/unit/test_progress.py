"""What a person sees of a training run, and what the driver reads for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmedpo_ray.align import progress
from mmedpo_ray.align.metrics import MetricsTail, MetricsWriter
from mmedpo_ray.align.progress import RecentSteps, duration, figures_line


def write(folder: Path, *steps: int, text: str = "") -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps) + text)


def steps_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows]


def test_the_tail_reads_every_line_once(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path)
    assert tail.read() == []
    write(tmp_path, 1, 2, text='{"step": 3, "lo')
    assert steps_of(tail.read()) == [1, 2]
    assert tail.read() == []
    write(tmp_path, text='ss": 0.5}\n')
    write(tmp_path, 4)
    assert tail.read() == [{"step": 3, "loss": 0.5}, {"step": 4, "loss": 0.25}]


def test_the_tail_begins_anew_where_the_workers_went_back(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path)
    write(tmp_path, 1, 2, 3)
    tail.read()
    resumed = MetricsWriter(tmp_path, 1, [])
    resumed.write({"step": 2, "loss": 9.0})
    resumed.write({"step": 3, "loss": 9.0})
    resumed.write({"step": 4, "loss": 9.0})
    assert steps_of(tail.read()) == [1, 2, 3, 4]


def test_speed_is_that_of_the_last_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    recent = RecentSteps(MetricsTail(tmp_path))
    assert not recent.look() and recent.step == 0
    write(tmp_path, *range(1, 101))
    assert recent.look() and recent.has_restarted
    assert recent.seconds_left(200) is None, "the hundred steps of an earlier launch are no speed"
    for step in range(101, 151):
        now += 3.0
        write(tmp_path, step)
        assert recent.look() and not recent.has_restarted
    assert recent.seconds_left(200) == pytest.approx(150.0)
    assert recent.mean()["loss"] == pytest.approx(sum(1 / step for step in range(141, 151)) / 10)
    MetricsWriter(tmp_path, 120, [])
    write(tmp_path, 121)
    assert recent.look() and recent.has_restarted and recent.step == 121


def test_figures_fit_a_terminal_and_leave_out_what_was_not_measured() -> None:
    figures = {
        "pairs_per_second": 1234.5, "tokens_per_second": 1234567.0, "loss": 0.6931, "reward_margin": -12.25,
        "reward_accuracy": 1.0, "ess": 1.0, "gpu_memory_gib": 79.2, "lr": 1e-7,
    }  # fmt: skip
    line = figures_line(figures)
    assert line == (
        "1,234.5 pairs/s · 1,234,567 tokens/s · loss 0.693 · margin -12.25 · accuracy 100% · ESS 100% · GPU "
        "79.2 GiB"
    )
    assert len(line) < 110
    assert figures_line(figures | {"reward_margin": None, "gpu_memory_gib": None}).count("·") == 4
    assert duration(3725.4) == "1:02:05"
