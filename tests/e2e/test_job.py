"""The whole pipeline as a submitted job: real job server, token authentication, every engine."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from head_node import BIN, head_node

from mmedpo_ray.tables import schemas, stage_runner

RAY = str(BIN / "ray")
REDUCED = [
    "data.phantom.images=16",
    "data.phantom.test_images=6",
    "align.max_steps=3",
    "align.images_per_step=4",
    "align.checkpoint_every=2",
    "evaluate.bootstrap=200",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of a client of a job server that wants a token."""
    with head_node() as client:
        # A job finds its own cluster.
        yield {key: value for key, value in client.items() if key != "RAY_ADDRESS"}


def submit(client: dict[str, str], repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    deadline = time.monotonic() + 120
    while True:
        result = subprocess.run(
            [RAY, "job", "submit", "--working-dir", ".", "--", "python", *arguments],
            env=client, cwd=repository, capture_output=True, text=True, timeout=580, check=False,
        )  # fmt: skip
        # The job server listens before the node's agent, which starts the jobs, has reported to it.
        if "No available agent" not in result.stderr + result.stdout or time.monotonic() > deadline:
            return result
        time.sleep(3)


@pytest.mark.engine
def test_the_job_server_wants_the_token(cluster: dict[str, str], repository: Path) -> None:
    stranger = {key: value for key, value in cluster.items() if key != "RAY_AUTH_TOKEN_PATH"} | {
        "RAY_AUTH_TOKEN": "0" * 64
    }
    result = submit(stranger, repository, "jobs/pipeline.py", "--help")
    assert result.returncode != 0
    assert re.search(r"401|403|[Uu]nauth|token", result.stdout + result.stderr)


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_the_whole_pipeline_as_a_job(cluster: dict[str, str], repository: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = submit(
        cluster,
        repository,
        "jobs/pipeline.py",
        "--config",
        "configs/phantom.yaml",
        f"run.folder={run}",
        *REDUCED,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]

    samples = stage_runner.read_table(str(run / "samples"), schemas.SAMPLES, "samples")
    pairs = stage_runner.read_table(str(run / "pairs"), schemas.PAIRS, "pairs")
    scored = stage_runner.read_table(str(run / "scored"), schemas.SCORED, "scored")
    assert set(samples["split"].to_pylist()) == {"train", "test"}
    assert set(pairs["kind"].to_pylist()) == {"text", "visual"}
    assert scored["pair_id"].to_pylist() == pairs["pair_id"].to_pylist()
    for folder in ("samples", "candidates", "pairs", "scored", "prepared", "evaluate"):
        manifest = stage_runner.read_manifest(str(run / folder))
        assert manifest is not None, folder
        assert manifest.rows_in == manifest.rows_out + sum(manifest.dropped.values()), folder

    for root in (run, run / "control"):
        assert (root / "model/adapter/adapter_model.safetensors").is_file()
        assert (root / "model/merged/config.json").is_file()
        steps = [json.loads(line) for line in (root / "align/metrics.jsonl").read_text().splitlines()]
        assert [step["step"] for step in steps] == [1, 2, 3]

    summary = json.loads((run / "evaluate/summary.json").read_text())
    assert set(summary["models"]) == {"base", "aligned", "sft_control"}
    for figures in (*summary["models"].values(), summary["difference"]):
        for metric in ("closed_accuracy", "open_f1", "report_rouge_l"):
            assert figures[metric]["low"] <= figures[metric]["value"] <= figures[metric]["high"]
            assert figures[metric]["n"] > 0
    report = (run / "report.html").read_text()
    assert not re.search(r"""src\s*=\s*["']?https?:|url\(\s*["']?https?:|<script|<link|@import""", report), (
        "self-contained"
    )
    assert f"{run}/report.html" in result.stdout + result.stderr
