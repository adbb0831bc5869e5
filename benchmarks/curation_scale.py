"""Rows per second and memory of `ingest` → `curate` (rule_edit) → `score` (three rules agents) from 10⁴ to
10⁶ rows.

    python benchmarks/curation_scale.py [--rows 10000 100000 1000000] [--folder DIR] [--keep] [--json FILE]
    [--chart FILE.svg]

The rows are made up: questions and answers of the phantom world, every fourth row a report of several
sentences made of findings, sides, zones and degrees, so that most reports occur once. They lie in
Parquet files in Hugging Face style (row groups of 1,000) and share eight images; there is no visual curation,
and weights match moments.

Each table size runs in a process and a local Ray cluster of its own, whose folder is deleted afterwards
(about 0.5 KB a row); what was measured is written to ``--json`` after each. What is measured:

- *Start-up*: on the same cluster, after a first round of 16,384 rows has started the workers and imported
  everything, the three stages run over 256 rows, one block each: the median of three such rounds, stage by
  stage.
- *Rows per second*: rows over the time from the call of a stage until its manifest is written (planning,
  tasks, merge into the sorted table, figures); once as it is, and once without start-up: (rows − 256) /
  (seconds − seconds of the 256 rows).
- *Ratio*: a machine that others share changes its speed within minutes, so each size is compared on its own
  cluster: three rounds of the smallest size go before it and three after, and the ratio is its rows per
      second to the median of their six.
- *CPU*: the time that the driver and the Ray workers computed, a row; unlike rows per second it hardly
  depends on what else the machine does. Processes of Ray itself are not in it.
- *Memory*: every half second, of the driver and of each Ray worker process, the resident set and the part of
  it that is not shared (the object store is mapped into every process, and its pages count for each that has
  touched them). The peaks are of the measured round alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

START_ROWS = 256
# Rounds of the smallest size before and after each size.
_ROUNDS = 3
# Enough for tasks on every CPU of a small machine, and for merges in tasks.
_WARM_ROWS = 16_384
_IMAGES = 8
_ROWS_PER_FILE = 250_000
_ROWS_PER_GROUP = 1_000
_REPORT_EVERY = 4
_EVERY_S = 0.5
_TELL_EVERY_S = 30.0
_MIB = 2**20

_FINDINGS = (
    "pleural effusion", "pneumothorax", "consolidation", "pulmonary nodule", "atelectasis", "pulmonary edema",
    "rib fracture", "lung mass", "infiltrate", "pleural thickening", "cavitation", "granuloma",
)  # fmt: skip
_SIDES = ("left", "right", "bilateral")
_ZONES = ("upper", "middle", "lower")
_DEGREES = ("small", "mild", "moderate", "large", "severe")


def main() -> int:
    """Measures each table size in a process of its own, prints the table, writes JSON and chart."""
    arguments = _arguments()
    if arguments.single:
        return _measure(arguments.single, min(arguments.rows), arguments.folder, arguments.json)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "sizes": [],
    }
    with tempfile.TemporaryDirectory(prefix="curation-scale-") as scratch:
        for rows in arguments.rows:
            folder = (arguments.folder or Path(scratch)) / str(rows)
            print(f"{rows:,} rows, load {os.getloadavg()[0]:.1f}", flush=True)
            result["sizes"].append(_in_own_process(rows, min(arguments.rows), folder))
            if not arguments.keep:
                shutil.rmtree(folder)
            print(_table(result), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(_growth(result))
    if arguments.chart:
        _chart(result, arguments.chart)
    return 0


def _in_own_process(rows: int, least: int, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / "result.json"
    command = [sys.executable, __file__, "--single", str(rows), "--rows", str(least)]
    subprocess.run([*command, "--folder", str(folder), "--json", str(found)], check=True)
    return json.loads(found.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- one table size


def _measure(rows: int, least: int, folder: Path, target: Path) -> int:
    from mmedpo_ray import console
    from mmedpo_ray.compat import cluster
    from mmedpo_ray.config.tree import RayConfig

    console.configure()
    for size in (_WARM_ROWS, START_ROWS, least, rows):
        write_rows(folder / f"data-{size}", size)
    cluster.start(RayConfig())
    watch = Watch()
    _round(folder, "warm", _WARM_ROWS, watch)
    starts = [_round(folder, f"start-{index}", START_ROWS, watch) for index in range(3)]
    start = {name: statistics.median(item[name] for item in starts) for name in starts[0]}
    around = [_round(folder, f"before-{index}", least, watch) for index in range(_ROUNDS)]
    watch.begin()
    watch.cpu_seconds = {}
    seconds = _round(folder, "run", rows, watch)
    watch.end()
    cpu = {**watch.cpu_seconds, "all": sum(watch.cpu_seconds.values())}
    around += [_round(folder, f"after-{index}", least, watch) for index in range(_ROUNDS)]
    rate = _without_start(rows, seconds, start)
    least_rates = [_without_start(least, item, start) for item in around]
    result = {
        "rows": rows,
        "start_seconds": start,
        "seconds": seconds,
        "rows_per_s": {name: round(rows / value, 1) for name, value in seconds.items()},
        "rows_per_s_without_start": rate,
        "least": {"rows": least, "seconds": around, "rows_per_s_without_start": least_rates},
        "ratio": {
            name: round(value / statistics.median(item[name] for item in least_rates), 3)
            for name, value in rate.items()
        },
        "cpu_ms_per_row": {name: round(value / rows * 1000, 4) for name, value in cpu.items()},
        "counts": _counts(folder / "run"),
        "memory_mib": watch.peaks(),
        "series": watch.series,
    }
    target.write_text(json.dumps(result), encoding="utf-8")
    return 0


def _without_start(rows: int, seconds: dict[str, float], start: dict[str, float]) -> dict[str, float]:
    """Rows per second by stage."""
    return {
        name: round((rows - START_ROWS) / max(1e-9, value - start[name]), 1)
        for name, value in seconds.items()
    }


def _round(folder: Path, name: str, rows: int, watch: Watch) -> dict[str, float]:
    """Seconds of each stage, and of all."""
    from mmedpo_ray.config.load import load
    from mmedpo_ray.curate.stage import curate
    from mmedpo_ray.ingest.stage import ingest
    from mmedpo_ray.judge.stage import score

    config = load(
        None,
        [
            f"run.folder={folder / name}", "data.format=hf_parquet", f"data.root={folder / f'data-{rows}'}",
            "data.name=scale", "data.test_share=0", "data.columns.sample_id=id",
            "data.columns.image_id=image",
            "curate.text.method=rule_edit", "curate.visual.tool=none",
        ],
    )  # fmt: skip
    seconds: dict[str, float] = {}
    for stage in (ingest, curate, score):
        with watch.during(stage.__name__):
            began = time.monotonic()
            stage(config)
            seconds[stage.__name__] = round(time.monotonic() - began, 3)
    return {**seconds, "all": round(sum(seconds.values()), 3)}


def _counts(run: Path) -> dict[str, dict[str, Any]]:
    from mmedpo_ray.tables.stage_runner import read_manifest

    found = {}
    for name in ("samples", "pairs", "scored"):
        manifest = read_manifest(str(run / name))
        assert manifest is not None
        found[name] = {"in": manifest.rows_in, "out": manifest.rows_out, "dropped": manifest.dropped}
    return found


class Watch:
    """Samples the memory of this process and of the Ray workers below it.

    Attributes:
        stage: the stage that is running.
        cpu_seconds: of driver and workers, by stage.
        series: a row every half second: seconds, stage, and in MiB the driver's resident and unshared memory,
            the same of the largest worker, the sum of the workers' unshared memory, and their number.
    """

    def __init__(self) -> None:
        self.stage = ""
        self.cpu_seconds: dict[str, float] = {}
        self.series: list[dict[str, Any]] = []
        self._driver = psutil.Process()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Names what runs, and adds up what it computes."""
        self.stage = stage
        before = self._cpu_seconds()
        yield
        after = self._cpu_seconds()
        self.cpu_seconds[stage] = sum(now - before.get(process, 0.0) for process, now in after.items())
        self.stage = ""

    def begin(self) -> None:
        """Starts sampling."""
        self._thread.start()

    def end(self) -> None:
        """Stops sampling."""
        self._over.set()
        self._thread.join()

    def peaks(self) -> dict[str, dict[str, float]]:
        """The largest value of every column, by stage."""
        stages = dict.fromkeys(row["stage"] for row in self.series if row["stage"])
        columns = ("driver", "driver_unshared", "worker", "worker_unshared", "workers_unshared")
        return {
            stage: {name: max(row[name] for row in self.series if row["stage"] == stage) for name in columns}
            for stage in stages
        }

    def _sample(self) -> None:
        began = told = time.monotonic()
        while not self._over.wait(_EVERY_S):
            driver, workers = self._driver.memory_info(), []
            for process in self._workers():
                with suppress(psutil.Error):
                    workers.append(process.memory_info())
            unshared = [info.rss - info.shared for info in workers] or [0]
            self.series.append(
                {
                    "seconds": round(time.monotonic() - began, 1),
                    "stage": self.stage,
                    "driver": round(driver.rss / _MIB, 1),
                    "driver_unshared": round((driver.rss - driver.shared) / _MIB, 1),
                    "worker": round(max([info.rss for info in workers] or [0]) / _MIB, 1),
                    "worker_unshared": round(max(unshared) / _MIB, 1),
                    "workers_unshared": round(sum(unshared) / _MIB, 1),
                    "workers": len(workers),
                }
            )
            if time.monotonic() - told > _TELL_EVERY_S:
                told, now = time.monotonic(), self.series[-1]
                print(
                    f"  {now['seconds']:.0f} s, {now['stage']}: driver {now['driver_unshared']:.0f} MiB, "
                    f"largest of {now['workers']} workers {now['worker_unshared']:.0f} MiB",
                    flush=True,
                )

    def _cpu_seconds(self) -> dict[int, float]:
        found = {}
        for process in (self._driver, *self._workers()):
            with suppress(psutil.Error):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
        return found

    def _workers(self) -> Iterator[psutil.Process]:
        for process in self._driver.children(recursive=True):
            # Ray names its workers after what they do: "ray::IDLE", "ray::MapBatches(…)".
            with suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith("ray::"):
                    yield process


# ---------------------------------------------------------------------- made-up rows


def write_rows(folder: Path, rows: int) -> None:
    """Writes a data set of ``rows`` rows, unless it is there."""
    if (folder / "done").exists():
        return
    from PIL import Image

    from mmedpo_ray.phantom.world import make_phantom

    folder.mkdir(parents=True, exist_ok=True)
    for index in range(_IMAGES):
        Image.fromarray(make_phantom(index, prior="uniform").image).save(folder / f"image-{index}.png")
    schema = pa.schema([(name, pa.string()) for name in ("id", "image", "question", "answer")])
    for number, start in enumerate(range(0, rows, _ROWS_PER_FILE)):
        stop = min(rows, start + _ROWS_PER_FILE)
        with pq.ParquetWriter(folder / f"train-{number:05d}.parquet", schema) as writer:
            for at in range(start, stop, _ROWS_PER_GROUP):
                group = [_row(index) for index in range(at, min(stop, at + _ROWS_PER_GROUP))]
                writer.write_table(pa.Table.from_pylist(group, schema))
    (folder / "done").touch()


def _row(index: int) -> dict[str, str]:
    question, answer = _report(index) if index % _REPORT_EVERY == 0 else _short(index)
    return {
        "id": f"case-{index}",
        "image": f"image-{index % _IMAGES}.png",
        "question": question,
        "answer": answer,
    }


def _short(index: int) -> tuple[str, str]:
    asked = _questions(index // _REPORT_EVERY)
    chosen = asked[index % len(asked)]
    return chosen.question, chosen.answer


@lru_cache(maxsize=1)
def _questions(case: int) -> tuple[Any, ...]:
    from mmedpo_ray.phantom.findings import sample_findings
    from mmedpo_ray.phantom.text import write_questions

    rng = np.random.default_rng(case)
    return write_questions(rng, sample_findings(rng, "uniform"))


def _report(index: int) -> tuple[str, str]:
    rng = np.random.default_rng(index)

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    sentences = [
        f"There is a {pick(_DEGREES)} {pick(_SIDES)} {pick(_FINDINGS)} in the {pick(_ZONES)} zone."
        for _ in range(int(rng.integers(1, 4)))
    ]
    sentences += [f"No {pick(_FINDINGS)}.", pick(("The heart size is normal.", "The heart is enlarged."))]
    return "Describe the findings of this chest radiograph.", " ".join(sentences)


# ---------------------------------------------------------------------- results


def _table(result: dict[str, Any]) -> str:
    lines = [
        "| rows | stage | seconds | rows/s | rows/s without start-up | ratio | start-up s | CPU ms/row | "
        "driver MiB (unshared) | largest worker MiB (unshared) |",
        "|" + " ---: |" * 10,
    ]
    for size in result["sizes"]:
        for name, seconds in size["seconds"].items():
            of_stage = [peaks for stage, peaks in size["memory_mib"].items() if name in ("all", stage)]
            driver, own, worker, unshared = (
                max((peaks[column] for peaks in of_stage), default=0.0)
                for column in ("driver", "driver_unshared", "worker", "worker_unshared")
            )
            lines.append(
                f"| {size['rows']:,} | {name} | {seconds:.1f} | {size['rows_per_s'][name]:,.0f} | "
                f"{size['rows_per_s_without_start'][name]:,.0f} | {size['ratio'][name]:.2f} | "
                f"{size['start_seconds'][name]:.2f} | {size['cpu_ms_per_row'][name]:.3f} | {driver:.0f} "
                f"({own:.0f}) | {worker:.0f} ({unshared:.0f}) |"
            )
    return "\n".join([*lines, "", f"{result['hardware']}, {result['date']}, `{result['command']}`"])


def _growth(result: dict[str, Any]) -> str:
    """How far each figure is from that of the smallest table."""
    first, *others = result["sizes"]
    lines = []
    for size in others:
        of_all = [item["all"] for item in size["least"]["rows_per_s_without_start"]]
        changes = [
            f"rows/s without start-up {size['ratio']['all'] - 1:+.1%} (rounds of {size['least']['rows']:,} "
            f"beside it: {min(of_all):,.0f} to {max(of_all):,.0f})",
            f"CPU a row {size['cpu_ms_per_row']['all'] / first['cpu_ms_per_row']['all'] - 1:+.1%}",
        ]
        changes += [
            f"{label} {_peak(size, column) - _peak(first, column):+.0f} MiB"
            for column, label in _MEMORY.items()
        ]
        lines.append(f"{size['rows']:,} against {first['rows']:,} rows: {', '.join(changes)}")
    return "\n".join(lines)


_MEMORY = {"driver_unshared": "driver", "worker_unshared": "largest worker"}


def _peak(size: dict[str, Any], column: str) -> float:
    return max(of[column] for of in size["memory_mib"].values())


def _chart(result: dict[str, Any], target: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sizes = result["sizes"]
    rows = [size["rows"] for size in sizes]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in sizes[0]["seconds"]:
        width = 2.5 if name == "all" else 1.5
        speed.plot(rows, [size["ratio"][name] for size in sizes], "o-", label=name, linewidth=width)
    speed.set(
        title=f"Rows per second, without start-up,\nagainst {sizes[0]['least']['rows']:,} rows beside them",
        xlabel="rows",
        xscale="log",
    )
    speed.set_ylim(bottom=0)
    for column, label in _MEMORY.items():
        memory.plot(rows, [_peak(size, column) for size in sizes], "o-", label=label)
    memory.set(title="Peak of unshared memory, MiB", xlabel="rows", xscale="log")
    memory.set_ylim(bottom=0)
    for axes in (speed, memory):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(target, dpi=150)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where data and tables go (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep data and tables of each size")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--chart", type=Path, help="where to write the chart (.svg or .png)")
    parser.add_argument("--single", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
