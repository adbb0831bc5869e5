"""Reads the body of a request: bounded in size, in time, and in the memory of all requests together."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from mmedpo_ray.serve.admission import Place
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.settings import ServeConfig

_MIB = 2**20


async def read_body(
    request: Request, settings: ServeConfig, place: Place, content_type: str = "application/json"
) -> bytes:
    """The body.

    Args:
        request: whose body is unread.
        settings: limits.
        place: of the request in the queue, which also counts its bytes.
        content_type: of the body; a web page of another origin cannot send it without being asked first.

    Raises:
        RequestError: 415 (another type), 413 (too large), 408 (too slow), 429 (too many bytes in all).
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != content_type:
        raise RequestError(415, f"Content-Type must be {content_type}", reason="content_type")
    most = int(settings.max_body_mib * _MIB)
    too_large = RequestError(413, f"the body is larger than {settings.max_body_mib:g} MiB", reason="limit")
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit():
        if int(length) > most:
            raise too_large
        place.hold(int(length))
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise too_large
                place.hold(len(body))
    except TimeoutError:
        raise RequestError(
            408, f"the body did not arrive within {settings.body_timeout_s:g} s", reason="timeout"
        ) from None
    except ClientDisconnect:
        raise RequestError(400, "the connection ended before the body did", reason="disconnect") from None
    return bytes(body)
