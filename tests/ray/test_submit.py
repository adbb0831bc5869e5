"""`mmedpo submit` with a real job server that wants a token."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from head_node import BIN, head_node

from mmedpo_ray.commands.submit import job_name

SMALL = ["data.phantom.images=8", "data.phantom.test_images=4"]
pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def client() -> Iterator[dict[str, str]]:
    with head_node() as variables:
        yield {key: value for key, value in variables.items() if key != "RAY_ADDRESS"}


def command(*words: str) -> list[str]:
    return [str(BIN / "mmedpo"), "submit", *words]


def submit(client: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words), env=client, capture_output=True, text=True, timeout=200, check=False
    )


def jobs(client: dict[str, str]) -> dict[str, str]:
    """Submission id → status."""
    code = (
        "import json, ray.job_submission as r; "
        "print(json.dumps({j.submission_id: j.status.value for j in r.JobSubmissionClient().list_jobs()}))"
    )
    done = subprocess.run(
        [BIN / "python", "-c", code], env=client, capture_output=True, text=True, timeout=60, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_stage_is_followed_and_submitted_again(
    client: dict[str, str], repository: Path, tmp_path: Path
) -> None:
    words = ["ingest", "--config", str(repository / "configs/phantom.yaml"), f"run.folder={tmp_path / 'run'}"]
    first = submit(client, *words, *SMALL)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (tmp_path / "run" / "samples").is_dir()
    again = submit(client, *words, *SMALL)
    assert again.returncode == 0 and "already done" in again.stdout
    name = job_name(str(tmp_path / "run"))
    found = jobs(client)
    assert {found[f"{name}-1"], found[f"{name}-2"]} == {"SUCCEEDED"}


def test_a_failed_job_fails_the_command(client: dict[str, str], tmp_path: Path) -> None:
    done = submit(client, "curate", f"run.folder={tmp_path / 'none'}")
    assert done.returncode == 1
    assert jobs(client)[f"{job_name(str(tmp_path / 'none'))}-1"] == "FAILED"


def test_ctrl_c_stops_the_job(client: dict[str, str], repository: Path, tmp_path: Path) -> None:
    config, folder = repository / "configs/phantom.yaml", tmp_path / "stopped"
    process = subprocess.Popen(
        command("--config", str(config), f"run.folder={folder}"),
        env=client, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "samples").is_dir() and time.monotonic() < deadline:
        time.sleep(0.2)
    other = submit(client, "ingest", f"run.folder={folder}")
    assert other.returncode == 2 and f"{job_name(str(folder))}-1" in other.stderr + other.stdout
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert jobs(client)[f"{job_name(str(folder))}-1"] == "STOPPED"


def test_errors_are_found_before_anything_is_sent(client: dict[str, str], tmp_path: Path) -> None:
    wrong = submit(client, f"run.folder={tmp_path}", "align.betta=1")
    assert wrong.returncode == 2 and "align.betta" in wrong.stderr + wrong.stdout
    nobody = submit(client, "--address", "http://127.0.0.1:9", f"run.folder={tmp_path}")
    assert nobody.returncode != 0 and "--address" in nobody.stderr + nobody.stdout
