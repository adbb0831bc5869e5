"""One vLLM engine in a Serve replica, behind Ray's ``LLMServer``."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from mmedpo_ray.serve.request_error import RequestError

log = logging.getLogger(__name__)

_LONGEST_MESSAGE = 300
# How vLLM ends the text of an error: with the field, which has a place of its own, and its value.
_VALUE = re.compile(r" \((?:parameter|value)=.*")


class EngineServer:
    """Answers requests with one vLLM engine.

    No exception leaves the replica because of a request: whoever unpickles one of vLLM's must import vLLM,
    for seconds.

    Args:
        llm_config: arguments of ``ray.serve.llm.LLMConfig``.
        adapters: name → folder of the LoRA adapters that share the engine.
    """

    # Serve awaits it, as it awaits that of Ray's LLMServer.
    async def __init__(self, llm_config: dict[str, Any], adapters: dict[str, str]) -> None:  # type: ignore[misc]
        if llm_config.get("accelerator_config") == {"kind": "cpu"}:
            from mmedpo_ray.compat import vllm_preload

            vllm_preload.start()
        from ray.serve.llm import LLMConfig
        from ray.serve.llm.deployment import LLMServer

        arguments = dict(llm_config["engine_kwargs"])
        if adapters:
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

    async def check_health(self) -> None:
        """Raises if the engine is dead; Serve then replaces the replica."""
        await self._server.check_health()

    async def ping(self) -> None:
        """Returns if the engine is alive.

        Raises:
            RuntimeError: it is dead.
        """
        try:
            await self._server.check_health()
        except Exception as error:
            # vLLM's own error would have to be unpickled by the caller.
            raise RuntimeError(f"the engine is dead ({type(error).__name__})") from None

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
            refused = _as_request_error(error)
            if refused.status >= 500:
                # Its text may quote the request.
                log.error("a request failed in the engine: %s", type(error).__name__)
            yield refused.status, json.dumps(refused.body())

    async def _run(self, kind: str, body: dict[str, Any]) -> AsyncIterator[tuple[int, str]]:
        from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

        request: Any = (ChatCompletionRequest if kind == "chat" else CompletionRequest)(**body)
        run = self._server.chat if kind == "chat" else self._server.completions
        async for items in await run(request):
            for item in items if isinstance(items, list) else [items]:
                if isinstance(item, str):
                    yield 200, item
                elif (error := getattr(item, "error", None)) is not None:
                    raise _from_response(error)
                else:
                    yield 200, item.model_dump_json()


def _from_response(error: Any) -> RequestError:
    """An error that vLLM or Ray answered with."""
    status = int(error.code)
    if status >= 500:
        return RequestError(status, "the engine failed; the request may work another time", reason="engine")
    return RequestError(status, _short(error.message), param=error.param, reason="engine")


def _as_request_error(error: Exception) -> RequestError:
    from pydantic import ValidationError
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, RequestError):
        return error
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = f"{where}: {problem['msg']}" if where else problem["msg"]
        return RequestError(400, _short(message), param=where or None)
    if isinstance(error, EngineDeadError):
        return RequestError(503, "the engine has stopped and is started again; try again after Retry-After")
    if isinstance(error, VLLMClientError | ValueError):
        # A prompt that is too long, parameters that exclude each other, a schema without grammar.
        return RequestError(400, _short(str(error)), param=getattr(error, "parameter", None))
    return RequestError(500, f"the engine failed ({type(error).__name__})")


def _short(message: str) -> str:
    """The first line of a message, without the value that vLLM adds; the rest may quote the request."""
    line = (message.strip().splitlines() or ["the engine refuses it"])[0]
    return _VALUE.sub("", line)[:_LONGEST_MESSAGE]
