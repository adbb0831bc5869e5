"""The HTTP side of the endpoint as a Serve deployment in front of the engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle

from mmedpo_ray.serve.completions import engine_down
from mmedpo_ray.serve.http_app import create_app
from mmedpo_ray.serve.listener import Listener
from mmedpo_ray.serve.page.heat_map import ask_tool
from mmedpo_ray.serve.settings import ServeConfig

_PING_INTERVAL_S = 0.5
# Requests beyond those in flight that may wait for their refusal.
_SPARE = 200
# An ingress that died is noticed after about so long; until its successor is up, nobody answers.
_HEALTH_CHECK_PERIOD_S = 1

THROUGHPUT = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # One of its parts: Serve's own way to leave out the proxy. See `Listener`.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}
"""Environment of every replica: a request stays in one event loop per process, and goes from the ingress to
the engine by gRPC. This halves the CPU time that Serve takes for a request."""


class Engines:
    """The engines behind the ingress: which one answers for a model, and whether it is up.

    An engine counts as down until it answers a ping: at the start, and from the first request that it fails
    with. Must be made in a running event loop.

    Args:
        handles: deployment handle by the name of the engine's whole model.
        names_of: for each engine, every name it answers for (itself and its adapters).
    """

    def __init__(self, handles: dict[str, DeploymentHandle], names_of: dict[str, list[str]]) -> None:
        # By gRPC, not as a task of Ray's: RAY_SERVE_USE_GRPC_BY_DEFAULT of a handle is the driver's.
        self._handles = {name: handle.options(_by_reference=False) for name, handle in handles.items()}
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
        listen: host and port of a server of its own; None: it is reached through Serve's proxies alone.
        heat_maps: handle of the visual tool of the page; None: there is none.
    """

    def __init__(
        self,
        handles: dict[str, DeploymentHandle],
        names_of: dict[str, list[str]],
        settings: ServeConfig,
        max_pixels: int,
        key_hashes: frozenset[bytes],
        votes_folder: str | None,
        listen: tuple[str, int] | None,
        heat_maps: DeploymentHandle | None,
    ) -> None:
        self._handles = handles
        self._names_of = names_of
        self._settings = settings
        self._max_pixels = max_pixels
        self._key_hashes = key_hashes
        self._votes_folder = votes_folder
        self._listen = listen
        self._listener: Listener | None = None
        self._heat_maps = heat_maps

    async def __serve_build_asgi_app__(self) -> FastAPI:
        engines = Engines(self._handles, self._names_of)
        app = create_app(
            engines,
            self._settings,
            max_pixels=self._max_pixels,
            key_hashes=self._key_hashes,
            votes_folder=self._votes_folder,
            heat_maps=ask_tool(self._heat_maps) if self._heat_maps is not None else None,
        )
        if self._listen is not None:
            self._listener = Listener(app, *self._listen)
        return app

    # Serve awaits it before it stops a replica.
    async def __del__(self) -> None:
        if self._listener is not None:
            await self._listener.stop()


def build_ingress(
    engines: dict[str, Application],
    names_of: dict[str, list[str]],
    settings: ServeConfig,
    *,
    max_pixels: int,
    key_hashes: frozenset[bytes],
    votes_folder: str | None,
    listen: tuple[str, int] | None,
    heat_maps: Application | None,
) -> Application:
    """Puts the ingress before the engines; see :class:`OpenAiIngress`. With ``listen`` it is on this node."""
    here = {} if listen is None else {f"node:{ray.util.get_node_ip_address()}": 0.001}
    make = serve.deployment(
        max_ongoing_requests=settings.max_queue + _SPARE,
        num_replicas=1,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": 0, "resources": here, "runtime_env": {"env_vars": THROUGHPUT}},
    )
    return make(OpenAiIngress).bind(
        engines, names_of, settings, max_pixels, key_hashes, votes_folder, listen, heat_maps
    )
