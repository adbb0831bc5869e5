"""The images of a request, decoded as training decodes them.

The engine gets every image as a lossless 8-bit PNG (or the client's own plain PNG or JPEG), so that the model
sees the picture that it was trained on: 16 bits, transparency, palettes, EXIF rotation and DICOM are decoded
by :mod:`mmedpo_ray.io.images`. Sizes are checked before anything is decoded.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re

from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.serve.image_decoder import ImageDecoder
from mmedpo_ray.serve.image_fetch import ImageFetcher
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.request_model import CompletionBody
from mmedpo_ray.serve.settings import ServeConfig

_DATA_URL = re.compile(r"data:(?:image/[\w.+-]{1,64}|application/(?:dicom|octet-stream));base64,", re.ASCII)
_MIB = 2**20


class RequestImages:
    """Replaces the images of requests.

    Args:
        settings: limits, and hosts from which images may be fetched.
        max_pixels: larger images are refused before they are decoded.
    """

    def __init__(self, settings: ServeConfig, max_pixels: int) -> None:
        self._most_bytes = int(settings.max_image_mib * _MIB)
        self._fetcher = ImageFetcher(settings.allowed_image_hosts, self._most_bytes, settings.image_timeout_s)
        self.decoder = ImageDecoder(
            settings.image_workers, max_pixels, self._most_bytes, settings.image_timeout_s
        )

    async def replace(self, body: CompletionBody) -> None:
        """Replaces each image address of a request by a data URL that the engine reads as training does.

        Raises:
            RequestError: an address is not allowed, or an image is damaged or too large.
        """
        for param, image in body.images():
            content, kind = await self.plain_file(image.url, param)
            image.url = f"data:{kind};base64,{base64.b64encode(content).decode()}"

    async def plain_file(self, url: str, param: str) -> tuple[bytes, str]:
        """The image at an address as a file that every decoder reads as training does, and its media type.

        Args:
            url: a data URL, or an address on an allowed host.
            param: the field of the request that holds it, for messages.

        Raises:
            RequestError: 400 with the reason of :class:`mmedpo_ray.io.image_error.ImageError` as its code.
        """
        if url[:5].lower() == "data:":
            data = await asyncio.to_thread(self._from_data_url, url, param)
        else:
            data = await self._fetcher.fetch(url, param)
        try:
            return await self.decoder.plain(data)
        except ImageError as error:
            message = error.detail.replace("the image: ", "the image cannot be used: ", 1)
            raise RequestError(400, message, param=param, reason=error.reason, code=error.reason) from None

    def _from_data_url(self, url: str, param: str) -> bytes:
        head = _DATA_URL.match(url)
        if head is None:
            raise RequestError(
                400,
                "an image is a data URL: data:image/png;base64,… or data:application/dicom;base64,…",
                param=param,
                reason="image_address",
            )
        size = (len(url) - head.end()) * 3 // 4
        if size > self._most_bytes + 2:
            raise RequestError(
                413,
                f"an image has {size / _MIB:.1f} MiB; at most {self._most_bytes / _MIB:g} here",
                param=param,
                reason="limit",
            )
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(
                400, "the data URL is not valid base64", param=param, reason="image_address"
            ) from None
