"""The images of a request, decoded as training decodes them.

The engine gets every image as a lossless 8-bit PNG (or the client's own plain PNG or JPEG), so that the model
sees the picture that it was trained on: 16 bits, transparency, palettes, EXIF rotation and DICOM are decoded
by :mod:`mmedpo_ray.io.images`. Sizes are checked before anything is decoded.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import SplitResult, urlsplit

import httpx

from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.images import plain_file
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.request_model import Request
from mmedpo_ray.serve.settings import ServeConfig

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w=.-]+)*;base64,", re.ASCII)
_MIB = 2**20


class RequestImages:
    """Decodes images in a few threads beside the event loop.

    Args:
        settings: limits, and hosts from which images may be fetched.
        max_pixels: larger images are refused before they are decoded (``data.max_pixels``).
    """

    def __init__(self, settings: ServeConfig, max_pixels: int) -> None:
        self._settings = settings
        self._max_pixels = max_pixels
        self._hosts = {host.lower() for host in settings.allowed_image_hosts}
        self._pool = ThreadPoolExecutor(settings.image_threads, thread_name_prefix="image")

    async def replace(self, request: Request) -> None:
        """Replaces each image address of a request by a data URL that the engine reads as training does.

        Raises:
            RequestError: an address is not allowed, or an image is damaged or too large.
        """
        for param, image in request.images():
            data = await self._bytes(image.url, param)
            loop = asyncio.get_running_loop()
            image.url = await loop.run_in_executor(self._pool, self._plain, data, param)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _bytes(self, url: str, param: str) -> bytes:
        if url.startswith("data:"):
            return self._from_data_url(url, param)
        target = _split(url, param)
        if target.hostname is None or target.hostname.lower() not in self._hosts:
            raise RequestError(
                400,
                "an image is a data URL; other addresses need their host in serve.allowed_image_hosts",
                param=param,
                reason="image_address",
            )
        return await self._fetch(url, param)

    def _from_data_url(self, url: str, param: str) -> bytes:
        head = _DATA_URL.match(url)
        if head is None:
            raise RequestError(
                400, "an image is a data URL: data:image/png;base64,…", param=param, reason="image_address"
            )
        self._check_bytes((len(url) - head.end()) * 3 // 4, param)
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except binascii.Error as error:
            raise RequestError(
                400, "the data URL is not valid base64", param=param, reason="image"
            ) from error

    def _check_bytes(self, size: int, param: str) -> None:
        if size > self._settings.max_image_mib * _MIB:
            raise RequestError(
                413,
                f"an image has {size / _MIB:.1f} MiB; at most {self._settings.max_image_mib:g} here",
                param=param,
                reason="limit",
            )

    def _plain(self, data: bytes, param: str) -> str:
        try:
            content, kind = plain_file(data, "the image", self._max_pixels)
        except ImageError as error:
            raise RequestError(400, f"{error.reason}: {error.detail}", param=param, reason="image") from None
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    async def _fetch(self, url: str, param: str) -> bytes:
        """Downloads an image over HTTPS from a public address, without redirects."""
        target = _split(url, param)
        assert target.hostname is not None
        if target.scheme != "https":
            raise RequestError(400, "images are fetched over HTTPS only", param=param, reason="image_address")
        address = await _public_address(target.hostname, target.port or 443, param)
        # The checked address itself is connected to, so that the name cannot change its meaning meanwhile.
        pinned = httpx.URL(url).copy_with(host=address)
        try:
            async with (
                asyncio.timeout(self._settings.image_timeout_s),
                httpx.AsyncClient(trust_env=False, follow_redirects=False) as client,
                client.stream(
                    "GET",
                    pinned,
                    headers={"Host": target.netloc.rpartition("@")[2]},
                    extensions={"sni_hostname": target.hostname},
                ) as answer,
            ):
                if answer.status_code != 200:
                    raise RequestError(
                        400,
                        f"the image's server answers {answer.status_code}",
                        param=param,
                        reason="image_fetch",
                    )
                content = bytearray()
                async for piece in answer.aiter_raw():
                    content += piece
                    self._check_bytes(len(content), param)
                return bytes(content)
        except (httpx.HTTPError, TimeoutError) as error:
            raise RequestError(
                400,
                f"the image cannot be fetched ({type(error).__name__})",
                param=param,
                reason="image_fetch",
            ) from error


def _split(url: str, param: str) -> SplitResult:
    try:
        found = urlsplit(url)
        found.port  # noqa: B018 - raises for a port that is no number
    except ValueError as error:
        raise RequestError(400, "the address is not valid", param=param, reason="image_address") from error
    return found


async def _public_address(host: str, port: int, param: str) -> str:
    """An address of the host; all of them must be public."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RequestError(400, "the image's host is unknown", param=param, reason="image_fetch") from error
    addresses = [str(item[4][0]) for item in found]
    if not addresses or not all(ipaddress.ip_address(address).is_global for address in addresses):
        raise RequestError(
            400, "the image's host is not at a public address", param=param, reason="image_address"
        )
    return addresses[0]
