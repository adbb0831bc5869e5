"""kill -9 of a rank, a node and the driver in the middle of training, and a cluster that grows and shrinks
under it.

Every run ends with the adapter of a run that nothing disturbed, to 1e-5. The cluster outlives the drivers.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
import psutil
import pytest
from align_compare import assert_same_training
from align_world import align_settings, write_scored
from tiny_llava import build_tiny_llava

from mmedpo_ray.align.checkpoint.checkpoint import checkpoint_folders
from mmedpo_ray.align.metrics import read_metrics
from mmedpo_ray.config.load import dump
from mmedpo_ray.config.tree import Config
from mmedpo_ray.io import storage
from mmedpo_ray.tables.run_folder import RunFolder

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 40

# Ranks wait after the step that a file beside the settings names: what takes a cluster its time then happens
# in the middle.
DRIVER = """
import sys
from pathlib import Path
from mmedpo_ray.compat import cluster
from mmedpo_ray.config import load as config
from mmedpo_ray import console
from mmedpo_ray.align import stage as trainer

barrier = Path(sys.argv[1]).with_name("barrier")
train = trainer._worker

def up_to_the_barrier(settings):
    import time
    from mmedpo_ray.align import loop

    log = loop.TrainingLoop._log

    def log_and_wait(self, step, *figures):
        log(self, step, *figures)
        while barrier.exists() and step + 1 >= int(barrier.read_text()) and not loop.stop_requested.is_set():
            time.sleep(0.05)

    loop.TrainingLoop._log = log_and_wait
    train(settings)

trainer._worker = up_to_the_barrier
console.configure(verbose=True)
settings = config.load(sys.argv[1])
cluster.start(settings.ray)
trainer.align(settings, "aligned")
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster whose head has room for one rank; drivers join it by its address."""
    with faults.cluster(1) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def one_node_again(nodes: Any) -> Iterator[None]:
    """What a test added goes with it, also where it failed."""
    yield
    for node in list(nodes.worker_nodes):
        nodes.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for a run to last."""
    return build_tiny_llava(tmp_path_factory.mktemp("model") / "llava", layers=12)


@dataclass
class Run:
    """A training run under a driver of its own.

    Attributes:
        folder: of the run.
        config: its settings.
        driver: the process that was started last.
    """

    folder: Path
    config: Config
    driver: subprocess.Popen | None = None

    @classmethod
    def of(cls, nodes: Any, model: Path, folder: Path, like: Path | None = None, **changes: Any) -> Run:
        """A run on the pairs that all runs of this module share; ``changes`` go to the settings of `align`.

        ``like`` is the folder of `align` of another run, whose prepared pairs it gets.
        """
        if like is None:
            write_scored(folder)
        else:
            for table in ("scored", "prepared"):
                shutil.copytree(like.parent / table, folder / table)
        values = {"epochs": 100, "max_steps": STEPS, "learning_rate": 1e-4, "checkpoint_every": 10} | changes
        config = Config(align=align_settings(**values))
        config.run.folder, config.model.path, config.ray.address = str(folder), str(model), nodes.address
        (folder / "settings.yaml").write_text(dump(config))
        return cls(folder, config)

    def start(self) -> None:
        """A driver that trains, or finishes what an earlier one began."""
        with self.log.open("a") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(self.folder / "settings.yaml")], stdout=log, stderr=log
            )

    def wait_after(self, step: int) -> None:
        """Lets the ranks wait after this step and each later one; beyond the last step: go on."""
        storage.write_bytes(self.folder / "barrier", str(step).encode())

    def finish(self) -> Path:
        """Waits for the driver; returns the folder of `align`."""
        assert self.driver is not None
        assert self.driver.wait() == 0, self.tail
        return self.align

    def kill(self) -> None:
        """The driver dies without a word."""
        assert self.driver is not None
        self.driver.kill()
        self.driver.wait()

    def wait_for(self, found: Callable[[], Any], what: str, seconds: float = 240) -> Any:
        """The first result that is not empty."""
        assert self.driver is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if result := found():
                return result
            assert self.driver.poll() is None, f"the driver ended before {what}: {self.tail}"
            time.sleep(0.05)
        pytest.fail(f"no {what}: {self.tail}")

    def rows(self, ranks: int | None = None) -> list[dict[str, Any]]:
        """The figures of the steps so far, of those on so many ranks."""
        return [row for row in read_metrics(self.align) if ranks in (None, row["ranks"])]

    @property
    def align(self) -> Path:
        return RunFolder(str(self.folder)).align()

    @property
    def log(self) -> Path:
        return self.folder / "driver.log"

    @property
    def tail(self) -> str:
        return self.log.read_text()[-4000:]


def ranks_on(node: Any) -> list[psutil.Process]:
    """Training processes on a node."""
    return faults.workers(faults.raylet(node), "RayTrainWorker")


@pytest.fixture(scope="module")
def quiet(nodes: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on one rank that nothing disturbs leaves."""
    run = Run.of(nodes, model, tmp_path_factory.mktemp("quiet"), num_workers=1)
    run.start()
    return run.finish()


def test_a_cluster_that_grows_and_shrinks(nodes: Any, model: Path, quiet: Path, tmp_path: Path) -> None:
    """One rank, then two when a node comes, then one when it goes."""
    run = Run.of(
        nodes, model, tmp_path, quiet, num_workers=(1, 2), resize_check_seconds=1, checkpoint_every=1000
    )
    run.wait_after(4)
    run.start()
    run.wait_for(lambda: len(run.rows(1)) >= 2, "step on one rank")
    assert not run.rows(2)
    node = nodes.add_node(num_cpus=1)
    run.wait_for(lambda: run.rows(2), "step on two ranks")
    (saved,) = checkpoint_folders(run.align)
    assert int(saved.name.removeprefix("step-")) == len(run.rows(1)), "nothing is repeated after a resize"
    run.wait_after(STEPS // 2)
    run.wait_for(lambda: len(run.rows(2)) >= 2, "step on two ranks")
    nodes.remove_node(node, allow_graceful=False)
    run.wait_after(STEPS + 1)
    run.wait_for(lambda: run.rows()[-1]["ranks"] == 1, "step on one rank again")
    assert_same_training(run.finish(), quiet, tolerance=1e-5)


def test_a_node_lost_in_the_middle(nodes: Any, model: Path, quiet: Path, tmp_path: Path) -> None:
    """Two ranks; the run waits for another node and goes on from the last checkpoint."""
    run = Run.of(nodes, model, tmp_path, quiet, num_workers=2)
    node = nodes.add_node(num_cpus=1)
    run.start()
    run.wait_for(lambda: len(run.rows(2)) >= 12, "step on two ranks")
    nodes.remove_node(node, allow_graceful=False)
    assert not (run.align / "adapter").exists(), "the node was lost too late"
    nodes.add_node(num_cpus=1)
    assert_same_training(run.finish(), quiet, tolerance=1e-5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told_to_stop"])
def test_one_of_two_sharded_ranks_ends(
    nodes: Any, model: Path, quiet: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """ZeRO-3: saving is a collective of both ranks, also when only one of them is told to stop."""
    every = 10 if how == signal.SIGKILL else 1000
    run = Run.of(nodes, model, tmp_path, quiet, num_workers=2, strategy="zero3", checkpoint_every=every)
    node = nodes.add_node(num_cpus=1)
    run.start()
    run.wait_for(lambda: len(run.rows(2)) >= 12, "step on two ranks")
    (rank,) = ranks_on(node)
    rank.send_signal(how)
    saved = run.wait_for(lambda: checkpoint_folders(run.align), "checkpoint")
    assert not (run.align / "adapter").exists(), "the rank was hit too late"
    if how == signal.SIGTERM:
        assert 12 <= int(saved[0].name.removeprefix("step-")) < STEPS
    assert_same_training(run.finish(), quiet, tolerance=1e-5)


def test_the_driver_killed_in_the_middle(nodes: Any, model: Path, quiet: Path, tmp_path: Path) -> None:
    """Another driver goes on at once, while Ray has not ended the ranks of the first."""
    run = Run.of(nodes, model, tmp_path, quiet, num_workers=1)
    for steps in (1, 12):
        run.start()
        run.wait_for(lambda steps=steps: len(run.rows()) >= steps, "step")
        orphans = ranks_on(nodes.head_node)
        run.kill()
        assert not (run.align / "adapter").exists(), "the driver was killed too late"
    assert orphans
    run.start()
    assert_same_training(run.finish(), quiet, tolerance=1e-6)
    assert not any(orphan.is_running() for orphan in orphans)
    assert "resuming from step-0000" in run.log.read_text()


def test_the_driver_told_to_stop(nodes: Any, model: Path, quiet: Path, tmp_path: Path) -> None:
    """Its ranks save after the step under way, and nothing is repeated: no other checkpoint is due here."""
    run = Run.of(nodes, model, tmp_path, quiet, num_workers=1, checkpoint_every=1000)
    run.start()
    run.wait_for(lambda: len(run.rows()) >= 12, "step")
    assert run.driver is not None
    run.driver.terminate()
    assert run.driver.wait(120) != 0
    assert "told to stop" in run.log.read_text() and "KeyboardInterrupt" in run.log.read_text()
    (saved,) = checkpoint_folders(run.align)
    assert not (run.align / "adapter").exists(), "it was told too late"
    assert int(saved.name.removeprefix("step-")) == len(run.rows())
    run.start()
    assert_same_training(run.finish(), quiet, tolerance=1e-6)
    assert [row["step"] for row in run.rows()] == list(range(1, STEPS + 1))


def test_the_driver_killed_while_the_reference_is_computed(
    nodes: Any, model: Path, quiet: Path, tmp_path: Path
) -> None:
    run = Run.of(nodes, model, tmp_path, num_workers=1)
    prepared = tmp_path / "prepared"
    run.start()
    run.wait_for(prepared.exists, "prepared pairs")
    run.kill()
    assert not (prepared / "manifest.json").exists(), "the driver was killed too late"
    run.start()
    assert_same_training(run.finish(), quiet, tolerance=1e-6)
