"""Requests that bring no answer: scored as wrong, counted, and asked again where that can help."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_server
import pytest
from chat_server import ChatServer, Reply

from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import DroppedShareError, UserError
from mmedpo_ray.evaluate.stage import evaluate
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import StageRunner

COUNT = 10
MODELS = ("base", "aligned")


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server.running() as state:
        state.models = MODELS
        yield state


def make(
    root: Path, server: ChatServer, *, dropped_share: float = 0.9, reference: str = "Yes", images: int = 1
) -> Config:
    from PIL import Image

    config = Config.model_validate(
        {
            "run": {"folder": str(root / "run"), "max_dropped_share": dropped_share},
            "model": {"path": str(root)},
            # The server takes five connections at a time.
            "evaluate": {"endpoint": server.url, "bootstrap": 100, "retries": 0, "concurrency": 4},
        }
    )
    for number in range(images):
        Image.new("L", (8, 8), number).save(root / f"{number}.png")
    rows = [
        {
            "sample_id": f"s{number}",
            "image_id": f"i{number}",
            "dataset": "test",
            "split": "test",
            "task": "vqa",
            "answer_type": "closed",
            "image_uri": str(root / f"{number % images}.png"),
            "image_sha256": str(number % images),
            "question": f"Is there nodule {number}?",
            "answer": reference,
        }
        for number in range(COUNT)
    ]
    stage = StageRunner("ingest", RunFolder(config.run.folder).samples, config)
    stage.write_rows(
        lambda _: stage.write_part(rows, schemas.SAMPLES, "sample_id"),
        schema=schemas.SAMPLES,
        id_column="sample_id",
    )
    return config


def question(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][1]["text"]


def summary_of(config: Config) -> dict[str, Any]:
    return json.loads(storage.read_bytes(storage.join(RunFolder(config.run.folder).evaluate, "summary.json")))


@pytest.mark.engine
def test_a_request_without_an_answer_stays_in_the_denominator(
    tmp_path: Path, server: ChatServer, ray_cluster: None
) -> None:
    said = {"Is there nodule 1?": "", "Is there nodule 2?": ".", "Is there nodule 3?": "Hard to say."}

    def answer(body: dict[str, Any], before: int) -> Reply:
        if question(body) == "Is there nodule 0?":
            return Reply(status=400)
        return Reply(said.get(question(body), "Yes"))

    server.answer = answer
    config = make(tmp_path, server)
    manifest = evaluate(config)
    assert (manifest.rows_in, manifest.rows_out, manifest.dropped) == (
        2 * COUNT,
        2 * COUNT - 2,
        {"http_400": 2},
    )
    summary = summary_of(config)
    assert summary["models"]["aligned"]["closed_accuracy"]["n"] == COUNT
    assert summary["models"]["aligned"]["closed_accuracy"]["value"] == pytest.approx(0.6)
    assert summary["counts"]["aligned"] == {
        "answers": COUNT,
        "failed": 1,
        "empty": 2,
        "closed": COUNT,
        "undecided": 1,
        "undecided_share": 0.1,
    }
    asked = len(server.requests)
    evaluate(config)
    assert len(server.requests) == asked, "a refused request stays refused"


@pytest.mark.engine
def test_requests_that_failed_in_passing_are_asked_again_and_only_these(
    tmp_path: Path, server: ChatServer, ray_cluster: None
) -> None:
    failing = {"Is there nodule 4?", "Is there nodule 7?"}
    server.answer = lambda body, before: Reply(status=503) if question(body) in failing else Reply("Yes")
    config = make(tmp_path, server)
    first = evaluate(config)
    assert first.dropped == {"http_503": 4}
    assert summary_of(config)["models"]["aligned"]["closed_accuracy"]["value"] == pytest.approx(0.8)
    server.answer = lambda body, before: Reply("Yes")
    asked = len(server.requests)
    second = evaluate(config)
    again = server.requests[asked:]
    assert {question(body) for body in again} == failing and len(again) == 4
    assert (second.rows_out, second.dropped) == (2 * COUNT, {})
    assert summary_of(config)["models"]["aligned"]["closed_accuracy"]["value"] == 1.0
    assert summary_of(config)["counts"]["aligned"]["failed"] == 0


@pytest.mark.engine
def test_an_endpoint_that_was_down_is_asked_again(
    tmp_path: Path, server: ChatServer, ray_cluster: None
) -> None:
    """Too many failures are no evaluation; what failed is not taken for done by the next call."""
    server.answer = lambda body, before: Reply(status=503)
    config = make(tmp_path, server, dropped_share=0.2)
    with pytest.raises(DroppedShareError):
        evaluate(config)
    server.answer = lambda body, before: Reply("Yes")
    assert evaluate(config).rows_out == 2 * COUNT


@pytest.mark.engine
def test_a_sample_in_another_script_is_refused_before_anything_is_asked(
    tmp_path: Path, server: ChatServer, ray_cluster: None
) -> None:
    config = make(tmp_path, server, reference="Плевральный выпот")
    with pytest.raises(UserError, match=r"sample s0: the reference answer is in Cyrillic"):
        evaluate(config)
    assert not server.requests


@pytest.mark.engine
def test_look_asks_again_about_other_images_and_leaves_the_scores_alone(
    tmp_path: Path, server: ChatServer, ray_cluster: None
) -> None:
    """A model that says no to what is all grey: blank images cost it everything, shuffled ones nothing."""
    from PIL import Image

    def answer(body: dict[str, Any], before: int) -> Reply:
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
        return Reply("No" if image.convert("L").getextrema() == (128, 128) else "Yes")

    server.answer = answer
    config = make(tmp_path, server, images=COUNT)
    plain = evaluate(config)
    scores = summary_of(config)
    assert "look" not in scores and plain.rows_out == 2 * COUNT
    config.evaluate.look = True
    assert evaluate(config).rows_out == 3 * 2 * COUNT
    summary = summary_of(config)
    assert summary["models"] == scores["models"] and summary["questions"] == COUNT
    figures = summary["look"]["models"]["aligned"]
    assert set(figures) == {"blank", "shuffled"}
    assert [figures[name]["all"]["survive"]["value"] for name in figures] == [0.0, 1.0]
    assert figures["blank"]["all"]["drop"]["value"] == 1.0
