"""One vLLM engine in a Serve replica, behind Ray's ``LLMServer``."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

from mmedpo_ray.serve.engine_adapters import EngineAdapters
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.versions import VersionFolder

log = logging.getLogger(__name__)

_LONGEST_MESSAGE = 300
# vLLM ends a stream so, also when its engine died.
_ERROR_EVENT = 'data: {"error"'
# How vLLM ends the text of an error: with the field, which has a place of its own, and its value.
_VALUE = re.compile(r" \((?:parameter|value)=.*")


class EngineServer:
    """Answers requests with one vLLM engine.

    No exception leaves the replica because of a request: whoever unpickles one of vLLM's must import vLLM,
    for seconds.

    Args:
        llm_config: arguments of ``ray.serve.llm.LLMConfig``.
        adapters: name → folder of the LoRA adapters that share the engine.
        versions: versions of these adapters, which are loaded instead and while the engine runs.
    """

    # Serve awaits it, as it awaits that of Ray's LLMServer.
    async def __init__(  # type: ignore[misc]
        self,
        llm_config: dict[str, Any],
        adapters: dict[str, str],
        versions: VersionFolder | None = None,
    ) -> None:
        if llm_config.get("accelerator_config") == {"kind": "cpu"}:
            from mmedpo_ray.compat import vllm_preload

            vllm_preload.start()
        from ray.serve.llm import LLMConfig
        from ray.serve.llm.deployment import LLMServer

        arguments = dict(llm_config["engine_kwargs"])
        if adapters and versions is None:
            from vllm.entrypoints.openai.models.protocol import LoRAModulePath

            arguments["lora_modules"] = [
                LoRAModulePath(name=name, path=path) for name, path in adapters.items()
            ]
        config = LLMConfig(**{**llm_config, "engine_kwargs": arguments})
        if Path(llm_config["model_loading_config"]["model_source"]).is_dir():
            # There is nothing to download; Ray would start one more process to look for downloads.
            callback = config.get_or_create_callback()
            assert callback is not None
            callback.ctx.run_init_node = False
        self._server = LLMServer.sync_init(config)
        await self._server.start()
        self._adapters = None
        if versions is not None:
            whole = llm_config["model_loading_config"]["model_id"]
            source = llm_config["model_loading_config"]["model_source"]
            self._adapters = EngineAdapters(self._server.engine, versions, whole, source)
            await self._adapters.load_all()

    async def prepare(self, version: str) -> str | None:
        """Loads a version of an adapter and has it answer; returns what went wrong, or None."""
        assert self._adapters is not None
        if (problem := await self._adapters.problem(version)) is not None:
            return problem
        body = {"model": version, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        status, text = await self.answer("chat", body)
        return None if status == 200 else json.loads(text)["error"]["message"]

    async def check_health(self) -> None:
        """Ends the replica if the engine is dead; Serve then starts another."""
        try:
            await self._server.check_health()
        except Exception as error:
            _end_replica(error)

    async def ping(self) -> None:
        """Returns if the engine is alive; the replica ends if it is dead."""
        await self.check_health()

    async def answer(self, kind: str, body: dict[str, Any]) -> tuple[int, str]:
        """A whole answer: HTTP status and JSON text. ``kind`` is chat or completions."""
        return [item async for item in self._items(kind, body)][-1]

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[tuple[int, str]]:
        """An answer in server-sent events; an error before the first one is a single item with its status."""
        async for item in self._items(kind, body):
            yield item

    async def _items(self, kind: str, body: dict[str, Any]) -> AsyncIterator[tuple[int, str]]:
        try:
            async for item in self._run(kind, body):
                yield item
        except Exception as error:
            if _is_death(error):
                _end_replica(error)
            refused = _as_request_error(error)
            if refused.status >= 500:
                # Its text may quote the request.
                log.error("a request failed in the engine: %s", type(error).__name__)
            yield refused.status, json.dumps(refused.body())

    async def _run(self, kind: str, body: dict[str, Any]) -> AsyncIterator[tuple[int, str]]:
        from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

        if self._adapters is not None:
            await self._adapters.load(body["model"])
        request: Any = (ChatCompletionRequest if kind == "chat" else CompletionRequest)(**body)
        run = self._server.chat if kind == "chat" else self._server.completions
        async for items in await run(request):
            for item in items if isinstance(items, list) else [items]:
                if isinstance(item, str):
                    if item.startswith(_ERROR_EVENT):
                        await self.check_health()
                    yield 200, item
                elif (error := getattr(item, "error", None)) is not None:
                    await self.check_health()
                    raise _from_response(error)
                else:
                    yield 200, item.model_dump_json()


def _is_death(error: Exception) -> bool:
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


def _end_replica(error: Exception) -> NoReturn:
    """Ends the process, as vLLM's own server does once its engine is dead.

    The ingress then sends the requests in flight to another replica. A replica that went on would fail each
    request faster than others answer theirs, and so get the most.
    """
    log.error("the engine is dead (%s); the replica ends", type(error).__name__)
    logging.shutdown()
    os._exit(1)


def _from_response(error: Any) -> RequestError:
    """An error that vLLM or Ray answered with."""
    status = int(error.code)
    if status >= 500:
        return RequestError(status, "the engine failed; the request may work another time", reason="engine")
    return RequestError(status, _short(error.message), param=error.param, reason="engine")


def _as_request_error(error: Exception) -> RequestError:
    from pydantic import ValidationError
    from vllm.exceptions import VLLMClientError

    if isinstance(error, RequestError):
        return error
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = f"{where}: {problem['msg']}" if where else problem["msg"]
        return RequestError(400, _short(message), param=where or None)
    if isinstance(error, VLLMClientError | ValueError):
        # A prompt that is too long, parameters that exclude each other, a schema without grammar.
        return RequestError(400, _short(str(error)), param=getattr(error, "parameter", None))
    return RequestError(500, f"the engine failed ({type(error).__name__})")


def _short(message: str) -> str:
    """The first line of a message, without the value that vLLM adds; the rest may quote the request."""
    line = (message.strip().splitlines() or ["the engine refuses it"])[0]
    return _VALUE.sub("", line)[:_LONGEST_MESSAGE]
