"""The endpoint's client against a small HTTP server that misbehaves in the ways endpoints do."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedpo_ray.errors import UserError
from mmedpo_ray.evaluate.client import Question, QuestionClient, image_data_url
from mmedpo_ray.evaluate.settings import EvaluateConfig
from mmedpo_ray.io.images import ImageError


class Handler(BaseHTTPRequestHandler):
    """Answers with the question's own words; the question says how to misbehave."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._send(
            200, {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "t"}]}
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"][1]["text"]
        server = self.server
        with server.lock:
            server.seen[text] = server.seen.get(text, 0) + 1
            attempt = server.seen[text]
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            time.sleep(0.02)
            if text == "slow":
                time.sleep(1.0)
            if text == "bad" or (text == "busy" and attempt < 3):
                code = 400 if text == "bad" else 503
                self._send(code, {"error": {"message": f"secret {text}", "type": "bad_input", "code": code}})
                return
            message = {"role": "assistant", "content": f"  {text}!  "}
            choices = [] if text == "nothing" else [{"index": 0, "finish_reason": "stop", "message": message}]
            self._send(
                200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
            )
        finally:
            with server.lock:
                server.running -= 1

    def _send(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.seen, server.running, server.most = threading.Lock(), {}, 0, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    return str(path)


def ask(server, texts, image, **settings):
    client = QuestionClient(f"http://127.0.0.1:{server.server_port}/v1", EvaluateConfig(**settings))
    questions = [Question(f"{index}", "m", image, text) for index, text in enumerate(texts)]

    async def collect():
        return [reply async for reply in client.ask(questions)]

    return {reply.answer_id: reply for reply in asyncio.run(collect())}


def test_every_question_is_answered_once_and_not_too_many_at_a_time(server, image):
    texts = [f"q{index}" for index in range(40)]
    replies = ask(server, texts, image, concurrency=4)
    assert [replies[str(index)].text for index in range(40)] == [f"{text}!" for text in texts]
    assert set(server.seen.values()) == {1}
    assert 2 <= server.most <= 4


def test_a_failure_costs_its_own_row_only_and_says_nothing_of_the_question(server, image, tmp_path):
    replies = ask(server, ["fine", "bad", "nothing", "slow"], image, timeout_s=0.4, retries=0)
    assert replies["0"].text == "fine!"
    assert [replies[key].reason for key in "123"] == ["http_400", "empty_response", "request_timeout"]
    assert all(replies[key].text is None for key in "123")
    assert "secret" not in str(replies)


def test_what_can_succeed_later_is_repeated(server, image):
    assert ask(server, ["busy"], image, retries=3)["0"].text == "busy!"
    assert server.seen["busy"] == 3
    assert ask(server, ["bad"], image, retries=3)["0"].reason == "http_400"
    assert server.seen["bad"] == 1


def test_a_missing_or_damaged_image_is_a_reason(server, image, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    client = QuestionClient(f"http://127.0.0.1:{server.server_port}/v1", EvaluateConfig())
    questions = [
        Question("missing", "m", str(tmp_path / "absent.png"), "a"),
        Question("broken", "m", str(tmp_path / "broken.png"), "b"),
        Question("good", "m", image, "c"),
    ]

    async def collect():
        return {reply.answer_id: reply async for reply in client.ask(questions)}

    replies = asyncio.run(collect())
    assert replies["missing"].reason == "image_missing"
    assert replies["broken"].reason == "image_undecodable"
    assert replies["good"].text == "c!"


def test_an_endpoint_that_is_not_there_is_named():
    client = QuestionClient("http://127.0.0.1:9/v1", EvaluateConfig(retries=0))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        client.model_names()


def test_models_are_listed(server):
    assert QuestionClient(f"http://127.0.0.1:{server.server_port}/v1", EvaluateConfig()).model_names() == [
        "m"
    ]


def decoded(url: str) -> tuple[str, Image.Image]:
    head, _, data = url.partition(",")
    return head, Image.open(io.BytesIO(base64.b64decode(data)))


def test_plain_files_travel_as_they_are(image):
    head, _ = decoded(image_data_url(image))
    assert head == "data:image/png;base64"
    assert base64.b64decode(image_data_url(image).partition(",")[2]) == Path(image).read_bytes()


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P"])
def test_unusual_files_become_what_training_sees(tmp_path, mode):
    from mmedpo_ray.io.images import load_rgb

    path = tmp_path / "image.png"
    if mode == "I;16":
        Image.fromarray((np.arange(64).reshape(8, 8) * 500).astype(np.uint16)).save(path)
    else:
        pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 4), dtype=np.uint8)
        rgba = Image.fromarray(pixels)
        (rgba if mode == "RGBA" else rgba.convert("RGB").convert("P")).save(path)
    _, image = decoded(image_data_url(str(path)))
    assert image.mode == ("L" if mode == "I;16" else "RGB"), "a grey picture stays grey, which is smaller"
    assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(load_rgb(str(path))))


def test_rotated_photographs_are_read_as_in_training(tmp_path):
    from mmedpo_ray.io.images import load_rgb

    path = tmp_path / "image.jpg"
    image = Image.fromarray(np.arange(128, dtype=np.uint8).reshape(8, 16))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    head, sent = decoded(image_data_url(str(path)))
    assert head == "data:image/png;base64"
    assert sent.size == (8, 16)
    assert sent.getexif().get(0x0112, 1) == 1
    assert np.array_equal(np.asarray(sent.convert("RGB")), np.asarray(load_rgb(str(path))))


def test_too_large_an_image_is_refused(image):
    with pytest.raises(ImageError, match="image_too_large"):
        image_data_url(image, max_pixels=10)
