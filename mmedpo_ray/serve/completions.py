"""From a request for a completion to the engine's answer, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mmedpo_ray.serve.admission import Admission
from mmedpo_ray.serve.metrics import ServeMetrics
from mmedpo_ray.serve.request_body import read_body
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.request_images import RequestImages
from mmedpo_ray.serve.request_model import CompletionBody, engine_body, parse_request
from mmedpo_ray.serve.settings import ServeConfig

# The last event of a stream before its end, with the tokens used, has no choice.
_USAGE_MARK = '"choices":[]'


class Backend(Protocol):
    """The engines behind the HTTP side."""

    @property
    def models(self) -> Mapping[str, str | None]:
        """Served name → name of its base model; None for a whole model."""

    @property
    def engines_up(self) -> int:
        """Engines that answer."""

    def is_up(self, model: str) -> bool:
        """Whether the engine of a model answers; one that was stopped for lack of requests is started."""

    def retry_after_s(self, model: str) -> float:
        """Seconds until the engine of a model is likely to answer."""

    def version(self, model: str) -> str:
        """The version that answers under a name; the name itself where there are no versions."""

    async def answer(self, kind: str, body: dict[str, Any]) -> tuple[int, str]:
        """A whole answer: HTTP status and JSON."""

    def stream(self, kind: str, body: dict[str, Any]) -> AsyncGenerator[tuple[int, str], None]:
        """An answer as server-sent events; an error before the first one is a single item with its status."""


class Completions:
    """Checks requests, and has them answered.

    Args:
        backend: the engines.
        settings: limits.
        max_pixels: larger images are refused.
        metrics: what is counted.
    """

    def __init__(
        self, backend: Backend, settings: ServeConfig, max_pixels: int, metrics: ServeMetrics
    ) -> None:
        self.backend = backend
        self.admission = Admission(settings.max_queue, settings.max_queue_per_key, settings.max_pending_mib)
        self._settings = settings
        self.images = RequestImages(settings, max_pixels)
        self._metrics = metrics

    def card(self, name: str) -> dict[str, Any]:
        """What the API says of a model.

        Raises:
            RequestError: 404, there is no such model.
        """
        self._check_model(name)
        parent = self.backend.models[name]
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "mmedpo-ray",
            "root": self.backend.version(name),
            "parent": parent,
        }

    async def complete(self, kind: str, request: Request) -> Response:
        """The HTTP answer to a request.

        Args:
            kind: ``chat`` or ``completions``.
            request: unread.

        Raises:
            RequestError: it is refused, or the engine is down.
        """
        started = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            place = stack.enter_context(self.admission.enter(getattr(request.state, "key", "")))
            data = await read_body(request, self._settings, place)
            body = parse_request(kind, data, self._settings)
            del data
            self._check_model(body.model)
            if not self.backend.is_up(body.model):
                raise engine_down(self.backend.retry_after_s(body.model))
            if body.num_images:
                with self._metrics.images.time():
                    await self.images.replace(body)
            stack.enter_context(self._counted(kind, body.model, started))
            if not body.stream:
                return await self._whole(kind, body)
            items = self.backend.stream(kind, engine_body(body))
            stack.push_async_callback(items.aclose)
            async with self._limited():
                status, first = await anext(items, (500, ""))
            if status != 200:
                return self._failed(status, first)
            self._metrics.first_token.observe(time.monotonic() - started)
            # From here on the stream holds the place.
            held = stack.pop_all()
        return _Stream(self._events(body, first, items), held)

    async def _whole(self, kind: str, body: CompletionBody) -> Response:
        async with self._limited():
            status, text = await self.backend.answer(kind, engine_body(body))
        if status != 200:
            return self._failed(status, text)
        self._count_tokens(body.model, text)
        return Response(text, media_type="application/json")

    async def _events(
        self, body: CompletionBody, first: str, items: AsyncGenerator[tuple[int, str], None]
    ) -> AsyncIterator[str]:
        shows_usage = body.stream_options is not None and body.stream_options.include_usage
        yield first
        try:
            async with self._limited():
                async for _, text in items:
                    if _USAGE_MARK in text:
                        self._count_tokens(body.model, text.removeprefix("data: "))
                        if not shows_usage:
                            continue
                    yield text
        except RequestError as error:
            self._metrics.rejections.labels(error.reason).inc()
            yield f"data: {json.dumps(error.body())}\n\n"

    def _failed(self, status: int, text: str) -> Response:
        """An error of the engine, which is in the form of the API already."""
        self._metrics.rejections.labels("engine").inc()
        if not text:
            return RequestError(500, "the engine gave no answer").response()
        return Response(text, status, media_type="application/json")

    def _check_model(self, name: str) -> None:
        models = self.backend.models
        if name not in models:
            raise RequestError(
                404,
                f"there is no such model; there are {', '.join(models)}",
                param="model",
                reason="model",
                code="model_not_found",
            )

    @contextlib.asynccontextmanager
    async def _limited(self) -> AsyncIterator[None]:
        seconds = self._settings.request_timeout_s
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise RequestError(504, f"there was no answer within {seconds:g} s", reason="timeout") from None

    @contextlib.contextmanager
    def _counted(self, kind: str, model: str, started: float) -> Iterator[None]:
        """Counts a request that was let in, and its seconds, whatever comes of it."""
        try:
            yield
        finally:
            self._metrics.requests.labels(kind, model).inc()
            self._metrics.duration.observe(time.monotonic() - started)

    def _count_tokens(self, model: str, text: str) -> None:
        try:
            usage = json.loads(text).get("usage") or {}
        except ValueError:
            return
        for side in ("prompt", "completion"):
            self._metrics.tokens.labels(model, side).inc(usage.get(f"{side}_tokens") or 0)


class _Stream(StreamingResponse):
    """Sends events, and holds the request's place until the last one, or until the client is gone."""

    def __init__(self, events: AsyncIterator[str], held: contextlib.AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


def engine_down(retry_after_s: float = 5.0) -> RequestError:
    """The error while an engine starts, or starts again."""
    return RequestError(
        503,
        "the engine of this model is starting; try again after Retry-After",
        reason="engine_down",
        retry_after_s=retry_after_s,
    )
