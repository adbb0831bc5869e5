"""The endpoint shows a model the pictures that training shows it."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from typing import Any

import numpy as np
import pytest
from dicom_files import RAMP, dataset_of, file_of
from endpoint_app import Endpoint, ask, data_url, png
from PIL import Image

from mmedpo_ray.io import images
from mmedpo_ray.serve import image_decoder
from mmedpo_ray.serve.image_fetch import ImageFetcher

DRAW = np.random.default_rng(0)
GREY = DRAW.integers(0, 255, (12, 16), dtype=np.uint8)
DEEP = DRAW.integers(900, 41_000, (12, 16)).astype(np.uint16)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(GREY), "JPEG", exif=exif)


RGBA = Image.fromarray(DRAW.integers(0, 255, (12, 16, 4), dtype=np.uint8), "RGBA")
FILES = {
    "grey": (png(GREY), "image/png"),
    "16 bits": (png(DEEP), "image/png"),
    "alpha": (saved(RGBA, "PNG"), "image/png"),
    "palette": (saved(Image.fromarray(GREY).convert("P"), "PNG"), "image/png"),
    "cmyk": (saved(Image.fromarray(GREY).convert("CMYK"), "JPEG"), "image/jpeg"),
    "exif": (rotated(), "image/jpeg"),
    "tiff": (saved(Image.fromarray(DEEP), "TIFF"), "image/tiff"),
    "dicom": (file_of(dataset_of(RAMP, 12)), "application/dicom"),
    "dicom without its type": (file_of(dataset_of(RAMP, 12)), "application/octet-stream"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_engine_gets_the_pixels_of_training(name: str) -> None:
    data, kind = FILES[name]
    endpoint = Endpoint()
    assert endpoint.chat(messages=ask(data_url(data, kind))).status_code == 200
    [body] = endpoint.engines.bodies
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    head, _, content = url.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    with Image.open(io.BytesIO(base64.b64decode(content))) as seen:
        assert seen.mode in ("L", "RGB") and "exif" not in seen.info
        shown = np.asarray(seen.convert("RGB"))
    assert np.array_equal(shown, np.asarray(images.to_rgb(images.decode(data, "it"))))


def test_sizes_are_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint, messages = Endpoint(max_pixels=12 * 16), ask(data_url(png(GREY)))
    assert endpoint.chat(messages=messages).status_code == 200
    endpoint = Endpoint(max_pixels=12 * 16 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    answer = endpoint.chat(messages=messages)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "image_too_large"


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.7", "169.254.1.1", "192.168.1.1", "::1", "fd00::1"])
def test_an_allowed_name_at_a_private_address_is_not_fetched(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(*_: object, **__: object) -> list[Any]:
        return [(2, 1, 6, "", ("203.0.113.9", 443)), (2, 1, 6, "", (address, 443))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolve)
    endpoint = Endpoint(allowed_image_hosts=("images.example",))
    answer = endpoint.chat(messages=ask("https://images.example/a.png"))
    assert answer.status_code == 400 and "public" in answer.json()["error"]["message"]


def test_only_https_of_allowed_hosts_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFetcher, "_look_up", lambda *_: pytest.fail("it was looked up"))
    endpoint = Endpoint(allowed_image_hosts=("images.example",))
    for url in ("http://images.example/a.png", "https://other.example/a.png", "https://x@other.example/"):
        assert endpoint.chat(messages=ask(url)).status_code == 400


def test_slow_images_do_not_hold_up_other_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding runs beside the event loop: a request without an image is answered meanwhile."""
    blocked = threading.Event()
    monkeypatch.setattr(image_decoder, "plain_file", lambda *_: (blocked.wait(20), (png(), "image/png"))[1])
    endpoint = Endpoint()

    async def both() -> tuple[int, int]:
        async with endpoint.client() as client:
            body = {"model": "base", "messages": ask(data_url(png()))}
            slow = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await asyncio.sleep(0.1)
            plain = {"model": "base", "messages": ask()}
            other = await client.post("/v1/chat/completions", json=plain)
            assert not slow.done()
            blocked.set()
            return (await slow).status_code, other.status_code

    assert asyncio.run(both()) == (200, 200)
