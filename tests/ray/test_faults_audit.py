"""kill -9 of a node and of the driver in the middle of an audit: it finds what a quiet one finds, and leaves
nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = 300_000
_TASK = "ray::MapBatches(work)"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with faults.cluster(1, 1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with a length shortcut, repeats and some equal sides."""
    folder = tmp_path_factory.mktemp("pairs")
    words = np.array(
        ["no", "small", "large", "nodule", "effusion", "left", "right", "lung", "heart", "mass", "edema"]
    )
    for number in range(3):
        rng = np.random.default_rng(number)
        size = ROWS // 3
        chosen = [" ".join(row) for row in words[rng.integers(0, len(words), (size, 3))]]
        longer = [f"{answer} {words[index % len(words)]}" for index, answer in enumerate(chosen)]
        columns = {
            "pair_id": [f"{number}-{index}" for index in range(size)],
            "sample_id": [f"s{index % 5000}" for index in range(size)],
            "image_uri": [f"/images/{index % 900}.png" for index in range(size)],
            "kind": ["text"] * size,
            "question": [f"what is seen {index % 40}" for index in range(size)],
            "chosen": chosen,
            "rejected": [
                same if index % 1000 == 0 else other
                for index, (same, other) in enumerate(zip(chosen, longer, strict=True))
            ],
            "weight": np.round(rng.uniform(0.75, 1.25, size), 3),
        }
        pq.write_table(pa.table(columns), folder / f"part-{number:05d}.parquet", row_group_size=1024)
    return folder


def start(nodes: Any, table: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "mmedpo_ray.cli", "audit", str(table), "--out", str(out / "audit.json")]
    out.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*command, f"run.folder={out}", f"ray.address={nodes.address}"],
        stdout=(out / "driver.log").open("a"),
        stderr=subprocess.STDOUT,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )


def audit_of(driver: subprocess.Popen, out: Path) -> str:
    assert driver.wait(timeout=200) == 0, faults.tail(out / "driver.log")
    assert sorted(path.name for path in out.iterdir()) == ["audit.json", "driver.log"]
    return (out / "audit.json").read_text()


@pytest.fixture(scope="module")
def quiet(nodes: Any, table: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("quiet")
    found = audit_of(start(nodes, table, out), out)
    assert "length" in found
    return found


def test_a_node_lost_in_an_audit(nodes: Any, table: Path, quiet: str, tmp_path: Path) -> None:
    driver = start(nodes, table, tmp_path)
    (node,) = nodes.worker_nodes
    log = tmp_path / "driver.log"
    faults.wait_for(lambda: faults.workers(faults.raylet(node), _TASK), driver, log, "task on the node")
    nodes.remove_node(node, allow_graceful=False)
    assert driver.poll() is None, "the node was lost too late"
    nodes.add_node(num_cpus=1, wait=False)
    assert audit_of(driver, tmp_path) == quiet


def test_the_driver_killed_in_an_audit(nodes: Any, table: Path, quiet: str, tmp_path: Path) -> None:
    driver = start(nodes, table, tmp_path)
    log = tmp_path / "driver.log"
    raylets = [faults.raylet(node) for node in nodes.list_all_nodes()]
    faults.wait_for(
        lambda: any(faults.workers(raylet, _TASK) for raylet in raylets), driver, log, "task at work"
    )
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["driver.log"], "nothing half-written"
    assert audit_of(start(nodes, table, tmp_path), tmp_path) == quiet
