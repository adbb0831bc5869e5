"""kill -9 of the actor that holds a model, of its node and of the driver while the model is at work, and of a node while images
are noised: the tables, and the files that they name, are those of a quiet run.

What chance decides about a row depends on the row alone, so tables are equal byte by byte, whichever rows share a batch
after a kill.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faults
import pyarrow.parquet as pq
import pytest
from tiny_chat import build_tiny_chat
from tiny_medklip import build_tiny_medklip

from mmedpo_ray.config.load import load
from mmedpo_ray.stages.registry import stages
from mmedpo_ray.tables.manifest import MANIFEST
from mmedpo_ray.tables.stage_runner import Manifest, read_manifest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Scene:
    """A stage in the midst of which something is killed, after a run of it that nothing disturbed.

    Attributes:
        run: folder of the run.
        overrides: its settings.
        stage: to run again.
        task: in the title of a process that is at work.
        folders: of the run that the stage writes.
        done: pattern of the files that come one by one as the work goes on: parts of a table, or images.
        most: rows or images that there will be.
        quiet: what the run left.
    """

    run: Path
    overrides: list[str]
    stage: str
    task: str
    folders: tuple[str, ...]
    done: str
    most: int
    quiet: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.quiet = faults.files_of(self.run, *self.folders)

    def forget(self) -> None:
        """Takes back what the stage has written."""
        for name in self.folders:
            shutil.rmtree(self.run / name)

    def progress(self) -> int:
        """Rows or images that are there, of a table only until its parts are merged."""
        found = list(self.run.glob(self.done))
        if not self.done.endswith(".parquet"):
            return len(found)
        with suppress(FileNotFoundError):
            return sum(pq.read_metadata(path).num_rows for path in found)
        return 0

    def assert_same(self) -> None:
        """What is there now is what the quiet run left."""
        found = faults.files_of(self.run, *self.folders)
        assert list(found) == list(self.quiet)
        for name, content in found.items():
            assert content == self.quiet[name], f"{name} differs"


def run_stages(run: Path, stages: tuple[str, ...], *overrides: str) -> list[str]:
    """Runs stages on a small made-up data set; returns the settings."""
    settings = [f"run.folder={run}", "data.phantom.test_images=1", "run.max_dropped_share=1.0", *overrides]
    for stage in stages:
        stages()[stage].run(load(None, settings))
    return settings


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(str(folder))
    assert manifest is not None
    return manifest


def sampling(folder: Path) -> Scene:
    """`curate` while the embedded model answers, eight questions at a time."""
    run = folder / "run"
    engine = ("max_model_len=256", "kv_cache_gib=0.25", "batch_rows=8", "max_num_seqs=8")
    overrides = run_stages(
        run, ("ingest", "curate"), "data.phantom.images=32", "curate.visual.tool=none",
        "curate.text.num_candidates=2", *(f"model.engine.{setting}" for setting in engine),
    )  # fmt: skip
    assert manifest_of(run / "pairs").extra["generators"]["phantom"]
    most = manifest_of(run / "candidates").rows_in
    folders, done = ("candidates", "pairs"), "candidates/.parts/*.parquet"
    return Scene(run, overrides, "curate", "MapBatches(CandidateSampler)).submit", folders, done, most)


def judging(folder: Path) -> Scene:
    """`score` while a chat model judges, sixteen pairs at a time, after a lexicon."""
    run, model = folder / "run", build_tiny_chat(folder / "judge", max_positions=2600)
    engine = {"kv_cache_gib": 0.25, "max_num_seqs": 2, "batch_rows": 8}
    chat = {"kind": "vllm", "model": str(model), "temperature": 1.0, "max_tokens": 48, "engine": engine}
    agents = [{"kind": "rules", "name": "lexicon"}, chat | {"name": "chat"}]
    overrides = run_stages(
        run, ("ingest", "curate", "score"), "data.phantom.images=32", "curate.text.method=rule_edit",
        "score.max_rounds=1", f"score.agents={json.dumps(agents)}",
    )  # fmt: skip
    most = manifest_of(run / "pairs").extra["kinds"]["text"]
    done = "scored/.debate/pass-01-chat/.parts/*.parquet"
    return Scene(run, overrides, "score", "MapBatches(HoldPass)).submit", ("scored",), done, most)


def localising(folder: Path) -> Scene:
    """`curate` while MedKLIP's network looks at images, four at a time."""
    run, model = folder / "run", build_tiny_medklip(folder / "medklip")
    visual = (
        "tool=medklip", "per_image=2", "batch_images=4", f"medklip.checkpoint={model / 'medklip.pth'}",
        f"medklip.text_model={model / 'bert'}",
    )  # fmt: skip
    overrides = run_stages(
        run, ("ingest", "curate"), "data.phantom.images=48", "curate.text.method=rule_edit",
        *(f"curate.visual.{setting}" for setting in visual),
    )  # fmt: skip
    most = 2 * manifest_of(run / "visual").rows_out
    folders, done = ("visual", "noised", "pairs"), "noised/*/*.png"
    return Scene(run, overrides, "curate", "MapBatches(VisualPairs)).submit", folders, done, most)


def noising(folder: Path) -> Scene:
    """`curate` while images are noised where a mask says, by tasks without a model."""
    run = folder / "run"
    overrides = run_stages(
        run, ("ingest", "curate"), "data.phantom.images=96", "curate.text.method=rule_edit",
        "curate.visual.tool=dataset_mask", "curate.visual.per_image=6",
    )  # fmt: skip
    most = 2 * manifest_of(run / "visual").rows_out
    folders, done = ("visual", "noised", "pairs"), "noised/*/*.png"
    return Scene(run, overrides, "curate", "MapBatches(VisualPairs)", folders, done, most)


@pytest.fixture(scope="module", params=[sampling, judging, localising], ids=lambda make: make.__name__)
def scene(
    request: pytest.FixtureRequest, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Scene:
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


def test_the_actor_with_the_model_and_the_driver_killed(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.forget()
    log = tmp_path / "driver.log"
    faults.disturbed(scene.stage, scene.overrides, log, scene.task, scene.progress, scene.most)
    assert not (scene.run / scene.folders[0] / MANIFEST).exists()
    stages()[scene.stage].run(load(None, scene.overrides))
    scene.assert_same()
    # Images are made over, rows of a table are not.
    assert ("rows are already there" in capsys.readouterr().err) == scene.done.endswith(".parquet")


def test_the_node_of_the_actor_lost_and_replaced(scene: Scene, tmp_path: Path) -> None:
    with faults.cluster(0, 2) as nodes:
        run_and_lose_a_node(scene, nodes, tmp_path / "driver.log", replacement_cpus=2)


def test_one_of_two_nodes_lost_while_images_are_noised(ray_cluster: None, tmp_path: Path) -> None:
    with faults.cluster(1, 1) as nodes:
        run_and_lose_a_node(noising(tmp_path), nodes, tmp_path / "driver.log")


def run_and_lose_a_node(scene: Scene, nodes: Any, log: Path, replacement_cpus: int | None = None) -> None:
    """The driver ends as if nothing had been."""
    scene.forget()
    driver = faults.start([scene.stage], [*scene.overrides, f"ray.address={nodes.address}"], log)
    try:
        (node,) = nodes.worker_nodes
        faults.wait_for(
            lambda: scene.progress() and faults.workers(faults.raylet(node), scene.task),
            driver,
            log,
            f"{scene.task} at work",
        )
        nodes.remove_node(node, allow_graceful=False)
        assert 0 < scene.progress() < scene.most, "the node was lost too late"
        if replacement_cpus is not None:
            nodes.add_node(num_cpus=replacement_cpus, wait=False)
        assert driver.wait(240) == 0, faults.tail(log)
    finally:
        faults.kill_driver(driver)
    scene.assert_same()
