"""The align stage on a real Ray cluster: Ray Data for the reference, Ray Train and ZeRO-3 on two workers."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import urllib.request
from pathlib import Path

import faults
import pyarrow.parquet as pq
import pytest
import torch
from align_world import align_settings, write_scored
from PIL import Image
from tiny_llava import build_tiny_llava

from mmedpo_ray.align.metrics import read_metrics
from mmedpo_ray.align.stage import align
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas, stage_runner
from mmedpo_ray.tables.run_folder import RunFolder

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("align")
    write_scored(folder, **{"s000-0:text": {"weight": 0.0}, "s001-2:text": {"question": "Why? " * 200}})
    trackers = ("tensorboard", "mlflow", "wandb")
    settings = align_settings(epochs=6, max_steps=12, num_workers=2, trackers=trackers)
    config = Config(align=settings)
    config.run.folder = str(folder)
    config.model.path = str(build_tiny_llava(folder / "llava"))
    return config


def _kill_a_worker(folder: Path, killed: list[int]) -> None:
    """Kills one training worker of this test's own cluster once the first checkpoint is there."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if list((folder / "checkpoints").glob("step-*")):
            for process in faults.workers(os.getpid(), "RayTrainWorker"):
                killed.append(process.pid)
                process.kill()
                return
        time.sleep(0.02)


@pytest.mark.timeout(500)
def test_align_survives_a_killed_worker(
    config: Config, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunFolder(config.run.folder)
    killed: list[int] = []
    killer = threading.Thread(target=_kill_a_worker, args=(run.align(), killed), daemon=True)
    killer.start()
    manifest = align(config, "aligned")
    killer.join(timeout=5)
    assert killed, "no worker was killed, so nothing was recovered from"
    assert (manifest.rows_in, manifest.rows_out) == (24, 22)
    assert manifest.dropped == {"weight_zero": 1, "prompt_too_long": 1}
    prepared = stage_runner.read_table(run.prepared, schemas.PREPARED, "prepared")
    assert prepared.num_rows == 22 == len(prepared["ref_chosen_logp"].drop_null())
    assert prepared["image_id"].to_pylist() == sorted(prepared["image_id"].to_pylist())
    dropped = pq.read_table(f"{run.prepared}/dropped").select(["pair_id", "drop_reason"]).to_pylist()
    assert {row["pair_id"]: row["drop_reason"] for row in dropped} == {
        "s000-0:text": "weight_zero",
        "s001-2:text": "prompt_too_long",
    }
    rows = read_metrics(run.align())
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[0]["reward_margin"] == pytest.approx(0.0, abs=1e-3), "policy and reference begin as one model"
    assert rows[-1]["loss"] < rows[0]["loss"]
    _check_adapter(config, run.align() / "adapter")
    _check_trackers(run.align())
    assert align(config, "aligned").finished_at == manifest.finished_at, "a finished stage is skipped"


def _check_trackers(folder: Path) -> None:
    """Both launches of the workers are one run in each tracker, written by rank 0 alone."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
        steps = database.execute("select distinct step from metrics where key = 'align/loss'").fetchall()
    assert sorted(steps) == [(step,) for step in range(1, 13)]
    assert len({path.name for path in folder.glob("wandb/offline-run-*/*.wandb")}) == 1
    assert list((folder / "tensorboard").iterdir())


def test_workers_ask_no_other_cluster_whether_a_controller_lives(ray_cluster: None) -> None:
    """The dashboard of another cluster would not know it, and Ray Train would end the training."""
    import ray
    from ray.dashboard.utils import get_address_for_submission_client

    asked = ray.get(ray.remote(get_address_for_submission_client).remote(None))
    with pytest.raises(OSError, match="refused"), urllib.request.urlopen(asked, timeout=10):
        pass


def test_a_cluster_without_room_is_refused_at_once(config: Config, ray_cluster: None) -> None:
    """Ray would wait for ever. What is there already stays."""
    changed = {"max_steps": 13, "num_workers": (90, 100)}
    larger = config.model_copy(update={"align": config.align.model_copy(update=changed)})
    with pytest.raises(UserError, match=r"at least 90 ranks of 1 CPU each .* hold \d+\. Lower"):
        align(larger, "aligned")
    assert (RunFolder(config.run.folder).align() / "adapter").is_dir()


def _terminate_a_worker(folder: Path, seen: list[str]) -> None:
    """Sends SIGTERM to one training worker in the middle of the run; notes the checkpoint that follows."""
    deadline = time.monotonic() + 240
    told = False
    while time.monotonic() < deadline and not seen:
        if not told and len(read_metrics(folder)) >= 2:
            for process in faults.workers(os.getpid(), "RayTrainWorker")[:1]:
                process.terminate()
                told = True
        seen += [path.name for path in (folder / "checkpoints").glob("step-*")]
        time.sleep(0.01)


@pytest.mark.timeout(500)
def test_a_worker_that_is_told_to_stop_saves_first(config: Config, ray_cluster: None) -> None:
    """Nothing but SIGTERM makes a checkpoint here, and the run goes on from it."""
    changed = {"max_steps": 400, "epochs": 200, "checkpoint_every": 1000, "strategy": "ddp", "trackers": ()}
    config = config.model_copy(update={"align": config.align.model_copy(update=changed)})
    folder = RunFolder(config.run.folder).align("control")
    seen: list[str] = []
    watcher = threading.Thread(target=_terminate_a_worker, args=(folder, seen), daemon=True)
    watcher.start()
    align(config, "control")
    watcher.join(timeout=5)
    assert seen and 2 <= int(seen[0].removeprefix("step-")) < 400
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, 401))


def _check_adapter(config: Config, folder: Path) -> None:
    """The adapter loads in peft, touches the language model alone and changes what the model says."""
    from peft import PeftModel

    writer = PromptWriter(load_processor(config.model.path))
    model = load_model(config.model.path, torch.float32)
    prompt = writer.prompt("Is there a nodule?")
    inputs = {
        "input_ids": torch.tensor([prompt]),
        **writer.pixels([Image.new("RGB", (32, 32))]),
    }
    with torch.no_grad():
        before = model(**inputs).logits[0, -1]
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
        after = adapted(**inputs).logits[0, -1]
    assert not torch.allclose(before, after, atol=1e-3)
    changed = [name for name, _ in adapted.named_modules() if name.endswith("lora_A")]
    assert changed and all("language_model" in name for name in changed)
