"""What only a real engine can answer for: tests that test_serve_evaluate.py runs against its endpoint."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
import ray
from dicom_files import RAMP, dataset_of, file_of
from PIL import Image

from mmedpo_ray.compat import cluster
from mmedpo_ray.io import images
from mmedpo_ray.serve.endpoint import Endpoint

QUESTION = [{"role": "user", "content": "Is there a nodule?"}]
# In no answer of the endpoint and in no log.
SECRET = "Mrs-Example-of-this-test"


def client(endpoint: Endpoint) -> openai.OpenAI:
    direct = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(
        base_url=endpoint.base_url, api_key="none", max_retries=0, timeout=60, http_client=direct
    )


def with_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "several answers at temperature 0": ({"n": 2, "temperature": 0}, "temperature"),
    "too long a prompt": ({"messages": [{"role": "user", "content": f"{SECRET} " * 200}]}, "length"),
    "too long a prompt, streamed": (
        {"messages": [{"role": "user", "content": f"{SECRET} " * 200}], "stream": True},
        "length",
    ),
    "too many tokens": ({"max_tokens": 4000}, "max_tokens"),
    "a type that is none": (with_schema({"type": SECRET}), ""),
    "a broken pattern": (with_schema({"type": "string", "pattern": "([a"}), ""),
    "a token that is none": ({"logit_bias": {"99999999": 1}}, ""),
    "a bias for no number": ({"logit_bias": {"x": 1}}, ""),
}


@pytest.mark.engine
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_refuses_is_a_clients_error(endpoint: Endpoint, name: str) -> None:
    fields, word = REFUSED[name]
    with client(endpoint) as api, pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(**{"model": "base", "messages": QUESTION, "max_tokens": 4} | fields)
    error = caught.value.body
    assert isinstance(error, dict) and error["type"] == "invalid_request_error"
    assert word in error["message"] and "Traceback" not in error["message"]


@pytest.mark.engine
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 1.0},
        {"logprobs": True, "top_logprobs": 20},
        {"messages": [{"role": "user", "content": "<image> <image> what is seen?"}]},
        {"messages": [{"role": "system", "content": "Be brief."}, *QUESTION]},
        {"stop": ["a"], "seed": 3, "user": "x", "metadata": None, "top_p": None},
        with_schema({"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}),
    ],
)
def test_what_the_engine_answers(endpoint: Endpoint, fields: dict[str, Any]) -> None:
    """Or refuses: never an error of the server's own."""
    with client(endpoint) as api:
        try:
            answer = api.chat.completions.create(**{"model": "base", "messages": QUESTION} | fields)
        except openai.BadRequestError as error:
            assert "<image>" in str(fields), error
        else:
            assert len(answer.choices) == fields.get("n", 1)


@pytest.mark.engine
def test_the_openai_client(endpoint: Endpoint) -> None:
    with client(endpoint) as api:
        assert [model.id for model in api.models.list()] == ["base", "aligned"]
        assert api.models.retrieve("aligned").id == "aligned"
        with pytest.raises(openai.NotFoundError) as caught:
            api.chat.completions.create(model="gpt-4o", messages=QUESTION)  # type: ignore[arg-type]
        assert caught.value.code == "model_not_found"
        whole = api.chat.completions.create(
            model="base",
            messages=QUESTION,
            max_tokens=4,
            temperature=0,  # type: ignore[arg-type]
        )
        # An answer's message can be sent back as it is.
        again = [*QUESTION, whole.choices[0].message.model_dump(), *QUESTION]
        assert api.chat.completions.create(model="base", messages=again, max_tokens=2).choices  # type: ignore
        events = list(
            api.chat.completions.create(
                model="base",
                messages=QUESTION,  # type: ignore[arg-type]
                max_tokens=4,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(each.choices[0].delta.content or "" for each in events if each.choices) == (
            whole.choices[0].message.content
        )
        assert events[-1].usage == whole.usage
        assert api.completions.create(model="base", prompt="There is", max_tokens=2).choices[0].text


def answer_to(endpoint: Endpoint, data: bytes, kind: str) -> list[tuple[str, float]]:
    """Tokens and their log-probabilities for a picture."""
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is seen?"}]
    with client(endpoint) as api:
        answer = api.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": content}],  # type: ignore
            max_tokens=4,
            temperature=0,
            logprobs=True,
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    return [(each.token, round(each.logprob, 4)) for each in logprobs.content]


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.engine
def test_the_model_sees_pictures_as_training_does(endpoint: Endpoint) -> None:
    deep = png_of(Image.fromarray((np.random.default_rng(0).integers(300, 4000, (32, 32))).astype(np.uint16)))
    files = {"image/png": deep, "application/dicom": file_of(dataset_of(RAMP, 12))}
    white = answer_to(endpoint, png_of(Image.new("RGB", (32, 32), "white")), "image/png")
    for kind, data in files.items():
        shown = png_of(images.to_rgb(images.decode(data, "it")))
        found = answer_to(endpoint, data, kind)
        assert found == answer_to(endpoint, shown, "image/png"), kind
        assert found != white, "the model looks at its image"


def read(endpoint: Endpoint, path: str) -> str:
    with urllib.request.urlopen(endpoint.base_url.removesuffix("/v1") + path, timeout=30) as response:
        return response.read().decode()


def in_flight(endpoint: Endpoint) -> float:
    lines = read(endpoint, "/metrics").splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("mmedpo_requests_in_flight "))


def raw_request(endpoint: Endpoint, length: int, body: bytes) -> socket.socket:
    address = urlsplit(endpoint.base_url)
    assert address.hostname and address.port
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    connection.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n".encode()
        + body
    )
    return connection


@pytest.mark.engine
def test_half_sent_and_left_requests_free_their_place(endpoint: Endpoint, config: Any) -> None:
    started = time.monotonic()
    halves = [raw_request(endpoint, 1000, b'{"model": ') for _ in range(20)]
    body = json.dumps({"model": "base", "messages": QUESTION, "stream": True, "temperature": 0}).encode()
    left = raw_request(endpoint, len(body), body)
    assert left.recv(1000)
    left.close()
    with client(endpoint) as api, ThreadPoolExecutor(8) as pool:
        ask = lambda _: api.chat.completions.create(model="base", messages=QUESTION, max_tokens=2)  # type: ignore  # noqa: E731
        assert all(answer.choices for answer in pool.map(ask, range(16))), "others are answered meanwhile"
    for half in halves:
        assert b" 408 " in half.recv(1000).splitlines()[0]
        half.close()
    assert time.monotonic() - started < config.serve.body_timeout_s + 15
    deadline = time.monotonic() + 10
    while in_flight(endpoint) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert in_flight(endpoint) == 0


HEAVY: dict[str, dict[str, Any]] = {
    "an image just below the limit": {"image": (6300, 6300)},
    "an image just above the limit": {"image": (6400, 6400)},
    "many samples": {"n": 8, "temperature": 1.0, "max_tokens": 100},
    "a large schema": with_schema({"anyOf": [{"maxLength": 4096, "pattern": "[a-z]{1,300}"}] * 400}),
}


@pytest.mark.engine
@pytest.mark.slow
def test_no_request_holds_up_the_others(endpoint: Endpoint) -> None:
    """One more question each moment, while a heavy one is answered or refused."""
    waits: dict[str, float] = {}
    with client(endpoint) as api, ThreadPoolExecutor(1) as pool:

        def ask(**fields: Any) -> float:
            started = time.monotonic()
            with contextlib.suppress(openai.BadRequestError):
                api.chat.completions.create(
                    **{"model": "base", "messages": QUESTION, "max_tokens": 2, "temperature": 0} | fields
                )
            return time.monotonic() - started

        alone = max(ask() for _ in range(5))
        for name, fields in HEAVY.items():
            if "image" in fields:
                url = (
                    "data:image/png;base64,"
                    + base64.b64encode(png_of(Image.fromarray(np.zeros(fields["image"], np.uint16)))).decode()
                )
                part = {"type": "image_url", "image_url": {"url": url}}
                fields = {"messages": [{"role": "user", "content": [part]}]}
            heavy = pool.submit(ask, **fields)
            longest = ask()
            while not heavy.done():
                longest = max(longest, ask())
            waits[name] = longest
    assert max(waits.values()) < alone + 2, waits


def check_state_and_logs(endpoint: Endpoint) -> None:
    """After all the requests above: no traceback and nothing of their content in any log."""
    assert json.loads(read(endpoint, "/ready")) == {"status": "ready", "engines": 1}
    metrics = read(endpoint, "/metrics")
    assert 'mmedpo_rejections_total{reason="engine"}' in metrics and SECRET not in metrics
    session = ray.get_runtime_context().get_session_name()
    logs = list(Path(cluster.ray_folder(), session, "logs").rglob("*.*"))
    texts = {path: path.read_text(errors="replace") for path in logs if path.is_file()}
    assert any("serve" in path.parts for path in texts)
    assert not [str(path) for path, text in texts.items() if SECRET in text]
    served = [text for path, text in texts.items() if "serve" in path.parts]
    assert not [text[text.index("Traceback") - 300 :][:3000] for text in served if "Traceback" in text]
