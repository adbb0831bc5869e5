"""The endpoint's HTTP side in this process, before engines that repeat what they get."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import numpy as np
from PIL import Image

from mmedpo_ray.serve.http_app import create_app
from mmedpo_ray.serve.settings import ServeConfig

KEY = "a-key-of-this-test-0123456789"


class Repeating:
    """Engines that answer with the body that reached them.

    Attributes:
        seconds: they take for an answer.
        up: whether they run.
        error: they raise instead of an answer; a stream raises it after its first part.
    """

    def __init__(self) -> None:
        self.models: dict[str, str | None] = {"base": None, "aligned": "base"}
        self.up = True
        self.seconds = 0.0
        self.error: Exception | None = None
        self.bodies: list[dict[str, Any]] = []

    @property
    def engines_up(self) -> int:
        return int(self.up)

    def is_up(self, model: str) -> bool:
        return self.up

    def retry_after_s(self, model: str) -> float:
        return 5.0

    def version(self, model: str) -> str:
        return model

    async def answer(self, kind: str, body: dict[str, Any]) -> tuple[int, str]:
        await asyncio.sleep(self.seconds)
        self.bodies.append(body)
        if self.error is not None:
            raise self.error
        return 200, json.dumps({"kind": kind, "usage": {"prompt_tokens": 3, "completion_tokens": 2}})

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncGenerator[tuple[int, str], None]:
        self.bodies.append(body)
        for word in ("No", "effusion"):
            yield 200, f"data: {json.dumps({'word': word})}\n\n"
            await asyncio.sleep(self.seconds)
            if self.error is not None:
                raise self.error
        if body["stream_options"]["include_usage"]:
            usage = '{"prompt_tokens": 3, "completion_tokens": 2}'
            yield 200, f'data: {{"choices":[],"usage":{usage}}}\n\n'
        yield 200, "data: [DONE]\n\n"


class Endpoint:
    """A client of the application; every request goes through all checks."""

    def __init__(self, *, keys: tuple[str, ...] = (), max_pixels: int = 10_000, **settings: Any) -> None:
        self.engines = Repeating()
        hashes = frozenset(hashlib.sha256(key.encode()).digest() for key in keys)
        folder, heat_maps = settings.pop("votes_folder", None), settings.pop("heat_maps", None)
        self.app = create_app(
            self.engines,
            ServeConfig(**settings),
            max_pixels=max_pixels,
            key_hashes=hashes,
            votes_folder=folder,
            heat_maps=heat_maps,
        )

    def client(self, address: str = "127.0.0.1") -> httpx.AsyncClient:
        """A client on the machine with this address."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, client=(address, 50_000))
        return httpx.AsyncClient(transport=transport, base_url="http://localhost:8000")

    def send(self, method: str, path: str, *, address: str = "127.0.0.1", **more: Any) -> httpx.Response:
        async def one() -> httpx.Response:
            async with self.client(address) as client:
                return await client.request(method, path, **more)

        return asyncio.run(one())

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "base", "messages": [{"role": "user", "content": "Hello"}]} | fields
        headers = {"Content-Type": "application/json"}
        return self.send("POST", "/v1/chat/completions", content=json.dumps(body), headers=headers)


def png(pixels: np.ndarray | None = None, mode: str | None = None) -> bytes:
    """A PNG file, by default 8 × 8 grey pixels."""
    buffer = io.BytesIO()
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) if pixels is None else pixels
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def ask(*urls: str, text: str = "What is seen?") -> list[dict[str, Any]]:
    """Messages with images."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
