"""Real VQA-RAD rows and images through every stage; killed on the way, resumed, and skipped when repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmedpo_ray.tables import schemas, stage_runner

MMEDPO = str(Path(sys.executable).parent / "mmedpo")


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_real_rows_through_every_stage(shared_data: Path, repository: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        MMEDPO, "run", "--config", "configs/vqa_rad_sample.yaml",
        f"data.root={shared_data / 'vqa_rad_sample'}",
        f"run.folder={run}", "align.max_steps=6", "align.checkpoint_every=2", "evaluate.max_tokens=16",
        "evaluate.bootstrap=200", "control.enabled=false",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    # The driver is killed after the first checkpoint of the training.
    victim = subprocess.Popen(
        command, cwd=repository, env=environment, stdout=(tmp_path / "first.log").open("w"),
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    metrics = run / "align" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
        assert victim.poll() is None, (tmp_path / "first.log").read_text()[-4000:]
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.1)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not (run / "model").exists()

    result = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    assert output.count("already done") >= 3, "finished stages must be skipped"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6], "resumed at the last checkpoint, each step once"

    samples = stage_runner.read_manifest(str(run / "samples"))
    assert samples is not None
    assert samples.rows_in == 162
    assert samples.rows_out + sum(samples.dropped.values()) == 162
    pairs = stage_runner.read_table(str(run / "pairs"), schemas.PAIRS, "pairs").to_pylist()
    scored = stage_runner.read_table(str(run / "scored"), schemas.SCORED, "scored").to_pylist()
    text = [row for row in scored if row["kind"] == "text"]
    assert text
    assert any(row["kind"] == "visual" for row in scored)
    assert all(row["score"] == row["source_score"] for row in text), "released scores are kept"
    assert all(Path(row["rejected_image_uri"]).is_file() for row in pairs)
    train_images = {row["image_id"] for row in pairs}
    answers = stage_runner.read_table(str(run / "evaluate"), schemas.ANSWERS, "answers").to_pylist()
    assert not train_images & {row["image_id"] for row in answers}, "no image in both splits"
    assert {row["model"] for row in answers} == {"base", "aligned"}
    assert (run / "report.html").stat().st_size > 10_000

    started = time.monotonic()
    again = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert again.returncode == 0
    assert time.monotonic() - started < 60
    assert (again.stdout + again.stderr).count("already done") >= 7
