"""The HTTP side of the endpoint as a Serve deployment in front of the engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle

from mmedpo_ray.serve.completions import engine_down
from mmedpo_ray.serve.http_app import create_app
from mmedpo_ray.serve.settings import ServeConfig

_PING_INTERVAL_S = 0.5
# Requests beyond those in flight that may wait for their refusal.
_SPARE = 200


class Engines:
    """The engines behind the ingress: which one answers for a model, and whether it is up.

    An engine counts as down until it answers a ping: at the start, and from the first request that it fails
    with. Must be made in a running event loop.

    Args:
        handles: deployment handle by the name of the engine's whole model.
        names_of: for each engine, every name it answers for (itself and its adapters).
    """

    def __init__(self, handles: dict[str, DeploymentHandle], names_of: dict[str, list[str]]) -> None:
        self._handles = handles
        self._engine_of = {name: engine for engine, names in names_of.items() for name in names}
        self._down: dict[str, asyncio.Task[None]] = {}
        self.models = {name: None if engine == name else engine for name, engine in self._engine_of.items()}
        for engine in handles:
            self._mark_down(engine)

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
        except RayError:
            self._mark_down(engine)
            raise engine_down() from None
        if status == 503:
            self._mark_down(engine)
        return status, text

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncGenerator[tuple[int, str], None]:
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
        except RayError:
            self._mark_down(engine)
            raise engine_down() from None

    def _mark_down(self, engine: str) -> None:
        if engine not in self._down:
            self._down[engine] = asyncio.get_running_loop().create_task(self._wait_until_up(engine))

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
        votes_folder: where the page writes votes; None: nowhere.
    """

    def __init__(
        self,
        handles: dict[str, DeploymentHandle],
        names_of: dict[str, list[str]],
        settings: ServeConfig,
        max_pixels: int,
        key_hashes: frozenset[bytes],
        votes_folder: str | None,
    ) -> None:
        self._handles = handles
        self._names_of = names_of
        self._settings = settings
        self._max_pixels = max_pixels
        self._key_hashes = key_hashes
        self._votes_folder = votes_folder

    async def __serve_build_asgi_app__(self) -> FastAPI:
        engines = Engines(self._handles, self._names_of)
        return create_app(
            engines,
            self._settings,
            max_pixels=self._max_pixels,
            key_hashes=self._key_hashes,
            votes_folder=self._votes_folder,
        )


def build_ingress(
    engines: dict[str, Application],
    names_of: dict[str, list[str]],
    settings: ServeConfig,
    *,
    max_pixels: int,
    key_hashes: frozenset[bytes],
    votes_folder: str | None,
) -> Application:
    """Puts the ingress before the engines; see :class:`OpenAiIngress`."""
    make = serve.deployment(
        max_ongoing_requests=settings.max_queue + _SPARE, num_replicas=1, ray_actor_options={"num_cpus": 0}
    )
    return make(OpenAiIngress).bind(engines, names_of, settings, max_pixels, key_hashes, votes_folder)
