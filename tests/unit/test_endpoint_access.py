"""Who is let into the endpoint, how many at once, and what others see of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from endpoint_app import KEY, Endpoint

from mmedpo_ray.errors import UserError
from mmedpo_ray.serve.access import read_key_hashes
from mmedpo_ray.serve.completions import engine_down
from mmedpo_ray.serve.settings import ServeConfig

BODY = {"model": "base", "messages": [{"role": "user", "content": "Is there a nodule?"}]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer("another-key-of-this-test"), 401),
        (bearer(KEY[:-1]), 401),
        (bearer(KEY + "x"), 401),
        ({"Authorization": KEY}, 401),
        ({"Authorization": f"Basic {KEY}"}, 401),
        ({"Authorization": "Bearer"}, 401),
        (bearer(KEY), 200),
        ({"Authorization": f"bearer {KEY}"}, 200),
    ],
)
def test_a_key_is_needed_where_there_are_keys(headers: dict[str, str], status: int) -> None:
    endpoint = Endpoint(keys=("the-first-key-of-this-test", KEY))
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
        answer = endpoint.send(method, path, headers=headers, json=BODY if method == "POST" else None)
        assert answer.status_code == status, path
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
    assert endpoint.send("GET", "/health").status_code == 200
    assert endpoint.send("GET", "/ready").status_code == 200


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# radiology\n{KEY}\n\nanother-key-of-this-test\n")
    settings = ServeConfig(api_keys_file=str(file))
    assert len(read_key_hashes(settings)) == 2
    monkeypatch.setenv("MMEDPO_API_KEYS", f"{KEY}, a-third-key-of-this-test")
    assert len(read_key_hashes(settings)) == 3
    assert not any(KEY.encode() in item for item in read_key_hashes(settings))


@pytest.mark.parametrize("content", [None, "", "# nothing\n", "short\n"])
def test_a_file_without_usable_keys_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match="key"):
        read_key_hashes(ServeConfig(api_keys_file=str(file)))


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8000", None, 200),
        ("127.0.0.1:8000", None, 200),
        ("[::1]:8000", None, 200),
        ("10.1.2.3", None, 200),
        ("ai.hospital.example", None, 200),
        ("other.example", None, 421),
        ("localhost.other.example", None, 421),
        ("", None, 421),
        ("[broken", None, 421),
        ("localhost:8000", "http://localhost:8000", 200),
        ("localhost:8000", "https://viewer.hospital.example", 200),
        ("localhost:8000", "http://localhost:3000", 403),
        ("localhost:8000", "https://other.example", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "", 403),
    ],
)
def test_only_own_names_and_listed_pages_are_answered(host: str, origin: str | None, status: int) -> None:
    endpoint = Endpoint(
        allowed_hosts=("ai.hospital.example",), allowed_origins=("https://viewer.hospital.example",)
    )
    headers = {"Host": host} | ({"Origin": origin} if origin is not None else {})
    for path in ("/v1/models", "/health", "/metrics", "/nothing"):
        answer = endpoint.send("GET", path, headers=headers)
        assert answer.status_code == (404 if path == "/nothing" and status == 200 else status)
    allowed = answer.headers.get("Access-Control-Allow-Origin")
    assert allowed == (origin if origin == "https://viewer.hospital.example" else None)


def test_requests_beyond_the_limits_are_told_when_to_come_back() -> None:
    endpoint = Endpoint(keys=(KEY, "another-key-of-this-test"), max_queue=6, max_queue_per_key=4)
    endpoint.engines.seconds = 0.5

    async def many() -> list[list[int]]:
        async with endpoint.client() as client:

            async def ask(key: str) -> int:
                answer = await client.post("/v1/chat/completions", json=BODY, headers=bearer(key))
                if answer.status_code == 429:
                    assert int(answer.headers["Retry-After"]) >= 1
                return answer.status_code

            first = await asyncio.gather(*(ask(KEY) for _ in range(6)))
            keys = [KEY] * 4 + ["another-key-of-this-test"] * 4
            second = await asyncio.gather(*(ask(key) for key in keys))
            return [sorted(first), sorted(second)]

    first, second = asyncio.run(many())
    assert first == [200] * 4 + [429] * 2, "one key takes four places"
    assert second == [200] * 6 + [429] * 2, "all keys together take six"
    assert endpoint.send("POST", "/v1/chat/completions", json=BODY, headers=bearer(KEY)).status_code == 200


def test_bodies_that_fill_the_memory_are_told_to_come_back() -> None:
    endpoint = Endpoint(max_body_mib=0.5, max_pending_mib=0.5)
    endpoint.engines.seconds = 0.3
    body = json.dumps(BODY).encode().ljust(300_000)

    async def three() -> list[int]:
        async with endpoint.client() as client:
            headers = {"Content-Type": "application/json"}
            asked = (client.post("/v1/chat/completions", content=body, headers=headers) for _ in range(3))
            return sorted(answer.status_code for answer in await asyncio.gather(*asked))

    assert asyncio.run(three()) == [200, 429, 429]
    assert asyncio.run(three()) == [200, 429, 429], "its bytes are free again"


@pytest.mark.parametrize(
    ("address", "keys", "status"),
    [
        ("127.0.0.1", (), 200),
        ("127.4.5.6", (), 200),
        ("::1", (), 200),
        ("::ffff:127.0.0.1", (), 200),
        ("10.0.0.5", (), 403),
        ("2001:db8::5", (), 403),
        ("::ffff:10.0.0.5", (), 403),
        ("10.0.0.5", (KEY,), 200),
    ],
)
def test_without_keys_only_this_machine_is_answered(address: str, keys: tuple[str, ...], status: int) -> None:
    endpoint = Endpoint(keys=keys)
    for path in ("/health", "/v1/models"):
        answer = endpoint.send("GET", path, address=address, headers=bearer(KEY))
        assert answer.status_code == status
    if status == 403:
        assert "serve.api_keys_file" in answer.json()["error"]["message"]


def test_a_request_that_takes_too_long_is_given_up() -> None:
    endpoint = Endpoint(request_timeout_s=0.2)
    endpoint.engines.seconds = 5
    assert endpoint.chat().status_code == 504
    streamed = endpoint.chat(stream=True)
    assert streamed.status_code == 200, "its first part has gone"
    assert "within 0.2 s" in json.loads(streamed.text.split("data: ")[-1])["error"]["message"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_error_of_our_own_shows_nothing_of_the_request(
    is_streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = Endpoint()
    endpoint.engines.error = KeyError("Mrs Example")
    answer = endpoint.chat(stream=is_streamed)
    if not is_streamed:
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert answer.headers["X-Request-Id"] in caplog.text
    assert "KeyError" in caplog.text
    assert "Example" not in answer.text + caplog.text and "Traceback" not in answer.text


def test_an_engine_that_dies_ends_its_stream_with_an_error() -> None:
    endpoint = Endpoint()
    endpoint.engines.error = engine_down()
    assert endpoint.chat().status_code == 503
    first, second, *rest = endpoint.chat(stream=True).text.split("\n\n")
    assert first == 'data: {"word": "No"}' and not "".join(rest)
    assert json.loads(second.removeprefix("data: "))["error"]["type"] == "server_error"


def test_a_client_that_leaves_frees_its_place() -> None:
    endpoint = Endpoint(max_queue=1)
    endpoint.engines.seconds = 5

    async def leave(is_streamed: bool) -> None:
        async with endpoint.client() as client:
            ask = client.post("/v1/chat/completions", json=BODY | {"stream": is_streamed})
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask, 0.1)

    for is_streamed in (False, True):
        asyncio.run(leave(is_streamed))
        assert "mmedpo_requests_in_flight 0.0" in endpoint.send("GET", "/metrics").text


def test_a_server_that_stops_answers_what_it_has_and_refuses_the_rest() -> None:
    endpoint = Endpoint()
    endpoint.engines.seconds = 0.3

    async def stop() -> tuple[int, int, int, list[int]]:
        async with endpoint.client() as client:
            in_flight = [
                asyncio.create_task(client.post("/v1/chat/completions", json=BODY)) for _ in range(3)
            ]
            await asyncio.sleep(0.1)
            drain = asyncio.create_task(endpoint.app.state.drain(5))
            await asyncio.sleep(0)
            late, ready = await client.post("/v1/chat/completions", json=BODY), await client.get("/ready")
            assert int(late.headers["Retry-After"]) >= 1 and late.json()["error"]["type"] == "server_error"
            assert not drain.done()
            left, answers = await drain, await asyncio.gather(*in_flight)
        return left, late.status_code, ready.status_code, [answer.status_code for answer in answers]

    assert asyncio.run(stop()) == (0, 503, 503, [200] * 3)


def test_a_stop_waits_no_longer_than_told() -> None:
    endpoint = Endpoint()
    endpoint.engines.seconds = 5

    async def stop() -> int:
        async with endpoint.client() as client:
            ask = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
            await asyncio.sleep(0.1)
            left: int = await endpoint.app.state.drain(0.2)
            ask.cancel()
            return left

    assert asyncio.run(stop()) == 1


def test_half_sent_bodies_end_after_their_time() -> None:
    endpoint = Endpoint(body_timeout_s=0.2, max_queue=1)

    async def half() -> AsyncIterator[bytes]:
        yield b'{"model": '
        await asyncio.sleep(5)
        yield b'"base"}'

    async def send() -> int:
        async with endpoint.client() as client:
            headers = {"Content-Type": "application/json"}
            return (await client.post("/v1/chat/completions", content=half(), headers=headers)).status_code

    assert asyncio.run(send()) == 408
    assert endpoint.chat().status_code == 200, "its place is free again"


def test_while_no_engine_answers() -> None:
    endpoint = Endpoint()
    endpoint.engines.up = False
    answer = endpoint.chat()
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1
    assert endpoint.send("GET", "/ready").status_code == 503
    assert endpoint.send("GET", "/health").status_code == 200


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("case-17.a_b", True),
        ("", False),
        ("two words", False),
        ("x" * 65, False),
        ("a\tb", False),
        ("é", False),
    ],
)
def test_ids_of_clients_are_kept_if_they_are_plain(given: str, kept: bool) -> None:
    answer = Endpoint().send("GET", "/health", headers={"X-Request-Id": given.encode()})
    assert (answer.headers["X-Request-Id"] == given) is kept
    assert len(answer.headers["X-Request-Id"]) == (len(given) if kept else 32)


def test_metrics_count_and_hold_no_content() -> None:
    endpoint = Endpoint()
    endpoint.chat()
    endpoint.chat(n=99)
    endpoint.chat(stream=True)
    text = endpoint.send("GET", "/metrics").text
    assert 'mmedpo_requests_total{kind="chat",model="base"} 2.0' in text
    assert 'mmedpo_rejections_total{reason="limit"} 1.0' in text
    assert 'mmedpo_tokens_total{model="base",side="completion"} 4.0' in text, "of the stream too"
    assert "mmedpo_first_token_seconds_count 1.0" in text
    assert "nodule" not in text and "Hello" not in text


def test_a_stream_is_passed_on_as_it_comes() -> None:
    answer = Endpoint().chat(stream=True)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert [line for line in answer.text.splitlines() if line] == [
        'data: {"word": "No"}',
        'data: {"word": "effusion"}',
        "data: [DONE]",
    ], "the tokens used, which the client did not ask for, are left out"
    asked = Endpoint().chat(stream=True, stream_options={"include_usage": True})
    assert '"completion_tokens": 2' in asked.text
