"""Images are decoded in processes that may die, and fetched from hosts that may misbehave."""

from __future__ import annotations

import asyncio
import datetime
import io
import ipaddress
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from endpoint_app import png
from PIL import Image

from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.serve.image_decoder import ImageDecoder
from mmedpo_ray.serve.image_fetch import ImageFetcher, is_public
from mmedpo_ray.serve.request_error import RequestError


def tiff() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 500).save(buffer, "TIFF")
    return buffer.getvalue()


DEEP = tiff()


@pytest.fixture
def decoder() -> Iterator[ImageDecoder]:
    made = ImageDecoder(1, max_pixels=10_000, max_bytes=100_000, timeout_s=20)
    yield made
    made.close()


def worker_pid(decoder: ImageDecoder) -> int:
    [worker] = decoder._workers
    assert worker._process is not None
    return worker._process.pid


def decode(decoder: ImageDecoder, data: bytes) -> np.ndarray:
    picture, kind = asyncio.run(decoder.plain(data))
    assert kind == "image/png"
    return np.asarray(Image.open(io.BytesIO(picture)))


def test_what_is_no_small_plain_file_is_decoded_in_a_process(decoder: ImageDecoder) -> None:
    asyncio.run(decoder.plain(png()))
    assert not decoder._workers
    assert decode(decoder, DEEP).max() == 255
    first = worker_pid(decoder)
    assert first != os.getpid()
    decode(decoder, DEEP)
    assert worker_pid(decoder) == first, "it is kept"


def test_a_decoder_process_has_no_keys(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEDPO_API_KEYS", "a-key-of-this-test-0123456789")
    decode(decoder, DEEP)
    environment = Path(f"/proc/{worker_pid(decoder)}/environ").read_bytes()
    assert b"PATH" in environment and b"a-key-of-this-test" not in environment


def test_a_decoder_process_that_dies_costs_its_own_image(decoder: ImageDecoder) -> None:
    decode(decoder, DEEP)
    first = worker_pid(decoder)
    os.kill(first, signal.SIGSTOP)

    async def kill_meanwhile() -> None:
        task = asyncio.create_task(decoder.plain(DEEP))
        await asyncio.sleep(0.2)
        os.kill(first, signal.SIGKILL)
        await task

    with pytest.raises(ImageError, match="image_undecodable: the image: its decoder broke off"):
        asyncio.run(kill_meanwhile())
    assert decode(decoder, DEEP).max() == 255
    os.kill(worker_pid(decoder), signal.SIGKILL)
    time.sleep(0.2)
    assert decode(decoder, DEEP).max() == 255, "one that died while idle is started again"


def test_an_image_that_takes_too_long_is_given_up() -> None:
    decoder = ImageDecoder(1, max_pixels=10_000, max_bytes=100_000, timeout_s=20)
    decode(decoder, DEEP)
    decoder._timeout_s = 0.3
    os.kill(worker_pid(decoder), signal.SIGSTOP)
    with pytest.raises(ImageError, match="image_too_slow"):
        asyncio.run(decoder.plain(DEEP))
    decoder._timeout_s = 20
    assert decode(decoder, DEEP).max() == 255
    decoder.close()


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA"])
def test_an_image_just_above_the_limit_is_refused_at_once(decoder: ImageDecoder, mode: str) -> None:
    shape: tuple[int, ...] = (100, 101) + ((4,) if mode == "RGBA" else ())
    data = png(np.zeros(shape, np.uint16 if mode == "I;16" else np.uint8))
    with pytest.raises(ImageError, match="image_too_large"):
        asyncio.run(decoder.plain(data))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::", "ff02::1",
    ],
)  # fmt: skip
def test_no_address_of_the_own_network_is_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    assert is_public(ipaddress.ip_address("1.1.1.1")) and is_public(ipaddress.ip_address("2606:4700::1"))


HOST = "images.example"


def certificate(folder: Path) -> ssl.SSLContext:
    """A server's context for HOST; its certificate, which clients trust, is at ``folder/cert``."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert", folder / "key")
    return context


async def serve_images(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    assert f"Host: {HOST}" in head
    path = head.split()[1]
    if path == "/slow":
        await asyncio.sleep(3)
    status = "302 Found\r\nLocation: https://images.example/image" if path == "/moved" else "200 OK"
    body = png() * (1000 if path == "/large" else 1)
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    writer.close()


@asynccontextmanager
async def image_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[int, Any]]:
    server = await asyncio.start_server(serve_images, "127.0.0.1", 0, ssl=certificate(folder))
    loop = asyncio.get_running_loop()
    resolve = loop.getaddrinfo

    async def to_here(host: Any, *more: Any, **options: Any) -> Any:
        return await resolve("127.0.0.1" if host == HOST else host, *more, **options)

    monkeypatch.setattr(loop, "getaddrinfo", to_here)
    async with server:
        yield server.sockets[0].getsockname()[1], ssl.create_default_context(cafile=str(folder / "cert"))


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/image", 200, ""),
        ("/moved", 400, "answers 302"),
        ("/large", 413, "more than 10000 bytes"),
        ("/slow", 400, "cannot be fetched"),
    ],
)
def test_an_image_is_fetched_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, status: int, message: str
) -> None:
    async def fetch() -> bytes:
        async with image_host(tmp_path, monkeypatch) as (port, trusted):
            fetcher = ImageFetcher(
                (HOST,), 10_000, 1, verify=trusted, is_allowed=lambda found: found.is_loopback
            )
            return await fetcher.fetch(f"https://{HOST}:{port}{path}", "x")

    if status == 200:
        assert asyncio.run(fetch()) == png()
    else:
        with pytest.raises(RequestError, match=message) as caught:
            asyncio.run(fetch())
        assert caught.value.status == status


def test_a_host_that_is_another_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch() -> None:
        async with image_host(tmp_path, monkeypatch) as (port, trusted):
            hosts = ("localhost",)
            fetcher = ImageFetcher(hosts, 10_000, 1, verify=trusted, is_allowed=lambda found: True)
            await fetcher.fetch(f"https://localhost:{port}/image", "x")

    with pytest.raises(RequestError, match="cannot be fetched"):
        asyncio.run(fetch())
