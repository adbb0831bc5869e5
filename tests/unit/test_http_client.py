"""Proxies of the environment: passed by for endpoints on this machine, used for others, explained where they
cannot be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mmedpo_ray.clients.http import async_client, is_loopback
from mmedpo_ray.errors import UserError
from mmedpo_ray.evaluate.client import QuestionClient
from mmedpo_ray.evaluate.settings import EvaluateConfig


class Answering(BaseHTTPRequestHandler):
    """Lists one model, and keeps what it was asked for."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        body = b'{"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"choices": []}'
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[tuple[HTTPServer, HTTPServer]]:
    """An endpoint and a proxy, which answers every request itself."""
    made = [HTTPServer(("127.0.0.1", 0), Answering) for _ in range(2)]
    for server in made:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made[0], made[1]
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_an_endpoint_on_this_machine_is_asked_directly(servers, monkeypatch):
    endpoint, proxy = servers
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    client = QuestionClient(f"http://localhost:{endpoint.server_port}/v1", EvaluateConfig())
    assert client.model_names() == ["m"]
    assert endpoint.asked == ["/v1/models"]
    assert not proxy.asked


def test_a_server_that_starts_is_greeted_directly(servers, monkeypatch):
    pytest.importorskip("ray")
    from mmedpo_ray.serve.readiness import wait_for_answer

    endpoint, proxy = servers
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    wait_for_answer(f"http://127.0.0.1:{endpoint.server_port}/v1", "m", deadline=time.monotonic() + 10)
    assert endpoint.asked == ["/v1/chat/completions"]
    assert not proxy.asked


def test_an_endpoint_elsewhere_is_asked_through_the_proxy(servers, monkeypatch):
    _, proxy = servers
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
    assert QuestionClient("http://models.example.org/v1", EvaluateConfig()).model_names() == ["m"]
    assert proxy.asked == ["http://models.example.org/v1/models"]


def test_a_proxy_that_needs_another_package_is_explained(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    try:
        import socksio  # noqa: F401
    except ImportError:
        with pytest.raises(UserError) as error:
            async_client("http://models.example.org/v1")
        assert "httpx[socks]" in str(error.value)
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:1")
    with pytest.raises(UserError):
        async_client("http://models.example.org/v1")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000/v1", True),
        ("http://LOCALHOST.:8000", True),
        ("http://127.0.0.1:1", True),
        ("http://127.9.9.9", True),
        ("http://[::1]:8000/v1", True),
        ("http://0.0.0.0:8000", True),
        ("http://[::ffff:127.0.0.1]:8000", True),
        ("http://10.0.0.1", False),
        ("http://localhost.example.org", False),
        ("https://api.example.org/v1", False),
    ],
)
def test_which_addresses_are_this_machine(url, expected):
    assert is_loopback(url) is expected
