"""The HTTP side of the endpoint: checks every request, then passes it to the engine of its model.

The order of the checks: host and origin, API key, a place in the queue, size and time of the body, JSON and
fields, images. Every error has the form of the OpenAI API.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from mmedpo_ray.serve.access import Access
from mmedpo_ray.serve.admission import Admission
from mmedpo_ray.serve.metrics import ServeMetrics
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.request_images import RequestImages
from mmedpo_ray.serve.request_model import engine_body, parse_request
from mmedpo_ray.serve.settings import ServeConfig

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_ROUTES = ("/health", "/ready")
_MIB = 2**20


class Backend(Protocol):
    """The engines behind the HTTP side."""

    @property
    def models(self) -> Mapping[str, str | None]:
        """Served name → name of its base model; None for a whole model."""

    @property
    def engines_up(self) -> int:
        """Engines that answer."""

    def is_up(self, model: str) -> bool:
        """Whether the engine of a model answers."""

    async def answer(self, kind: str, body: dict[str, Any]) -> tuple[int, str]:
        """A whole answer: HTTP status and JSON."""

    def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[tuple[int, str]]:
        """An answer as server-sent events; an error before the first one is a single item with its status."""


@dataclass(frozen=True)
class _Parts:
    backend: Backend
    settings: ServeConfig
    access: Access
    admission: Admission
    images: RequestImages
    metrics: ServeMetrics


def create_app(
    backend: Backend, settings: ServeConfig, *, max_pixels: int, key_hashes: frozenset[bytes] = frozenset()
) -> FastAPI:
    """The application.

    Args:
        backend: the engines.
        settings: limits, names and origins.
        max_pixels: larger images are refused (``data.max_pixels``).
        key_hashes: of the API keys (:func:`mmedpo_ray.serve.access.read_key_hashes`); empty: no key needed.
    """
    parts = _Parts(
        backend,
        settings,
        Access(settings, key_hashes),
        Admission(settings.max_queue, settings.max_queue_per_key),
        RequestImages(settings, max_pixels),
        ServeMetrics(),
    )
    app = FastAPI(title="mmedpo-ray", docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_handlers(app, parts)
    app.middleware("http")(_guard(parts))
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
        )
    _add_status_routes(app, parts)
    _add_api_routes(app, parts)
    return app


def _guard(parts: _Parts) -> Callable[[Request, Any], Awaitable[Response]]:
    """Checks source and key of every request, gives it an id, and counts it."""

    async def guard(request: Request, call_next: Any) -> Response:
        given = request.headers.get("x-request-id", "")
        request.state.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        try:
            parts.access.check_source(request.headers)
            is_open = request.url.path in _OPEN_ROUTES
            request.state.key = "anonymous" if is_open else parts.access.check_key(request.headers)
            response = await call_next(request)
        except RequestError as error:
            parts.metrics.rejections.labels(error.reason).inc()
            response = error.response()
        response.headers["X-Request-Id"] = request.state.id
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    return guard


def _add_error_handlers(app: FastAPI, parts: _Parts) -> None:
    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        parts.metrics.rejections.labels(error.reason).inc()
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        message = "there is no such route; see /v1/models" if error.status_code == 404 else str(error.detail)
        return RequestError(error.status_code, message, reason="route").response()


def _add_status_routes(app: FastAPI, parts: _Parts) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        up = parts.backend.engines_up
        return JSONResponse({"status": "ready" if up else "starting", "engines": up}, 200 if up else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        parts.metrics.in_flight.set(parts.admission.in_flight)
        parts.metrics.engines_up.set(parts.backend.engines_up)
        return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_api_routes(app: FastAPI, parts: _Parts) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(parts, name) for name in parts.backend.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(parts, name)
        return _card(parts, name)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _complete("chat", request, parts)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _complete("completions", request, parts)


def _card(parts: _Parts, name: str) -> dict[str, Any]:
    parent = parts.backend.models[name]
    return {"id": name, "object": "model", "created": 0, "owned_by": "mmedpo-ray", "parent": parent}


def _check_model(parts: _Parts, name: str) -> None:
    if name not in parts.backend.models:
        raise RequestError(
            404,
            f"there is no such model; there are {', '.join(parts.backend.models)}",
            param="model",
            reason="model",
        )


async def _complete(kind: str, request: Request, parts: _Parts) -> Response:
    started = time.monotonic()
    place = parts.admission.enter(request.state.key)
    place.__enter__()
    is_streamed = False
    try:
        parsed = parse_request(kind, await _read_body(request, parts.settings), parts.settings)
        _check_model(parts, parsed.model)
        if not parts.backend.is_up(parsed.model):
            raise _engine_down()
        with parts.metrics.images.time():
            await parts.images.replace(parsed)
        body = engine_body(parsed)
        if not parsed.stream:
            status, text = await parts.backend.answer(kind, body)
            _count(parts, kind, parsed.model, status, started)
            _count_tokens(parts, parsed.model, text)
            return _whole(status, text)
        items = parts.backend.stream(kind, body)
        status, first = await anext(items)
        parts.metrics.first_token.observe(time.monotonic() - started)
        if status != 200:
            _count(parts, kind, parsed.model, status, started)
            return _whole(status, first)
        is_streamed = True

        async def events() -> AsyncIterator[str]:
            try:
                yield first
                async for _, text in items:
                    yield text
            except RequestError as error:
                yield f"data: {json.dumps(error.body())}\n\n"
            finally:
                _count(parts, kind, parsed.model, 200, started)
                place.__exit__(None, None, None)

        return StreamingResponse(events(), media_type="text/event-stream")
    finally:
        if not is_streamed:
            place.__exit__(None, None, None)


def _whole(status: int, text: str) -> Response:
    headers = {"Retry-After": "5"} if status == 503 else {}
    return Response(text, status, media_type="application/json", headers=headers)


def _engine_down() -> RequestError:
    return RequestError(
        503,
        "the engine of this model is starting; try again after Retry-After",
        reason="engine_down",
        retry_after_s=5,
    )


def _count(parts: _Parts, kind: str, model: str, status: int, started: float) -> None:
    parts.metrics.requests.labels(kind, model, str(status)).inc()
    parts.metrics.duration.observe(time.monotonic() - started)


def _count_tokens(parts: _Parts, model: str, text: str) -> None:
    try:
        usage = json.loads(text).get("usage") or {}
    except ValueError:
        return
    for side in ("prompt", "completion"):
        parts.metrics.tokens.labels(model, side).inc(usage.get(f"{side}_tokens") or 0)


async def _read_body(request: Request, settings: ServeConfig) -> bytes:
    """The body, of a bounded size, within a bounded time.

    Raises:
        RequestError: 415, 413 or 408.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestError(415, "Content-Type must be application/json", reason="content_type")
    most = int(settings.max_body_mib * _MIB)
    too_large = RequestError(413, f"the body is larger than {settings.max_body_mib:g} MiB", reason="limit")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise RequestError(
            408, f"the body did not arrive within {settings.body_timeout_s:g} s", reason="timeout"
        ) from error
    return bytes(body)
