"""The real endpoint (Ray Serve, vLLM) and an evaluation through it, with a tiny model and an adapter."""

from __future__ import annotations

import base64
import io
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import served_requests
from PIL import Image
from test_export import QUESTIONS, image, train_nothing, transformers_tokens
from tiny_llava import build_tiny_llava, leave_the_beginning_to_the_tokenizer

from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import UserError
from mmedpo_ray.evaluate.stage import evaluate, summary_table
from mmedpo_ray.export.stage import export
from mmedpo_ray.io import storage
from mmedpo_ray.serve.endpoint import start_endpoint
from mmedpo_ray.serve.models import run_models, served_models
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import StageRunner, read_manifest, read_table

NUM_IMAGES = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """A run with samples (one image damaged) and an exported adapter."""
    root = tmp_path_factory.mktemp("serve")
    base = build_tiny_llava(root / "base", 0)
    leave_the_beginning_to_the_tokenizer(base)
    config = make_config(root, base)
    write_samples(config, root)
    train_nothing(config, base)
    export(config)
    return config


def make_config(root: Path, base: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"folder": str(root / "run")},
            "model": {"path": str(base), "engine": {"kv_cache_gib": 0.25, "max_model_len": 256}},
            "serve": {"port": 0, "start_timeout_s": 240, "body_timeout_s": 5},
            "evaluate": {"max_tokens": 4, "bootstrap": 100, "retries": 1},
        }
    )


def write_samples(config: Config, root: Path) -> None:
    """Three questions to each of four images: one for training, and one of those for testing damaged."""
    rows = []
    for number in range(NUM_IMAGES):
        path = root / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        for kind, question, answer in (
            ("closed", "Is there a nodule?", "No"),
            ("open", "Where is it?", "left lung"),
            ("report", "Describe it.", "There is a left nodule."),
        ):
            rows.append(
                {
                    "sample_id": f"{number}-{kind}",
                    "image_id": f"image{number}",
                    "dataset": "test",
                    "split": "test" if number else "train",
                    "task": "report" if kind == "report" else "vqa",
                    "answer_type": kind,
                    "image_uri": str(path),
                    "image_sha256": "0",
                    "question": question,
                    "answer": answer,
                }
            )
    (root / "3.png").write_bytes(b"\x89PNG damaged")
    stage = StageRunner("ingest", RunFolder(config.run.folder).samples, config)
    stage.write_rows(
        lambda _: stage.write_part(rows, schemas.SAMPLES, "sample_id"),
        schema=schemas.SAMPLES,
        id_column="sample_id",
    )


def with_port(config: Config, port: int) -> Config:
    changed = config.model_copy(deep=True)
    changed.serve.port = port
    return changed


def test_a_port_in_use_is_named(config, ray_cluster):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"):
            start_endpoint(with_port(config, port), run_models(config))


def test_other_machines_are_let_in_with_keys_only(config, ray_cluster):
    changed = with_port(config, 0)
    changed.serve.host = "0.0.0.0"
    with pytest.raises(UserError, match=r"no API keys.*serve\.api_keys_file"):
        start_endpoint(changed, run_models(config))


@pytest.mark.parametrize("kind", ["absent", "empty", "adapter alone"])
def test_a_wrong_model_folder_is_named_before_anything_starts(config, tmp_path, kind):
    if kind == "adapter alone":
        models: dict[str, str | Path] = {"aligned": RunFolder(config.run.folder).model() / "adapter"}
    else:
        folder = tmp_path / kind
        if kind == "empty":
            folder.mkdir()
        models = {"base": folder}
    with pytest.raises(UserError, match=r"no model|no config\.json|base model"):
        start_endpoint(config, models)


def test_some_of_the_models_can_be_served(config):
    changed = config.model_copy(deep=True)
    assert list(served_models(changed)) == ["base", "aligned"]
    changed.serve.models = ("aligned",)
    assert list(served_models(changed)) == ["base", "aligned"], "an adapter needs its base"
    changed.serve.models = ("base",)
    assert list(served_models(changed)) == ["base"]
    changed.serve.models = ("sft_control",)
    with pytest.raises(UserError, match=r"'sft_control'; .* has base, aligned"):
        served_models(changed)


@pytest.fixture(scope="module")
def endpoint(config, ray_cluster) -> Iterator:
    """Base and adapter, served."""
    with start_endpoint(config, run_models(config)) as endpoint:
        yield endpoint


test_what_the_engine_refuses = served_requests.test_what_the_engine_refuses_is_a_clients_error
test_what_the_engine_answers = served_requests.test_what_the_engine_answers
test_the_openai_client = served_requests.test_the_openai_client
test_the_model_sees_pictures_as_training_does = served_requests.test_the_model_sees_pictures_as_training_does
test_no_request_holds_up_the_others = served_requests.test_no_request_holds_up_the_others
test_half_sent_and_left_requests = served_requests.test_half_sent_and_left_requests_free_their_place


def post(endpoint, body: dict) -> tuple[int, dict | str]:
    request = urllib.request.Request(
        f"{endpoint.base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            text = response.read().decode()
            return response.status, json.loads(text) if not body.get("stream") else text
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.engine
def test_seeded_sampling_of_many_long_questions_does_not_end_the_engine(endpoint):
    """More prompt tokens at once than one step reads; on CPU a seeded request must not be cut there."""

    def ask(number: int) -> int:
        content = f"Question {number}: " + "is there a nodule " * 25
        body = {"model": "base", "max_tokens": 4, "temperature": 1.0, "seed": number}
        return post(endpoint, body | {"messages": [{"role": "user", "content": content}]})[0]

    with ThreadPoolExecutor(64) as pool:
        assert set(pool.map(ask, range(64))) == {200}


@pytest.mark.engine
def test_each_name_answers_with_its_own_weights(endpoint, config):
    """The same tokens as transformers gives for the base and the merged model, also if asked all at once.

    The base's template leaves the beginning token to the tokenizer.
    """
    buffer = io.BytesIO()
    image().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    folders = {"base": Path(config.model.path), "aligned": RunFolder(config.run.folder).model() / "merged"}
    expected = {
        (name, question): tokens
        for name, folder in folders.items()
        for question, tokens in zip(QUESTIONS, transformers_tokens(folder), strict=True)
    }

    def ask(key: tuple[str, str]) -> list[int]:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": key[1]}]
        body = {
            "model": key[0],
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 8,
            "temperature": 0,
            "return_token_ids": True,
        }
        status, answer = post(endpoint, body)
        assert status == 200
        assert answer["model"] == key[0]
        return answer["choices"][0]["token_ids"]

    for key, tokens in expected.items():
        assert ask(key) == tokens, key
    keys = list(expected) * 4
    with ThreadPoolExecutor(len(keys)) as pool:
        for key, tokens in zip(keys, pool.map(ask, keys), strict=True):
            assert tokens == expected[key], key


@pytest.mark.engine
def test_an_answer_can_be_streamed(endpoint):
    messages = [{"role": "user", "content": "Is there a nodule?"}]
    status, text = post(
        endpoint, {"model": "base", "messages": messages, "max_tokens": 4, "temperature": 0, "stream": True}
    )
    assert status == 200
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    streamed = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    _, whole = post(endpoint, {"model": "base", "messages": messages, "max_tokens": 4, "temperature": 0})
    assert streamed == whole["choices"][0]["message"]["content"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "unknown", "messages": [{"role": "user", "content": "Hello"}]}, 404),
        ({"model": "base"}, 400),
        ({"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": -1}, 400),
        ({"model": "base", "messages": [{"role": "user", "content": "word " * 500}]}, 400),
    ],
)
def test_a_bad_request_is_refused_with_a_reason(endpoint, body, status):
    found, answer = post(endpoint, body)
    assert found == status
    assert answer["error"]["message"]


@pytest.mark.engine
def test_no_foreign_web_page_is_let_in(endpoint):
    request = urllib.request.Request(f"{endpoint.base_url}/models", headers={"Origin": "https://example.org"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 403
    with urllib.request.urlopen(f"{endpoint.base_url}/models", timeout=30) as response:
        assert [model["id"] for model in json.load(response)["data"]] == ["base", "aligned"]


@pytest.mark.engine
def test_evaluation_through_the_endpoint(endpoint, config):
    config = config.model_copy(deep=True)
    config.evaluate.endpoint = endpoint.base_url
    manifest = evaluate(config)
    run = RunFolder(config.run.folder)
    # 3 test images × 3 questions × 2 models; the damaged image's are dropped.
    assert (manifest.rows_in, manifest.rows_out, manifest.dropped) == (18, 12, {"image_undecodable": 6})
    answers = read_table(run.evaluate, schemas.ANSWERS, "answers").to_pylist()
    assert {row["model"] for row in answers} == {"base", "aligned"}
    summary = json.loads(storage.read_bytes(f"{run.evaluate}/summary.json"))
    assert set(summary["models"]) == {"base", "aligned"}
    for name in ("base", "aligned"):
        scores = summary["models"][name]
        # The damaged image's questions have no answer and count as wrong.
        assert scores["closed_accuracy"]["n"] == scores["open_f1"]["n"] == scores["report_rouge_l"]["n"] == 3
        assert (summary["counts"][name]["answers"], summary["counts"][name]["failed"]) == (9, 3)
        assert (
            0
            <= scores["report_bleu"]["low"]
            <= scores["report_bleu"]["value"]
            <= scores["report_bleu"]["high"]
            <= 1
        )
    difference = summary["difference"]["open_f1"]
    assert difference["value"] == pytest.approx(
        summary["models"]["aligned"]["open_f1"]["value"] - summary["models"]["base"]["open_f1"]["value"]
    )
    labels = [str(cell) for cell in summary_table(summary).columns[0].cells]
    assert {"closed accuracy", "report CIDEr (0–10)", "undecided, of closed", "failed requests"} <= set(
        labels
    )
    written = read_manifest(run.evaluate).finished_at
    config.evaluate.bootstrap = 200
    assert evaluate(config).finished_at == written  # answers are kept, only the intervals are computed again
    assert json.loads(storage.read_bytes(f"{run.evaluate}/summary.json"))["bootstrap"] == 200


@pytest.mark.engine
def test_an_interrupted_evaluation_asks_only_what_is_missing(endpoint, config, tmp_path):
    config = config.model_copy(deep=True)
    config.evaluate.endpoint, config.evaluate.temperature = (
        endpoint.base_url,
        0.5,
    )  # another key: answers are new
    from mmedpo_ray.evaluate import stage as module

    run = RunFolder(config.run.folder)
    stage, _ = module._stage(config, run)
    samples = module._test_samples(config, run)
    done = samples[0] | {"answer": "kept from before"}
    stage.done_ids("answer_id")
    reply = module.Reply(f"base/{done['sample_id']}", "kept", 0.0)
    row = module._row(module.Asked(model="base", sample=done), reply)
    stage.write_part([row], schemas.ANSWERS, "answer_id")
    manifest = evaluate(config)
    assert manifest.rows_in == 18
    answers = read_table(run.evaluate, schemas.ANSWERS, "answers").to_pylist()
    kept = [row for row in answers if row["reference"] == "kept from before"]
    assert [row["answer_id"] for row in kept] == [f"base/{done['sample_id']}"]


@pytest.mark.engine
def test_an_endpoint_without_the_model_is_refused(endpoint, config):
    config = config.model_copy(deep=True)
    config.evaluate.endpoint, config.evaluate.aligned_name = endpoint.base_url, "better"
    with pytest.raises(UserError, match="no model 'better'"):
        evaluate(config)


@pytest.mark.engine
def test_a_second_application_of_the_same_name_is_refused(endpoint, config):
    with pytest.raises(UserError, match="already served"):
        start_endpoint(config, run_models(config))


@pytest.mark.engine
def test_no_log_has_a_traceback_or_a_question(endpoint):
    served_requests.check_state_and_logs(endpoint)
