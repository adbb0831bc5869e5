"""The HTTP side of the endpoint as a Serve deployment in front of the engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle

from mmedpo_ray.serve.http_app import create_app
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.settings import ServeConfig

_RETRY_AFTER_S = 5.0
_PING_INTERVAL_S = 0.5


class Engines:
    """The engines behind the ingress: which one answers for a model, and whether it is up.

    An engine counts as down from the first request that it fails with, until it answers a ping.

    Args:
        handles: deployment handle by the name of the engine's whole model.
        names_of: for each engine, every name it answers for (itself and its adapters).
    """

    def __init__(self, handles: dict[str, DeploymentHandle], names_of: dict[str, list[str]]) -> None:
        self._handles = handles
        self._engine_of = {name: engine for engine, names in names_of.items() for name in names}
        self._down: dict[str, asyncio.Task[None]] = {}
        self.models = {name: None if engine == name else engine for name, engine in self._engine_of.items()}

    @property
    def engines_up(self) -> int:
        """Engines that answer."""
        return len(self._handles) - len(self._down)

    def is_up(self, model: str) -> bool:
        """Whether the engine of a model answers."""
        return self._engine_of[model] not in self._down

    async def answer(self, kind: str, body: dict[str, Any]) -> tuple[int, str]:
        """A whole answer: HTTP status and JSON.

        Raises:
            RequestError: 503, the engine died.
        """
        engine = self._engine_of[body["model"]]
        try:
            status, text = await self._handles[engine].answer.remote(kind, body)
        except RayError as error:
            raise self._lost(engine) from error
        if status == 503:
            self._mark_down(engine)
        return status, text

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[tuple[int, str]]:
        """An answer as server-sent events; an error before the first one is a single item with its status.

        Raises:
            RequestError: 503, the engine died.
        """
        engine = self._engine_of[body["model"]]
        items: Any = self._handles[engine].options(stream=True).stream.remote(kind, body)
        try:
            async for status, text in items:
                if status == 503:
                    self._mark_down(engine)
                yield status, text
        except RayError as error:
            raise self._lost(engine) from error

    def _lost(self, engine: str) -> RequestError:
        self._mark_down(engine)
        return RequestError(
            503,
            "the engine stopped while it answered and is started again; try again after Retry-After",
            reason="engine_down",
            retry_after_s=_RETRY_AFTER_S,
        )

    def _mark_down(self, engine: str) -> None:
        if engine not in self._down:
            self._down[engine] = asyncio.create_task(self._wait_until_up(engine))

    async def _wait_until_up(self, engine: str) -> None:
        while True:
            try:
                await self._handles[engine].ping.remote()
            except RayError:
                await asyncio.sleep(_PING_INTERVAL_S)
            else:
                del self._down[engine]
                return


@serve.ingress()
class OpenAiIngress:
    """The ingress: one application for all engines.

    Args:
        handles: deployment handle by the name of the engine's whole model.
        names_of: for each engine, every name it answers for.
        settings: limits, names and origins.
        max_pixels: of an image.
        key_hashes: of the API keys.
    """

    def __init__(
        self,
        handles: dict[str, DeploymentHandle],
        names_of: dict[str, list[str]],
        settings: ServeConfig,
        max_pixels: int,
        key_hashes: frozenset[bytes],
    ) -> None:
        self._engines = Engines(handles, names_of)
        self._settings = settings
        self._max_pixels = max_pixels
        self._key_hashes = key_hashes

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(
            self._engines, self._settings, max_pixels=self._max_pixels, key_hashes=self._key_hashes
        )


def build_ingress(
    engines: dict[str, Application],
    names_of: dict[str, list[str]],
    settings: ServeConfig,
    *,
    max_pixels: int,
    key_hashes: frozenset[bytes],
) -> Application:
    """Puts the ingress before the engines; see :class:`OpenAiIngress`."""
    make = serve.deployment(
        max_ongoing_requests=settings.max_queue + 100, num_replicas=1, ray_actor_options={"num_cpus": 0}
    )
    return make(OpenAiIngress).bind(engines, names_of, settings, max_pixels, key_hashes)
