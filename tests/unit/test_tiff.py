"""TIFF of every depth, sign and layout, with white as zero or black as zero, beside what was written."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import tifffile

from mmedpo_ray.io import images

SHARES = np.tile(np.linspace(0, 1, 64), (32, 1))
GREYS = np.linspace(0, 255, 64)
HIGHEST = {
    "u1": 255,
    "u2": 2**16 - 1,
    "u4": 2**32 - 1,
    "f2": 1,
    "f4": 1,
    "f8": 1,
    "i1": 127,
    "i2": 2**15 - 1,
    "i4": 2**31 - 1,
}


def ramp(dtype: str) -> np.ndarray:
    shares = SHARES * 2 - 1 if dtype.startswith("i") else SHARES
    return (shares * HIGHEST[dtype]).astype(dtype)


def written(pixels: np.ndarray, **how: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **how)
    return buffer.getvalue()


def seen(data: bytes, **how: Any) -> np.ndarray:
    return np.asarray(images.to_rgb(images.decode(data, "x.tif", **how)))[0].astype(int)


def expected(photometric: str) -> np.ndarray:
    return GREYS[::-1] if photometric == "miniswhite" else GREYS


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("dtype", HIGHEST)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_every_depth_and_sign(photometric: str, dtype: str, byteorder: Any) -> None:
    data = written(ramp(dtype), photometric=photometric, byteorder=byteorder)
    assert np.abs(seen(data)[:, 0] - expected(photometric)).max() <= 2


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize(
    "how", [{"compression": "zlib"}, {"tile": (16, 16)}, {"bigtiff": True}, {"rowsperstrip": 5}]
)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_every_layout(photometric: str, how: dict[str, Any], dtype: str) -> None:
    data = written(ramp(dtype), photometric=photometric, **how)
    assert np.abs(seen(data)[:, 0] - expected(photometric)).max() <= 2


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_single_bits(photometric: str) -> None:
    found = seen(written(SHARES > 0.5, photometric=photometric))[:, 0]
    assert (found == np.where((SHARES[0] > 0.5) == (photometric == "minisblack"), 255, 0)).all()


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i4", "f4", "f8"])
def test_pages(photometric: str, dtype: str) -> None:
    pixels = ramp(dtype)
    data = written(np.stack([pixels[:, ::-1], pixels, pixels[:, ::-1]]), photometric=photometric)
    assert images.count_frames(data, "x") == 3
    assert np.abs(seen(data, frame=2)[:, 0] - expected(photometric)).max() <= 2


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_colours_pixel_by_pixel_and_plane_by_plane(planes: str, dtype: str) -> None:
    red = ramp(dtype)
    colours = [red, red[:, ::-1], red // 2]
    pixels = np.stack(colours, axis=0 if planes == "separate" else -1)
    found = seen(written(pixels, photometric="rgb", planarconfig=planes))
    right = np.stack([GREYS, GREYS[::-1], GREYS / 2], axis=-1)
    assert np.abs(found - right).max() <= 2


def test_a_size_limit_counts_before_anything_is_decoded() -> None:
    for dtype in ("u2", "f8", "u4"):
        with pytest.raises(images.ImageError) as error:
            images.decode(written(ramp(dtype)), "x", max_pixels=100)
        assert error.value.reason == "image_too_large"
