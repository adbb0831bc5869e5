"""The HTTP side of the endpoint: an application that checks every request before an engine gets it.

The order of the checks: host and origin, API key, a place in the queue, size and time of the body, JSON and
fields, images. Every error has the form of the OpenAI API.
"""

from __future__ import annotations

import logging
import re
import uuid
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmedpo_ray.serve.access import Access
from mmedpo_ray.serve.completions import Backend, Completions
from mmedpo_ray.serve.metrics import ServeMetrics
from mmedpo_ray.serve.page.heat_map import HeatMaps
from mmedpo_ray.serve.page.router import PUBLIC_ROUTES, page_router
from mmedpo_ray.serve.page.votes import Votes
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.request_model import KINDS
from mmedpo_ray.serve.settings import ServeConfig

log = logging.getLogger(__name__)

_ERRORS = (400, 401, 403, 404, 405, 408, 413, 415, 421, 429, 500, 503, 504)
_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _TEXT_OR_NULL,
                "code": _TEXT_OR_NULL,
            },
        }
    },
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def create_app(
    backend: Backend,
    settings: ServeConfig,
    *,
    max_pixels: int,
    key_hashes: frozenset[bytes] = frozenset(),
    votes_folder: str | None = None,
    heat_maps: HeatMaps | None = None,
) -> FastAPI:
    """The application. Its ``state.drain(seconds)`` refuses new requests and waits for those in flight.

    Args:
        backend: the engines.
        settings: limits, names and origins.
        max_pixels: larger images are refused.
        key_hashes: of the API keys (:func:`mmedpo_ray.serve.access.read_key_hashes`); empty: no key is
            needed, and only this machine may ask.
        votes_folder: where the votes of the page are written; None: it offers no vote.
        heat_maps: of a visual tool, for the page; None: it offers none.
    """
    metrics = ServeMetrics()
    access = Access(settings, key_hashes, ("/health", "/ready", *PUBLIC_ROUTES))
    completions = Completions(backend, settings, max_pixels, metrics)
    app = FastAPI(title="mmedpo-ray", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.drain = completions.admission.drain
    _add_error_handlers(app, metrics)
    _add_status_routes(app, completions, metrics)
    _add_api_routes(app, completions)
    votes = Votes(votes_folder) if votes_folder is not None else None
    page = page_router(settings, completions, votes, heat_maps, max_pixels)
    app.include_router(page, include_in_schema=False)
    _add_description(app)
    # Each one is put around those before it.
    app.add_middleware(_KeyGuard, access=access, metrics=metrics)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
        )
    app.add_middleware(_SourceGuard, access=access, metrics=metrics)
    return app


class _SourceGuard:
    """Gives every request an id, checks where it comes from, and turns unexpected errors into JSON."""

    def __init__(self, app: ASGIApp, access: Access, metrics: ServeMetrics) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status = None

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                marked = MutableHeaders(scope=message)
                marked["X-Request-Id"] = request_id
                marked["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._access.check_source(headers)
            self._access.check_client(scope.get("client"))
            await self._app(scope, receive, send_marked)
        except RequestError as error:
            self._metrics.rejections.labels(error.reason).inc()
            await error.response()(scope, receive, send_marked)
        except Exception as error:
            # Its text may quote the request.
            log.error("request %s failed: %s", request_id, type(error).__name__)
            if status is not None:
                raise RuntimeError("the answer broke off") from None
            failed = RequestError(500, "the server failed; its log has the request id", reason="internal")
            await failed.response()(scope, receive, send_marked)
        if status is not None and status >= 500:
            log.warning("request %s: HTTP %d", request_id, status)


class _KeyGuard:
    """Asks for an API key on every path that is not open."""

    def __init__(self, app: ASGIApp, access: Access, metrics: ServeMetrics) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._access.is_open(_path(scope)):
            try:
                scope.setdefault("state", {})["key"] = self._access.check_key(Headers(scope=scope))
            except RequestError as error:
                self._metrics.rejections.labels(error.reason).inc()
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _path(scope: Scope) -> str:
    """The path below the prefix under which Serve mounts the application."""
    return str(scope["path"]).removeprefix(scope.get("root_path", "").rstrip("/"))


def _add_error_handlers(app: FastAPI, metrics: ServeMetrics) -> None:
    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: RequestError) -> Response:
        metrics.rejections.labels(error.reason).inc()
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        message = "there is no such route; see /v1/models" if error.status_code == 404 else str(error.detail)
        metrics.rejections.labels("route").inc()
        response = RequestError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response


def _add_status_routes(app: FastAPI, completions: Completions, metrics: ServeMetrics) -> None:
    backend = completions.backend

    @app.get("/health", summary="Whether this process answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether an engine answers")
    async def ready() -> Response:
        up = 0 if completions.admission.is_closed else backend.engines_up
        status, code = ("ready", 200) if up else ("starting", 503)
        headers = {} if up else {"Retry-After": "5"}
        return JSONResponse({"status": status, "engines": up}, code, headers=headers)

    @app.get("/metrics", summary="Counts and seconds for Prometheus")
    async def read_metrics() -> Response:
        metrics.in_flight.set(completions.admission.in_flight)
        metrics.engines_up.set(backend.engines_up)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _add_api_routes(app: FastAPI, completions: Completions) -> None:
    @app.get("/v1/models", summary="The models that are served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [completions.card(name) for name in completions.backend.models]}

    @app.get("/v1/models/{name:path}", summary="One of them")
    async def model(name: str) -> dict[str, Any]:
        return completions.card(name)

    @app.post("/v1/chat/completions", summary="An answer in a conversation", openapi_extra=_body("chat"))
    async def chat(request: Request) -> Response:
        return await completions.complete("chat", request)

    @app.post("/v1/completions", summary="The continuation of a text", openapi_extra=_body("completions"))
    async def text(request: Request) -> Response:
        return await completions.complete("completions", request)


def _body(kind: str) -> dict[str, Any]:
    """What the OpenAPI description says of a body; it is read by :mod:`.request_model`, not by FastAPI."""
    schema = {"$ref": f"#/components/schemas/{KINDS[kind].__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _add_description(app: FastAPI) -> None:
    """Adds the bodies of requests and the form of errors to ``/openapi.json``."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        kinds: Any = [(kind, "validation") for kind in KINDS.values()]
        _, found = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas |= found["$defs"] | {"Error": _ERROR_SCHEMA}
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for path in document["paths"].values():
            for route in path.values():
                route["responses"].pop("422", None)
                route["responses"] |= {
                    str(status): {"description": HTTPStatus(status).phrase, "content": error}
                    for status in _ERRORS
                }
        return document

    app.openapi = openapi  # type: ignore[method-assign]
