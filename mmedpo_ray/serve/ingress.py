"""The deployments of an endpoint: vLLM engines (Ray's ``LLMServer``), and one OpenAI ingress for all.

Ray's own ingress (``build_openai_app``) knows one name per deployment, and adapters only from cloud storage.
It lets any web page that a user visits talk to the endpoint (CORS ``*``), and it imports vLLM, as does the
process that builds the application. This one also routes the names of an engine's adapters, allows no foreign
origins, and passes bodies through unread. Only a process with an engine imports vLLM, which more than halves
the start on a small machine.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.deployment import Application
from ray.serve.handle import DeploymentHandle

_http = FastAPI(title="mmedpo-ray", docs_url=None, redoc_url=None, openapi_url=None)


class EngineServer:
    """One vLLM engine, run by Ray's ``LLMServer``.

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
        """What the engine answers: responses, lists of events, or a single error."""
        from pydantic import ValidationError
        from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest, ErrorResponse

        try:
            request: Any = (ChatCompletionRequest if kind == "chat" else CompletionRequest)(**body)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            message = f"{where}: {problem['msg']}" if where else problem["msg"]
            yield ErrorResponse(error={"message": message, "type": "invalid_request_error", "code": 400})
            return
        run = self._server.chat if kind == "chat" else self._server.completions
        async for item in await run(request):
            yield item


# Serve copies the class below when it is decorated, so what it uses must be defined above it.
def _error(status: int, message: str, kind: str = "invalid_request_error") -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)


@serve.ingress(_http)
class OpenAiIngress:
    """The HTTP side: which engine answers for which model name.

    Args:
        engines: handle by the name of the engine's whole model.
        names_of: for each engine, every name it answers for (itself and its adapters).
    """

    def __init__(self, engines: dict[str, DeploymentHandle], names_of: dict[str, list[str]]) -> None:
        self._parents = {name: engine for engine, names in names_of.items() for name in names}
        self._handles = {name: engines[engine] for name, engine in self._parents.items()}

    @_http.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @_http.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card(name) for name in self._handles]}

    @_http.get("/v1/models/{name:path}")
    async def model(self, name: str) -> Response:
        if name not in self._handles:
            return self._unknown(name)
        return JSONResponse(self._card(name))

    @_http.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await self._forward("chat", request)

    @_http.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._forward("completions", request)

    async def _forward(self, kind: str, request: Request) -> Response:
        try:
            body = json.loads(await request.body())
        except ValueError:
            return _error(400, "the body is not valid JSON")
        if not isinstance(body, dict):
            return _error(400, "the body must be a JSON object")
        handle = self._handles.get(str(body.get("model")))
        if handle is None:
            return self._unknown(body.get("model"))
        if not body.get("stream"):
            status, text = await handle.answer.remote(kind, body)
            return Response(text, status, media_type="application/json")
        items: Any = handle.options(stream=True).stream.remote(kind, body)
        try:
            status, first = await items.__anext__()
        except StopAsyncIteration:
            return _error(500, "the engine gave no answer")
        if status != 200:
            return Response(first, status, media_type="application/json")

        async def events() -> AsyncIterator[str]:
            yield first
            async for _, text in items:
                yield text

        return StreamingResponse(events(), media_type="text/event-stream")

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "mmedpo-ray",
            "parent": None if self._parents[name] == name else self._parents[name],
        }

    def _unknown(self, name: Any) -> Response:
        return _error(
            404, f"there is no model {name!r}; there are {', '.join(self._handles)}", "model_not_found"
        )


def build_ingress(engines: dict[str, Application], names_of: dict[str, list[str]]) -> Application:
    """Puts the ingress before the engines; see :class:`OpenAiIngress`."""
    make = serve.deployment(max_ongoing_requests=1000, num_replicas=1, ray_actor_options={"num_cpus": 0})
    return make(OpenAiIngress).bind(engines, names_of)
