"""kill -9 of a worker and of the driver while images are noised and while an endpoint is asked: the tables,
and the files that they name, are those of a quiet run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chat_server import MODEL, ChatServer, Reply, running
from faults import disturbed, files_of

from mmedpo_ray.config.load import load
from mmedpo_ray.curate.stage import curate
from mmedpo_ray.ingest.stage import ingest
from mmedpo_ray.stages.registry import stages
from mmedpo_ray.tables.stage_runner import read_manifest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

IMAGES = 96


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: None) -> None:
    pass


def test_killed_while_images_are_noised(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "driver.log"
    overrides = [
        f"run.folder={run}", f"data.phantom.images={IMAGES}", "data.phantom.test_images=1",
        "ray.rows_per_part=16",
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
        return sum(1 for path in (run / "noised").glob("*/*.png")) if (run / "noised").exists() else 0

    disturbed("curate", overrides, log, "VisualPairs", noised, planned)
    assert not (run / "visual" / "manifest.json").exists()
    # Whether a task is killed in the midst of a file is a matter of luck.
    (next((run / "noised").iterdir()) / "a.png.0123.tmp").write_bytes(b"half")
    curate(config)
    assert files_of(run, *names) == quiet


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with running() as state:
        yield state


def asked_about(body: dict[str, Any]) -> dict[str, Any]:
    """The record that a request puts before the model."""
    (line,) = [line for line in body["messages"][0]["content"].splitlines() if line.startswith("{")]
    return json.loads(line)


def rewrite(body: dict[str, Any]) -> dict[str, Any]:
    reference = asked_about(body)["reference_answer"]
    wrong = f"No {reference}"
    return {"original_span": reference, "new_span": wrong, "changed": "negation", "rewritten": wrong}


def choose(body: dict[str, Any]) -> dict[str, Any]:
    """The longest candidate, or none where the shortest is the reference."""
    record = asked_about(body)
    answers = sorted(record["answers"], key=lambda number: (len(record["answers"][number]), number))
    is_right = record["answers"][answers[0]] == record["reference_answer"]
    return {"choice": "none" if is_right else answers[-1]}


def judge(body: dict[str, Any]) -> dict[str, Any]:
    return {"rationale": "because", "score": f"{len(asked_about(body)['dispreferred_answer']) % 10 / 10:g}"}


@dataclass(frozen=True)
class Asking:
    """A stage that asks an endpoint about row after row.

    Attributes:
        answer: what the model behind the endpoint says.
        stage: which asks.
        task: in the title of the process that asks.
        settings: of the run; ``{endpoint}`` stands for the endpoint's.
        folders: that the stage writes.
        parts: pattern of the files that come one by one.
        usage: where a manifest counts the tokens: a folder, and keys of what it tells.
    """

    answer: Callable[[dict[str, Any]], dict[str, Any]]
    stage: str
    task: str
    settings: tuple[str, ...]
    folders: tuple[str, ...]
    parts: str
    usage: tuple[str, ...]


ASKING = {
    "rewrites": Asking(
        rewrite,
        "curate",
        "AskEndpoint",
        ("data.phantom.images=24", "curate.text.method=rewrite", "curate.text.endpoint={endpoint}"),
        ("pairs", "rewrites"),
        "rewrites/.parts/*.parquet",
        ("rewrites", "endpoint"),
    ),
    "choices": Asking(
        choose,
        "curate",
        "AskEndpoint",
        (
            "data.phantom.images=24", "curate.text.method=on_policy", "curate.text.judge=endpoint",
            "curate.text.endpoint={endpoint}", "model.engine.max_model_len=256",
            "model.engine.kv_cache_gib=0.25",
        ),
        ("pairs", "choices"),
        "choices/.parts/*.parquet",
        ("choices", "endpoint"),
    ),
    "judgements": Asking(
        judge,
        "score",
        "HoldPass",
        (
            "data.phantom.images=24", "curate.text.method=rule_edit", "score.max_rounds=1",
            'score.agents=[{"kind": "rules"}, {"kind": "openai", "name": "remote", "endpoint": {endpoint}}]',
        ),
        ("scored",),
        "scored/.debate/*-remote/.parts/*.parquet",
        ("scored", "debate", "usage", "remote"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKING)
def test_killed_while_an_endpoint_is_asked(name: str, tmp_path: Path, server: ChatServer) -> None:
    asking, run, log = ASKING[name], tmp_path / "run", tmp_path / "driver.log"
    endpoint = json.dumps({"base_url": server.url, "model": MODEL, "concurrency": 2})
    overrides = [
        f"run.folder={run}", "data.phantom.test_images=1", "run.max_dropped_share=1.0", "ray.rows_per_part=2",
        "curate.visual.tool=none", *(setting.replace("{endpoint}", endpoint) for setting in asking.settings),
    ]  # fmt: skip
    server.answer = lambda body, before: Reply(json.dumps(asking.answer(body)), delay=0.05)
    config = load(None, overrides)
    for stage in ("ingest", "curate", "score")[: 2 + (asking.stage == "score")]:
        stages()[stage].run(config)
    quiet, planned = files_of(run, *asking.folders), len(server.requests)
    for folder in asking.folders:
        shutil.rmtree(run / folder)

    def written() -> int:
        """Rows that a crash does not cost."""
        with suppress(FileNotFoundError):
            return sum(pq.read_metadata(path).num_rows for path in run.glob(asking.parts))
        return 0

    server.requests.clear()
    disturbed(asking.stage, overrides, log, asking.task, written, planned)
    asked = len(server.requests)
    stages()[asking.stage].run(config)
    assert files_of(run, *asking.folders) == quiet
    assert len(server.requests) - asked < planned, "what was written is not asked for again"
    folder, *keys = asking.usage
    manifest = read_manifest(str(run / folder))
    assert manifest is not None
    counted: Any = manifest.extra
    for key in keys:
        counted = counted[key]
    assert counted["input_tokens"] >= planned * 100, "every answer was paid for"
