"""The HTTP side of the endpoint as a Serve deployment in front of the engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.deployment import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from mmedpo_ray.serve.completions import engine_down
from mmedpo_ray.serve.engine_watch import EngineWatch, StartTimes
from mmedpo_ray.serve.http_app import create_app
from mmedpo_ray.serve.listener import listen
from mmedpo_ray.serve.page.heat_map import ask_tool
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.settings import ServeConfig
from mmedpo_ray.serve.versions import VersionFolder

_PING_INTERVAL_S = 0.5
_FIRST_PING_S = 2.0
# A replica that lives answers a ping within so long, also under load.
_PING_TIMEOUT_S = 5.0
# Replicas that a request is sent to, one after the other, while they die.
_MOST_ATTEMPTS = 3
# Requests beyond those in flight that may wait for their refusal.
_SPARE = 200

THROUGHPUT = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # One of its parts: Serve's own way to leave out the proxy. See :mod:`.listener`.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}
"""Environment of every replica: a request stays in one event loop per process, and goes from the ingress to
the engine by gRPC. This halves the CPU time that Serve takes for a request."""


class Engines:
    """The engines behind the ingress: which one answers for a model, and whether it is up.

    An engine counts as down until it answers a ping: at the start, when it has no replica, and from the first
    request that no replica of it answers. Must be made in a running event loop.

    Args:
        handles: deployment handle by the name of the engine's whole model.
        names_of: for each engine, every name it answers for (itself and its adapters).
        versions: of the adapters; None: names are versions.
    """

    def __init__(
        self,
        handles: dict[str, DeploymentHandle],
        names_of: dict[str, list[str]],
        versions: VersionFolder | None = None,
    ) -> None:
        # By gRPC, not as a task of Ray's: RAY_SERVE_USE_GRPC_BY_DEFAULT of a handle is the driver's.
        self._handles = {name: handle.options(_by_reference=False) for name, handle in handles.items()}
        self._engine_of = {name: engine for engine, names in names_of.items() for name in names}
        self._watch = EngineWatch(handles, versions)
        self._down: dict[str, asyncio.Task[None]] = {}
        self._start_times = StartTimes()
        self.models = {name: None if engine == name else engine for name, engine in self._engine_of.items()}
        for engine in handles:
            self._mark_down(engine)

    @property
    def engines_up(self) -> int:
        """Engines that answer."""
        return sum(map(self._is_up, self._handles))

    def is_up(self, model: str) -> bool:
        """Whether the engine of a model answers; one that was stopped for lack of requests is started."""
        engine = self._engine_of[model]
        if self._is_up(engine):
            return True
        # Waiting for it is what makes Serve start a replica.
        self._mark_down(engine)
        return False

    def retry_after_s(self, model: str) -> float:
        """Seconds until the engine of a model is likely to answer."""
        return self._start_times.seconds_left(self._engine_of[model])

    def version(self, model: str) -> str:
        """The version that answers under a name."""
        return self._watch.version(model)

    async def answer(self, kind: str, body: dict[str, Any]) -> tuple[int, str]:
        """A whole answer: HTTP status and JSON. A replica that dies is replaced by another one.

        Raises:
            RequestError: 503, no replica answers.
        """
        engine = self._engine_of[body["model"]]
        body = body | {"model": self.version(body["model"])}
        for _ in range(_MOST_ATTEMPTS):
            with contextlib.suppress(RayError, RayServeException):
                status, text = await self._handles[engine].answer.remote(kind, body)
                if status != 503:
                    return status, text
            if not await self._has_replica(engine):
                break
        raise self._gone(engine)

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncGenerator[tuple[int, str], None]:
        """An answer as server-sent events; an error before the first one is a single item with its status.

        Until the first event, a replica that dies is replaced by another one.

        Raises:
            RequestError: 503, no replica answers, or it died after the first event.
        """
        engine = self._engine_of[body["model"]]
        body = body | {"model": self.version(body["model"])}
        has_started = False
        for _ in range(_MOST_ATTEMPTS):
            items: Any = self._handles[engine].options(stream=True).stream.remote(kind, body)
            with contextlib.suppress(RayError, RayServeException):
                async for status, text in items:
                    if status == 503:
                        break
                    has_started = True
                    yield status, text
                else:
                    return
            if has_started or not await self._has_replica(engine):
                break
        raise self._gone(engine)

    async def wait_for_first_pings(self) -> None:
        """Waits until the engines have answered, or a moment: an ingress that starts again refuses nobody."""
        await asyncio.wait(list(self._down.values()), timeout=_FIRST_PING_S)

    def _is_up(self, engine: str) -> bool:
        return engine not in self._down and engine not in self._watch.without_replica

    def _gone(self, engine: str) -> RequestError:
        return engine_down(self._start_times.seconds_left(engine))

    async def _has_replica(self, engine: str) -> bool:
        """Whether a replica lives; if none does, the engine is down."""
        try:
            # Past the queue, where a ping would wait behind requests.
            found = (
                await self._handles[engine]
                .broadcast("ping")
                .results_async(timeout_s=_PING_TIMEOUT_S, return_exceptions=True)
            )
        except (RayError, RayServeException, TimeoutError):
            found = []
        if any(answer is None for answer in found):
            return True
        self._mark_down(engine)
        return False

    def _mark_down(self, engine: str) -> None:
        if engine not in self._down:
            self._start_times.begin(engine)
            self._down[engine] = asyncio.get_running_loop().create_task(self._wait_until_up(engine))

    async def _wait_until_up(self, engine: str) -> None:
        while True:
            try:
                await self._handles[engine].ping.remote()
            except RayError:
                await asyncio.sleep(_PING_INTERVAL_S)
            else:
                self._start_times.end(engine)
                self._watch.without_replica.discard(engine)
                del self._down[engine]
                return


@dataclass(frozen=True)
class Served:
    """What an ingress answers with.

    Attributes:
        versions: where versions of adapters are; None: none can be rolled out.
        engine_of: name → name of the engine's whole model.
        version_of: name → version that answers.
    """

    versions: VersionFolder | None
    engine_of: dict[str, str]
    version_of: dict[str, str]


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
        versions: of the adapters; None: names are versions.
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
        versions: VersionFolder | None,
        listen: tuple[str, int] | None,
        heat_maps: DeploymentHandle | None,
    ) -> None:
        self._handles = handles
        self._names_of = names_of
        self._settings = settings
        self._max_pixels = max_pixels
        self._key_hashes = key_hashes
        self._votes_folder = votes_folder
        self._versions = versions
        self._listen = listen
        self._heat_maps = heat_maps

    async def __serve_build_asgi_app__(self) -> FastAPI:
        self._engines = Engines(self._handles, self._names_of, self._versions)
        await self._engines.wait_for_first_pings()
        self._app = create_app(
            self._engines,
            self._settings,
            max_pixels=self._max_pixels,
            key_hashes=self._key_hashes,
            votes_folder=self._votes_folder,
            heat_maps=ask_tool(self._heat_maps) if self._heat_maps is not None else None,
        )
        if self._listen is not None:
            self._server = listen(self._app, *self._listen)
        return self._app

    async def drain(self) -> int:
        """Refuses new requests and waits for those in flight; returns how many were left in the end."""
        left: int = await self._app.state.drain(self._settings.drain_timeout_s)
        return left

    async def served(self) -> Served:
        """What this replica answers with."""
        models = self._engines.models
        return Served(
            versions=self._versions,
            engine_of={name: base or name for name, base in models.items()},
            version_of={name: self._engines.version(name) for name in models},
        )


def build_ingress(
    engines: dict[str, Application],
    names_of: dict[str, list[str]],
    settings: ServeConfig,
    *,
    max_pixels: int,
    key_hashes: frozenset[bytes],
    votes_folder: str | None,
    versions: VersionFolder | None = None,
    listen: tuple[str, int] | None = None,
    heat_maps: Application | None = None,
) -> Application:
    """Puts the ingress before the engines; see :class:`OpenAiIngress`. With ``listen`` it is on this node."""
    here = {} if listen is None else {f"node:{ray.util.get_node_ip_address()}": 0.001}
    make = serve.deployment(
        max_ongoing_requests=settings.max_queue + _SPARE,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": here, "runtime_env": {"env_vars": THROUGHPUT}},
        # One that died is noticed within so long.
        health_check_period_s=1,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
    )
    return make(OpenAiIngress).bind(
        engines, names_of, settings, max_pixels, key_hashes, votes_folder, versions, listen, heat_maps
    )
