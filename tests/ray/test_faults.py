"""kill -9 of a worker, of a node and of the driver in the middle of every stage: the tables are those of a
quiet run.

The cluster outlives the drivers, so a task of a killed driver may still write while the next one resumes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmedpo_ray.tables.stage_runner import Manifest, read_manifest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROWS = 2500
FOLDERS = {"ingest": "samples", "curate": "pairs", "score": "scored"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with faults.cluster(1, 1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports that differ, so that no judgement is remembered, some rows that must be dropped, four shared
    images."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(4):
        Image.fromarray(np.full((8, 8), 40 * index, np.uint8)).save(folder / f"{index}.png")
    rows = [
        {
            "id": f"case-{number}",
            "image": "missing.png" if number % 50 == 0 else f"{number % 4}.png",
            "question": "Describe the findings.",
            "answer": "" if number % 70 == 1 else report(number),
        }
        for number in range(ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet", row_group_size=256)
    return folder


def report(number: int) -> str:
    sides, zones = ("left", "right"), ("upper", "middle", "lower")
    findings = ("pleural effusion", "nodule", "consolidation", "pneumothorax", "atelectasis")
    sentences = [
        f"There is a {number + index} mm {findings[(number + index) % 5]} in the "
        f"{sides[(number >> index) % 2]} {zones[(number + index) % 3]} zone."
        for index in range(4)
    ]
    return " ".join([*sentences, "No fracture."])


@pytest.fixture(scope="module")
def quiet(nodes: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nothing disturbs leaves."""
    run = tmp_path_factory.mktemp("quiet") / "run"
    driver = start(nodes, data, run)
    assert driver.wait() == 0, log_of(run)
    found = what_is_left(run)
    for name, folder in FOLDERS.items():
        manifest = found["manifests"][folder]
        assert manifest["rows_in"] > ROWS * 0.9, name
    assert found["manifests"]["samples"]["dropped"] == {"image_missing": 50, "empty_answer": 36}
    return found


def start(nodes: Any, data: Path, run: Path) -> subprocess.Popen:
    """A driver that runs the three stages, or what is left of them."""
    overrides = [
        f"run.folder={run}", "data.format=hf_parquet", f"data.root={data}", "data.name=faults",
        "data.test_share=0",
        "data.columns.sample_id=id", "data.columns.image_id=image", "curate.text.method=rule_edit",
        "curate.visual.tool=none", "ray.rows_per_part=128", f"ray.address={nodes.address}",
    ]  # fmt: skip
    run.parent.mkdir(exist_ok=True)
    return faults.start(list(FOLDERS), overrides, log_path(run))


def log_path(run: Path) -> Path:
    return run.parent / "driver.log"


def log_of(run: Path) -> str:
    return faults.tail(log_path(run))


def what_is_left(run: Path) -> dict[str, Any]:
    """Tables byte by byte, and what the manifests count."""
    faults.assert_nothing_left_over(run)
    manifests: dict[str, Any] = {}
    for folder in FOLDERS.values():
        manifest = read_manifest(str(run / folder))
        assert isinstance(manifest, Manifest)
        assert manifest.rows_in == manifest.rows_out + sum(manifest.dropped.values())
        # Image addresses are in the data's folder, not in the run's, so nothing depends on where the run is.
        manifests[folder] = manifest.model_dump(
            include={"rows_in", "rows_out", "dropped", "content", "extra"}
        )
    files = {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*.parquet"))
        if path.is_file()
    }
    return {"manifests": manifests, "files": files}


def assert_same(run: Path, quiet: dict[str, Any]) -> None:
    """The run's tables are those of the quiet one, byte by byte."""
    found = what_is_left(run)
    assert found["manifests"] == quiet["manifests"]
    assert list(found["files"]) == list(quiet["files"])
    for name, content in found["files"].items():
        if content != quiet["files"][name]:
            ours, theirs = (pq.read_table(pa.BufferReader(data)) for data in (content, quiet["files"][name]))
            columns = [column for column in ours.column_names if ours[column] != theirs[column]]
            pytest.fail(f"{name} differs in {columns or 'its encoding'}")


# ---------------------------------------------------------------------- faults


def parts_of(run: Path, stage: str) -> list[Path]:
    """Parts that the stage has written and not yet merged."""
    return [] if finished(run, stage) else list((run / FOLDERS[stage]).rglob(".parts/*.parquet"))


def finished(run: Path, stage: str) -> bool:
    return (run / FOLDERS[stage] / "manifest.json").exists()


def busy_workers(node: Any, run: Path, stage: str) -> list[psutil.Process]:
    """Processes of a node that run a task of the stage."""
    folder = run / FOLDERS[stage]
    if finished(run, stage) or not any(folder.rglob(".parts/key.json")):
        return []
    return faults.workers(faults.raylet(node), "ray::MapBatches")


@pytest.mark.slow
def test_workers_killed_in_every_stage(nodes: Any, data: Path, quiet: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    driver = start(nodes, data, run)
    for stage in FOLDERS:
        victims = faults.wait_for(
            lambda stage=stage: [
                process for node in nodes.list_all_nodes() for process in busy_workers(node, run, stage)
            ],
            driver,
            log_path(run),
            f"task of {stage}",
        )
        victims[0].kill()
        assert not finished(run, stage), f"{stage} was killed too late"
    assert driver.wait() == 0, log_of(run)
    assert_same(run, quiet)


@pytest.mark.slow
def test_a_node_lost_in_every_stage(nodes: Any, data: Path, quiet: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    driver = start(nodes, data, run)
    for stage in FOLDERS:
        (node,) = nodes.worker_nodes
        faults.wait_for(
            lambda node=node, stage=stage: busy_workers(node, run, stage),
            driver,
            log_path(run),
            f"task of {stage}",
        )
        nodes.remove_node(node, allow_graceful=False)
        assert not finished(run, stage), f"{stage} was hit too late"
        nodes.add_node(num_cpus=1, wait=False)
    assert driver.wait() == 0, log_of(run)
    assert_same(run, quiet)


def test_the_driver_killed_in_every_stage(
    nodes: Any, data: Path, quiet: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for stage in FOLDERS:
        driver = start(nodes, data, run)
        part = f"part of {stage}"
        faults.wait_for(lambda stage=stage: parts_of(run, stage), driver, log_path(run), part)
        faults.kill_driver(driver)
        assert not finished(run, stage), f"{stage} was killed too late"
    driver = start(nodes, data, run)
    assert driver.wait() == 0, log_of(run)
    assert log_of(run).count("rows are already there") >= 3, "every stage resumed from its parts"
    assert_same(run, quiet)
