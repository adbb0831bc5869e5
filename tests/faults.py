"""What the tests of faults share: drivers of their own, processes found by what they do, what a run leaves on
disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from mmedpo_ray.tables.manifest import MANIFEST
from mmedpo_ray.tables.stage_runner import read_manifest

_DRIVER = """
import sys
from mmedpo_ray.compat import cluster
from mmedpo_ray.config import load as config
from mmedpo_ray import console
from mmedpo_ray.stages.registry import stages

console.configure()
settings = config.load(None, sys.argv[2:])
cluster.start(settings.ray)
for stage in sys.argv[1].split(","):
    stages()[stage].run(settings)
"""


@contextlib.contextmanager
def cluster(head_cpus: int, *node_cpus: int) -> Iterator[Any]:
    """A cluster beside the one of the other tests; drivers join it by its address (`ray.address`)."""
    from ray.cluster_utils import Cluster

    # A node that is gone is noticed within a second rather than half a minute; one that is slow may take its
    # time.
    checks = {"initial_delay_ms": 1000, "period_ms": 300, "timeout_ms": 10_000, "failure_threshold": 3}
    system = {f"health_check_{name}": value for name, value in checks.items()}
    head = {"num_cpus": head_cpus, "_system_config": system, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        for cpus in node_cpus:
            nodes.add_node(num_cpus=cpus)
        yield nodes
    finally:
        nodes.shutdown()


def start(stages: Sequence[str], overrides: Sequence[str], log: Path) -> subprocess.Popen:
    """A driver that runs stages, or what is left of them; without `ray.address` in a cluster that ends with
    it."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", _DRIVER, ",".join(stages), *overrides],
        stdout=log.open("a"),
        stderr=subprocess.STDOUT,
        env=environment,
    )


def wait_for(found: Callable[[], Any], driver: subprocess.Popen, log: Path, what: str) -> Any:
    """The first result that is not empty."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if result := found():
            return result
        assert driver.poll() is None, f"the driver ended before {what}: {tail(log)}"
        time.sleep(0.003)
    pytest.fail(f"no {what}: {tail(log)}")


def tail(log: Path) -> str:
    """The end of a driver's output."""
    return log.read_text()[-4000:]


def workers(parent: int, task: str) -> list[psutil.Process]:
    """Worker processes below another, a driver with a cluster of its own or a raylet, that hold the task."""
    found = []
    try:
        processes = psutil.Process(parent).children(recursive=True)
    except psutil.Error:
        return []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and task in title:
                found.append(process)
    return found


def raylet(node: Any) -> int:
    """The process that a node's workers are children of."""
    (info,) = node.all_processes["raylet"]
    return info.process.pid


def kill(process: psutil.Process) -> None:
    """Ends a worker without a word."""
    process.kill()
    wait_until_gone([process])


def kill_driver(driver: subprocess.Popen) -> None:
    """Ends a driver, unless it has ended, without a word, and waits for the Ray Data workers of its own
    cluster.

    They notice within seconds; until then they go on writing.
    """
    if driver.poll() is not None:
        return
    left = workers(driver.pid, "ray::Map")
    driver.kill()
    driver.wait()
    wait_until_gone(left)


def wait_until_gone(processes: Sequence[psutil.Process]) -> None:
    """Waits for processes that may be nobody's children by now, so that nobody asks how they ended."""
    deadline = time.monotonic() + 60
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline, "processes live on"
        time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that has ended and was not asked about does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def disturbed(
    stage: str, overrides: Sequence[str], log: Path, task: str, progress: Callable[[], int], most: int
) -> None:
    """Kills a worker that holds the task, and later the driver while another does, before all is done.

    Args:
        stage: to run.
        overrides: its settings.
        log: of the driver.
        task: in the title of a process that is at work.
        progress: what is done, 0 before and after the stage's work.
        most: what it comes to.
    """
    driver = start([stage], overrides, log)
    try:
        victim = wait_for(lambda: progress() and workers(driver.pid, task), driver, log, f"{task} at work")[0]
        kill(victim)
        reached = progress()
        assert 0 < reached < most, "the worker was killed too late"
        wait_for(
            lambda: progress() > reached + most // 8 and workers(driver.pid, task),
            driver,
            log,
            f"{task} at work again",
        )
        assert progress() < most, "the driver was killed too late"
    finally:
        kill_driver(driver)
    assert driver.returncode == -signal.SIGKILL, tail(log)


def files_of(run: Path, *names: str) -> dict[str, Any]:
    """Tables and images in some folders of a finished run, byte by byte, and the rows that its manifests
    count."""
    assert_nothing_left_over(run)
    found: dict[str, Any] = {}
    for name in names:
        for path in sorted((run / name).rglob(MANIFEST)):
            manifest = read_manifest(str(path.parent))
            assert manifest is not None
            assert manifest.rows_in == manifest.rows_out + sum(manifest.dropped.values())
            found[str(path.relative_to(run))] = manifest.model_dump(
                include={"rows_in", "rows_out", "dropped", "content"}
            )
        found |= {
            str(path.relative_to(run)): path.read_bytes() for path in sorted((run / name).rglob("*.p*"))
        }
    return found


def assert_nothing_left_over(run: Path) -> None:
    """No file of a run is half-written, and none waits to be merged."""
    folders = (".parts", ".merged", ".debate")
    found = [path for path in run.rglob("*") if path.name.endswith(".tmp") or path.name in folders]
    assert not found, [str(path.relative_to(run)) for path in found]
