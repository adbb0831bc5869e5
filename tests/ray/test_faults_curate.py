"""kill -9 of a worker and of the driver while images are noised and while an endpoint is asked: the tables, and the files that
they name, are those of a quiet run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import MODEL, ChatServer, Reply, running
from faults import disturbed, files_of

from mmedpo_ray.config import Config, load
from mmedpo_ray.curate.curate import curate
from mmedpo_ray.data.ingest import ingest
from mmedpo_ray.stage import read_manifest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

IMAGES = 96


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: None) -> None:
    pass


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
    names = ("pairs", "visual", "noised")
    quiet = files_of(run, *names)
    assert len([name for name in quiet if name.startswith("noised")]) == planned
    for name in names:
        shutil.rmtree(run / name)

    def noised() -> int:
        return sum(1 for path in (run / "noised").glob("*.png")) if (run / "noised").exists() else 0

    disturbed("curate", overrides, log, "VisualPairs", noised, planned)
    assert not (run / "visual" / "manifest.json").exists()
    # Whether a task is killed in the midst of a file is a matter of luck.
    (run / "noised" / "a.png.0123.tmp").write_bytes(b"half")
    curate(config)
    assert files_of(run, *names) == quiet


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
    names = ("pairs", "rewrites")
    quiet, planned = files_of(run, *names), len(server.requests)
    for name in names:
        shutil.rmtree(run / name)

    server.requests.clear()
    disturbed("curate", overrides, log, "AskEndpoint", lambda: len(server.requests), planned)
    asked = len(server.requests)
    assert curate(config).rows_out > 0
    assert files_of(run, *names) == quiet
    assert len(server.requests) - asked < planned, "what was written is not asked for again"
    manifest = read_manifest(str(run / "rewrites"))
    assert manifest is not None
    assert manifest.extra["endpoint"]["input_tokens"] >= manifest.rows_in * 100, "every answer was paid for"
