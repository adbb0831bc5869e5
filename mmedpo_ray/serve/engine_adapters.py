"""Versions of adapters in a running engine."""

from __future__ import annotations

import asyncio
import json
import types
from typing import Any

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.fingerprint import model_fingerprint
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.versions import ADAPTER_CONFIG, VersionFolder


class EngineAdapters:
    """Loads versions into an engine, each once.

    Args:
        engine: Ray's ``VLLMEngine``.
        versions: where the files are.
        whole: name of the engine's whole model.
        source: its folder, or its name on the hub.
    """

    def __init__(self, engine: Any, versions: VersionFolder, whole: str, source: str) -> None:
        self._engine = engine
        self._versions = versions
        self._source = source
        self._loaded = {whole}
        self._lock = asyncio.Lock()

    async def problem(self, version: str) -> str | None:
        """Why a version must not be loaded: it was trained on another base. None if nothing is wrong."""
        return await asyncio.to_thread(self._find_problem, version)

    def _find_problem(self, version: str) -> str | None:
        settings = json.loads((self._versions.path(version) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = str(settings.get("base_model_name_or_path"))
        if base == self._source:
            return None
        try:
            is_same = model_fingerprint(base) == model_fingerprint(self._source)
        except (UserError, OSError):
            is_same = False
        if is_same:
            return None
        return (
            f"it was trained on {base}, and this engine serves {self._source}. If that is a copy of the same "
            f"model, correct base_model_name_or_path in {ADAPTER_CONFIG} of the run."
        )

    async def load_all(self) -> None:
        """Loads every version that may be asked for."""
        for version in await asyncio.to_thread(self._versions.names):
            await self.load(version)

    async def load(self, model: str) -> None:
        """Loads a version if it is not loaded; does nothing for the whole model.

        vLLM reads the files between two steps of the engine: other requests wait so long, and no longer.

        Raises:
            RequestError: 500, the engine refuses the adapter.
        """
        if model in self._loaded:
            return
        async with self._lock:
            if model in self._loaded:
                return
            path = str(self._versions.path(model))
            try:
                await self._engine.resolve_lora(types.SimpleNamespace(model_id=model, local_path=path))
            except ValueError as error:
                reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
                raise RequestError(500, f"{model} does not load: {reason}", reason="adapter") from None
            self._loaded.add(model)
