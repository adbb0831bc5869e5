"""kill -9 of a worker and of the driver while images are noised and while an endpoint is asked: the tables, and the files that
they name, are those of a quiet run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from chat_server import MODEL, ChatServer, Reply, running

from mmedpo_ray.config import Config, load
from mmedpo_ray.curate.curate import curate
from mmedpo_ray.data.ingest import ingest
from mmedpo_ray.stage import read_manifest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(400)]

IMAGES = 96
DRIVER = """
import sys
from mmedpo_ray import cluster, config, console
from mmedpo_ray.curate.curate import curate

console.configure()
settings = config.load(None, sys.argv[1:])
cluster.start(settings.ray)
curate(settings)
"""


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: None) -> None:
    pass


def start(overrides: list[str], log: Path) -> subprocess.Popen:
    """A driver with a cluster of its own, which ends with it."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *overrides],
        stdout=log.open("a"),
        stderr=subprocess.STDOUT,
        env=environment,
    )


def wait_for(found: Callable[[], Any], driver: subprocess.Popen, log: Path) -> Any:
    deadline = time.monotonic() + 120
    while not (result := found()):
        assert driver.poll() is None, f"ended too early: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.003)
    return result


def workers(driver: subprocess.Popen, task: str) -> list[psutil.Process]:
    """Worker processes that hold the task."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and task in title:
            found.append(process)
    return found


def disturbed(overrides: list[str], log: Path, task: str, progress: Callable[[], int], most: int) -> None:
    """Kills a worker, and later the driver, while less than all is done."""
    driver = start(overrides, log)
    try:
        victims = wait_for(lambda: progress() and workers(driver, task), driver, log)
        victims[0].kill()
        reached = progress()
        wait_for(lambda: progress() > reached + most // 8, driver, log)
        assert progress() < most, "the driver was to be killed before the end"
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()


def files_of(run: Path) -> dict[str, bytes]:
    """Tables and noised images of a run; nothing may be half-written or uncounted."""
    assert not [
        path for path in run.rglob("*") if path.name.endswith(".tmp") or path.name in (".parts", ".merged")
    ]
    for manifest in map(read_manifest, map(str, (run / "pairs", run / "visual", run / "rewrites"))):
        assert manifest is None or manifest.rows_in == manifest.rows_out + sum(manifest.dropped.values())
    names = ("pairs", "visual", "rewrites", "noised")
    kept = [path for name in names for path in sorted((run / name).rglob("*.p*"))]
    return {str(path.relative_to(run)): path.read_bytes() for path in kept}


def test_killed_while_images_are_noised(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "driver.log"
    overrides = [
        f"run.folder={run}", f"data.phantom.images={IMAGES}", "data.phantom.test_images=1", "ray.rows_per_part=16",
        "curate.text.method=rule_edit", "curate.visual.per_image=4", "curate.visual.tool=dataset_mask",
        "run.max_dropped_share=1.0",
    ]  # fmt: skip
    config = load(None, overrides)
    ingest(config)
    planned = curate(config).extra["kinds"]["visual"] * 2
    quiet = files_of(run)
    assert len([name for name in quiet if name.startswith("noised")]) == planned
    for name in ("pairs", "visual", "noised"):
        shutil.rmtree(run / name)

    def noised() -> int:
        return sum(1 for path in (run / "noised").glob("*.png")) if (run / "noised").exists() else 0

    disturbed(overrides, log, "VisualPairs", noised, planned)
    assert not (run / "visual" / "manifest.json").exists()
    # Whether a task is killed in the midst of a file is a matter of luck.
    (run / "noised" / "a.png.0123.tmp").write_bytes(b"half")
    curate(config)
    assert files_of(run) == quiet


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with running() as state:
        yield state


def rewrite(body: dict[str, Any], before: int) -> Reply:
    (line,) = [line for line in body["messages"][0]["content"].splitlines() if line.startswith("{")]
    reference = json.loads(line)["reference_answer"]
    edit = {
        "original_span": reference,
        "new_span": f"No {reference}",
        "changed": "negation",
        "rewritten": f"No {reference}",
    }
    return Reply(json.dumps(edit), delay=0.05)


def test_killed_while_an_endpoint_is_asked(tmp_path: Path, server: ChatServer) -> None:
    run, log = tmp_path / "run", tmp_path / "driver.log"
    overrides = [
        f"run.folder={run}", "data.phantom.images=24", "data.phantom.test_images=1", "run.max_dropped_share=1.0",
        "curate.text.method=rewrite", "curate.visual.tool=none", f"curate.text.endpoint.base_url={server.url}",
        f"curate.text.endpoint.model={MODEL}", "curate.text.endpoint.concurrency=2", "ray.rows_per_part=8",
    ]  # fmt: skip
    config: Config = load(None, overrides)
    ingest(config)
    server.answer = rewrite
    curate(config)
    quiet, planned = files_of(run), len(server.requests)
    for name in ("pairs", "rewrites"):
        shutil.rmtree(run / name)

    server.requests.clear()
    disturbed(overrides, log, "AskEndpoint", lambda: len(server.requests), planned)
    asked = len(server.requests)
    assert curate(config).rows_out > 0
    assert files_of(run) == quiet
    assert len(server.requests) - asked < planned, "what was written is not asked for again"
    manifest = read_manifest(str(run / "rewrites"))
    assert manifest is not None
    assert manifest.extra["endpoint"]["input_tokens"] >= manifest.rows_in * 100, "every answer was paid for"
