"""What an ingress keeps track of while it runs: versions that answer, and engines without a replica."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from typing import cast

from ray import serve

from mmedpo_ray.serve.versions import VersionFolder

log = logging.getLogger(__name__)

_INTERVAL_S = 0.5
# A controller that starts again calls replicas that answer RECOVERING.
_DO_NOT_ANSWER = ("STARTING", "STOPPING", "STOPPED")
_UNKNOWN_START_S = 5.0
# Clients of the OpenAI API wait no longer than that.
_LONGEST_RETRY_AFTER_S = 60.0


def deployment_name(engine: str) -> str:
    """Name of an engine's Serve deployment."""
    return f"engine:{engine}"


def has_replica(states: Mapping[str, int]) -> bool:
    """Whether one of a deployment's replicas, counted by their states, answers requests."""
    return any(count for state, count in states.items() if state not in _DO_NOT_ANSWER)


class StartTimes:
    """How long the last start of each engine took, and how much of that is left of the present one."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._took_s: dict[str, float] = {}

    def begin(self, engine: str) -> None:
        """An engine is down from now on."""
        self._began[engine] = time.monotonic()

    def end(self, engine: str) -> None:
        """It answers."""
        self._took_s[engine] = time.monotonic() - self._began.pop(engine)

    def seconds_left(self, engine: str) -> float:
        """Seconds until it is likely to answer, from 1 to 60."""
        took = self._took_s.get(engine, _UNKNOWN_START_S)
        now = time.monotonic()
        left = took - (now - self._began.get(engine, now))
        return min(_LONGEST_RETRY_AFTER_S, left if left >= 1 else _UNKNOWN_START_S)


class EngineWatch:
    """Looks twice a second which version answers under each name, and which engines have a replica.

    The number of replicas comes from Serve's controller, since a question to an engine that was scaled to
    zero would start it. Must be made in a running event loop.

    Args:
        engines: names of the engines' whole models.
        versions: of adapters; None: names are versions.
    """

    def __init__(self, engines: Iterable[str], versions: VersionFolder | None) -> None:
        self._engines = tuple(engines)
        self._versions = versions
        self._current = self._read_versions()
        self._app_name = serve.get_replica_context().app_name
        self.without_replica: set[str] = set()
        self._stopped: set[str] = set()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def version(self, name: str) -> str:
        """What the engine calls the model that answers under a name."""
        return self._current.get(name, name)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                self._current = await asyncio.to_thread(self._read_versions)
                stopped = await asyncio.to_thread(self._find_stopped)
                # Twice in a row: a controller that starts again knows no replica for a moment.
                self.without_replica = stopped & self._stopped
                self._stopped = stopped
            except Exception as error:
                # A storage or a controller that is away for a moment changes nothing.
                log.warning("versions and replicas cannot be read: %s", type(error).__name__)

    def _read_versions(self) -> dict[str, str]:
        if self._versions is None:
            return {}
        return {name: alias.current for name, alias in self._versions.read().items()}

    def _find_stopped(self) -> set[str]:
        app = serve.status().applications.get(self._app_name)
        deployments = app.deployments if app is not None else {}
        return {
            name
            for name in self._engines
            if (engine := deployments.get(deployment_name(name))) is not None
            # The values of the states, whatever the annotation says.
            and not has_replica(cast(dict[str, int], engine.replica_states))
        }
