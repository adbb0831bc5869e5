"""PNG files: written so that any reader reads them back, read exactly as Pillow reads them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from mmedpo_ray.io import images, png
from mmedpo_ray.io.image_error import MADE_BY

BANDS: dict[str, tuple[int, ...]] = {"L": (), "I;16": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}


def pixels_of(mode: str, height: int, width: int, seed: int) -> np.ndarray:
    high, kind = (65536, np.uint16) if mode == "I;16" else (256, np.uint8)
    return np.random.default_rng(seed).integers(0, high, (height, width, *BANDS[mode])).astype(kind)


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


@settings(max_examples=80)
@given(
    mode=st.sampled_from(sorted(BANDS)),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    seed=st.integers(0, 100),
)
def test_files_read_back_as_they_were(mode: str, height: int, width: int, seed: int) -> None:
    pixels = pixels_of(mode, height, width, seed)
    data = png.encode_pixels(pixels)
    read = Image.open(io.BytesIO(data))
    read.load()
    assert (read.mode, read.size) == (mode, (width, height))
    assert np.array_equal(np.asarray(read), pixels)
    Image.open(io.BytesIO(data)).verify()
    assert png.encode_pixels(pixels.copy()) == data
    # The stream is a zlib one, whoever wrote it.
    length = struct.unpack(">I", data[33:37])[0]
    assert len(zlib.decompress(data[41 : 41 + length])) == height * (1 + pixels[0].nbytes)


@settings(max_examples=80)
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    level=st.integers(0, 9),
    seed=st.integers(0, 100),
)
def test_decoding_gives_what_pillow_gives(mode: str, height: int, width: int, level: int, seed: int) -> None:
    source = "L" if mode in ("1", "P") else mode
    image = Image.fromarray(pixels_of(source, height, width, seed))
    data = saved(image.convert(mode) if mode != source else image, compress_level=level)
    expected = Image.open(io.BytesIO(data))
    read = images.decode(data, "x.png")
    assert png.unpacked(data) is not data
    assert (read.mode, read.size, read.format) == (expected.mode, expected.size, "PNG")
    assert np.array_equal(np.asarray(read), np.asarray(expected))


def test_transparency_palette_and_text_are_kept() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("after", "kept")
    palette = Image.fromarray(pixels_of("L", 20, 20, 0)).convert("P")
    data = saved(palette, transparency=3, pnginfo=info, dpi=(100, 100))
    read, expected = images.decode(data, "x.png"), Image.open(io.BytesIO(data))
    expected.load()
    assert png.unpacked(data) is not data
    assert read.info == expected.info | {MADE_BY: ["PNG"]}
    assert np.array_equal(np.asarray(images.to_rgb(read)), np.asarray(images.to_rgb(expected)))


def test_pixels_in_several_chunks_are_put_together() -> None:
    data = saved(Image.fromarray(pixels_of("RGB", 300, 300, 0)))
    assert data.count(b"IDAT") > 1
    assert png.unpacked(data).count(b"IDAT") == 1
    assert np.array_equal(np.asarray(images.decode(data, "x.png")), pixels_of("RGB", 300, 300, 0))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:60] + b"\xff\xff\xff\xff" + data[64:],
        lambda data: data[:8],
        lambda data: data[:30],
    ],
)
def test_a_damaged_file_is_undecodable(damage: object) -> None:
    data = damage(saved(Image.fromarray(pixels_of("L", 50, 50, 0))))  # type: ignore[operator]
    assert png.unpacked(data) == data
    with pytest.raises(images.ImageError, match="image_undecodable"):
        images.decode(data, "x.png")


def test_no_more_is_inflated_than_the_header_announces() -> None:
    """A stream that goes on for a gigabyte behind a header of four pixels."""
    deflate = zlib.compressobj(9)
    stream = b"".join(deflate.compress(bytes(2**20)) for _ in range(64)) + deflate.flush()
    small = saved(Image.new("L", (2, 2)))
    at = small.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(stream)) + b"IDAT" + stream
    data = small[:at] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + small[small.index(b"IEND") - 4 :]
    assert png.unpacked(data) is data
    assert images.decode(data, "x.png").size == (2, 2)


@given(place=st.integers(8, 400), value=st.integers(0, 255))
def test_any_changed_byte_is_judged_as_pillow_judges_it(place: int, value: int) -> None:
    good = saved(Image.fromarray(pixels_of("L", 20, 20, 1)))
    data = bytearray(good)
    data[place % len(good)] = value
    bad = bytes(data)
    try:
        image = Image.open(io.BytesIO(bad))
        image.load()
    except Exception:
        expected = None
    else:
        expected = np.asarray(image)
    try:
        read = np.asarray(images.decode(bad, "x.png", max_pixels=10**6))
    except images.ImageError as error:
        assert expected is None or error.reason == "image_too_large"
    else:
        assert expected is not None
        assert np.array_equal(read, expected)
