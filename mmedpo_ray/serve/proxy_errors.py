"""Errors that Serve's HTTP proxy itself answers with, in the form of the API.

The proxy answers in plain text while no ingress is there, and not at all if the ingress of a request died;
its server then answers 500. Serve puts this around every proxy that has
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=mmedpo_ray.serve.proxy_errors:middlewares`` in its environment.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmedpo_ray.serve.request_error import RequestError

IMPORT_PATH = f"{__name__}:middlewares"

_RETRY_AFTER_S = 5.0
# The proxy's own routes.
_OWN = "/-/"


class ProxyErrors:
    """Turns the proxy's errors into 503 with Retry-After; the application's own are JSON already."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_OWN):
            await self._app(scope, receive, send)
            return
        has_started = is_replaced = False

        async def send_json(message: Message) -> None:
            nonlocal has_started, is_replaced
            if message["type"] == "http.response.start":
                kind = Headers(raw=list(message.get("headers", ()))).get("content-type", "")
                is_replaced = message["status"] >= 500 and not kind.startswith("application/json")
                has_started = not is_replaced
            if not is_replaced:
                await send(message)

        await self._app(scope, receive, send_json)
        if not has_started:
            error = RequestError(503, "the server starts again; try again", retry_after_s=_RETRY_AFTER_S)
            await error.response()(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy."""
    return [Middleware(ProxyErrors)]
