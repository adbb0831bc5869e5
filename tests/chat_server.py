"""A small HTTP server that speaks the chat protocol and misbehaves on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "strong"
INPUT_TOKENS, OUTPUT_TOKENS = 100, 10


@dataclass
class Reply:
    """What the server does with a request.

    Attributes:
        text: content of the answer.
        status: HTTP status; other than 200, ``code`` goes into an error body.
        code: error code.
        headers: further response headers.
        finish: finish reason.
        delay: seconds before anything is sent.
        raw: body in place of everything else; it is called JSON unless it begins like a page.
        changes: fields of the answer's body to put in place of its own.
        message: fields of its message to put in place of its own.
    """

    text: str = "fine"
    status: int = 200
    code: str = "an_error"
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    delay: float = 0.0
    raw: bytes | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    message: dict[str, Any] = field(default_factory=dict)


@dataclass
class ChatServer:
    """The running server.

    Attributes:
        url: address up to ``/v1``.
        models: names that it answers for.
        answer: gets a request's JSON body, and how often it came before, and says what to do.
        requests: bodies of all chat requests, in order of arrival.
        arrivals: their times, ``time.monotonic``.
        most_at_once: most requests that were in the server together.
    """

    url: str = ""
    key: str | None = None
    models: tuple[str, ...] = (MODEL,)
    answer: Callable[[dict[str, Any], int], Reply] = lambda body, before: Reply()
    requests: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _seen: dict[str, int] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def handle(self, body: dict[str, Any], key: str) -> Reply:
        """Counts a request and finds its reply."""
        name = json.dumps(body["messages"])
        with self._lock:
            self.requests.append(body)
            self.arrivals.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            before = self._seen.get(name, 0)
            self._seen[name] = before + 1
        try:
            if self.key is not None and key != f"Bearer {self.key}":
                return Reply(status=401, code="invalid_api_key")
            if body["model"] not in self.models:
                return Reply(status=404, code="model_not_found")
            reply = self.answer(body, before)
            time.sleep(reply.delay)
            return reply
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def running() -> Iterator[ChatServer]:
    """A server on a free loopback port."""
    state = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = state.handle(body, self.headers.get("Authorization", ""))
            if reply.raw is not None:
                payload, kind = reply.raw, "text/html" if reply.raw.startswith(b"<") else "application/json"
            else:
                payload, kind = json.dumps(self._body(reply)).encode(), "application/json"
            try:
                self.send_response(reply.status)
                for name, value in ({"Content-Type": kind} | reply.headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
            except ConnectionError:
                # The client gave up, as some tests want.
                self.close_connection = True

        def do_GET(self) -> None:
            """The list of models, whatever the path."""
            models = [
                {"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in state.models
            ]
            payload = json.dumps({"object": "list", "data": models}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        @staticmethod
        def _body(reply: Reply) -> dict[str, Any]:
            if reply.status != 200:
                # Real servers repeat the prompt in such messages.
                return {"error": {"message": "SECRET patient text", "type": "some_error", "code": reply.code}}
            return {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": MODEL,
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": reply.finish,
                        "message": {"role": "assistant", "content": reply.text} | reply.message,
                    }
                ],
                "usage": {
                    "prompt_tokens": INPUT_TOKENS,
                    "completion_tokens": OUTPUT_TOKENS,
                    "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
                },
            } | reply.changes

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
