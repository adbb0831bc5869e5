"""Reads the body of a request, of a bounded size, within a bounded time."""

from __future__ import annotations

import asyncio

from fastapi import Request

from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.settings import ServeConfig

_MIB = 2**20


async def read_json(request: Request, settings: ServeConfig) -> bytes:
    """The body of a request that must be JSON; it is not parsed.

    Raises:
        RequestError: 415 for another content type, 413 or 408 as :func:`read_body`.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestError(415, "Content-Type must be application/json", reason="content_type")
    return await read_body(request, settings.max_body_mib, settings.body_timeout_s)


async def read_body(request: Request, max_mib: float, timeout_s: float) -> bytes:
    """The body of a request.

    Raises:
        RequestError: 413 if it is larger than ``max_mib``, 408 if it takes longer than ``timeout_s``.
    """
    most = int(max_mib * _MIB)
    too_large = RequestError(413, f"the body is larger than {max_mib:g} MiB", reason="limit")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise RequestError(
            408, f"the body did not arrive within {timeout_s:g} s", reason="timeout"
        ) from error
    return bytes(body)
