"""One vLLM engine in a Serve replica, behind Ray's ``LLMServer``."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class EngineServer:
    """Answers requests with one vLLM engine.

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
        """Returns once the engine of a replica is alive."""
        await self._server.check_health()

    async def answer(self, kind: str, body: dict[str, Any]) -> tuple[int, str]:
        """A whole answer: HTTP status and JSON text. ``kind`` is chat or completions."""
        response = [item async for item in self._items(kind, body)][-1]
        error = getattr(response, "error", None)
        return (int(error.code) if error is not None else 200), response.model_dump_json()

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[tuple[int, str]]:
        """An answer in server-sent events; an error before the first one is a single item with its status."""
        async for items in self._items(kind, body):
            for item in items if isinstance(items, list) else [items]:
                if isinstance(item, str):
                    yield 200, item
                else:
                    yield int(item.error.code), item.model_dump_json()

    async def _items(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Any]:
        """What the engine answers: responses, lists of events, or a single error.

        No exception leaves the replica: whoever unpickles one of vLLM's must import vLLM, for seconds.
        """
        from pydantic import ValidationError
        from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            request: Any = (ChatCompletionRequest if kind == "chat" else CompletionRequest)(**body)
            run = self._server.chat if kind == "chat" else self._server.completions
            async for item in await run(request):
                yield item
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            yield _error(400, f"{where}: {problem['msg']}" if where else problem["msg"], where or None)
        except EngineDeadError:
            yield _error(503, "the engine has stopped and is started again; try again after Retry-After")
        except (VLLMClientError, ValueError) as error:
            # A prompt that is too long, parameters that exclude each other, a schema without grammar.
            message = (str(error).splitlines() or [type(error).__name__])[0]
            yield _error(400, message[:300], getattr(error, "parameter", None))
        except Exception as error:
            log.error("a request failed in the engine: %s", type(error).__name__)
            yield _error(500, f"the engine failed ({type(error).__name__})")


def _error(status: int, message: str, param: str | None = None) -> Any:
    from ray.serve.llm.openai_api_models import ErrorResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorResponse(error={"message": message, "type": kind, "param": param, "code": status})
