"""DICOM pixels in their words: which bits count, padding outside of them, floats, colours of few bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dicom_files import CT, HOUNSFIELD, RAMP, SIDE, SPREAD, STEPS, colour_of, dataset_of, file_of, seen, shown
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import RLELossless

from mmedpo_ray.io import images

WINDOW = {"WindowCenter": 2000, "WindowWidth": 3000}


@pytest.mark.parametrize("tags", [{}, WINDOW, {"PhotometricInterpretation": "MONOCHROME1"}])
@pytest.mark.parametrize("compress", [False, True])
def test_pixels_in_the_upper_bits_of_their_words(tags: dict[str, Any], compress: bool) -> None:
    plain = dataset_of(RAMP, 12, **tags)
    upper = dataset_of(RAMP << 4, 12, HighBit=15, **tags)
    if compress:
        file_of(upper)
        upper.compress(RLELossless)
        assert (np.asarray(images.decode(file_of(upper, RLELossless), "x")) == shown(plain)).all()
    else:
        assert (shown(upper) == shown(plain)).all()


def test_the_upper_bits_are_taken_only_where_there_is_something() -> None:
    """A HighBit that the writer has wrong."""
    assert (shown(dataset_of(RAMP, 12, HighBit=15)) == shown(dataset_of(RAMP, 12))).all()


@pytest.mark.parametrize("tags", [{}, WINDOW])
def test_overlays_in_unused_bits_do_not_show(tags: dict[str, Any]) -> None:
    overlay = RAMP | np.where(np.arange(SIDE) % 7 == 0, 0x8000, 0x1000).astype(np.uint16)
    assert (shown(dataset_of(overlay, 12, **tags)) == shown(dataset_of(RAMP, 12, **tags))).all()


@given(st.integers(2, 16), st.booleans(), st.integers(0, 2**16 - 1))
def test_every_depth_in_16_bits(bits: int, signed: bool, noise: int) -> None:
    """The unused bits may hold anything."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    values = np.tile(np.linspace(low, high, SIDE).round().astype(np.int64), (4, 1))
    words = ((values & (2**bits - 1)) | (noise << bits)) & 0xFFFF
    made = dataset_of(words.astype(np.uint16), bits, PixelRepresentation=int(signed))
    expected = (values[0] - low) * 255 / (high - low)
    assert np.abs(seen(made) - expected).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "bits", "padding", "vr"),
    [
        (CT // 2, 11, -2000, "SS"),
        (CT // 2, 11, 63536, "US"),
        (RAMP, 12, 63536, "US"),
        (RAMP, 12, -2000, "SS"),
        (RAMP, 12, 65535, "US"),
    ],
)
@pytest.mark.parametrize("inverted", [False, True])
def test_padding_outside_the_bits_that_are_stored(
    pixels: np.ndarray, bits: int, padding: int, vr: str, inverted: bool
) -> None:
    padded = pixels.copy()
    padded[:, :4] = np.array([padding & 0xFFFF], np.uint16).view(padded.dtype)
    made = dataset_of(padded, bits)
    made.add_new("PixelPaddingValue", vr, padding)
    if inverted:
        made.PhotometricInterpretation = "MONOCHROME1"
    inside = pixels[0, 4:].astype(float)
    expected = np.round((inside - inside.min()) * 255 / np.ptp(inside))
    found = seen(made)
    assert np.abs(found[4:] - (255 - expected if inverted else expected)).max() <= 1
    # Not a grey among those of the image.
    assert set(found[:4]) <= {0, 255}
    made.WindowCenter, made.WindowWidth = float(inside.mean()), float(np.ptp(inside))
    assert set(seen(made)[:4]) <= {0, 255}


@pytest.mark.parametrize(("vr", "value"), [("SS", -1), ("US", 65535), ("US", 255)])
def test_padding_of_bytes(vr: str, value: int) -> None:
    pixels = np.tile(np.arange(SIDE, dtype=np.uint8) + 20, (4, 1))
    pixels[:, :4] = 255
    made = dataset_of(pixels)
    made.add_new("PixelPaddingValue", vr, value)
    assert np.abs(seen(made)[4:] - np.round(np.arange(SIDE - 4) * 255 / (SIDE - 5))).max() <= 1


def float_dataset(pixels: np.ndarray) -> Dataset:
    made = dataset_of(pixels)
    name = "FloatPixelData" if pixels.dtype.itemsize == 4 else "DoubleFloatPixelData"
    setattr(made, name, made.PixelData)
    for gone in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(made, gone)
    return made


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("limit", [False, True])
def test_padding_of_floats_and_what_is_no_number(dtype: str, limit: bool) -> None:
    pixels = (RAMP + 1000).astype(dtype)
    pixels[:, :4] = -1e9
    pixels[:, 5] = np.nan
    made = float_dataset(pixels)
    prefix = "Float" if dtype == "<f4" else "DoubleFloat"
    setattr(made, f"{prefix}PixelPaddingValue", -2e9 if limit else -1e9)
    if limit:
        setattr(made, f"{prefix}PixelPaddingRangeLimit", -1e8)
    found = seen(made)
    expected = np.round((STEPS - STEPS[4]) * 255 / (STEPS[-1] - STEPS[4]))
    assert np.abs(found[6:] - expected[6:]).max() <= 1
    assert not found[:4].any()
    assert found[5] == 0


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 16])
@pytest.mark.parametrize("planar", [0, 1])
def test_colours_of_every_depth(bits: int, planar: int) -> None:
    dtype = np.uint8 if bits <= 8 else np.uint16
    ramp = np.linspace(0, 2**bits - 1, SIDE).round().astype(dtype)
    pixels = np.stack([np.tile(each, (4, 1)) for each in (ramp, ramp[::-1], ramp // 2)], axis=-1)
    made = colour_of(pixels, bits, PlanarConfiguration=planar)
    if planar:
        made.PixelData = np.ascontiguousarray(np.moveaxis(pixels, -1, 0)).tobytes()
    expected = pixels.astype(float) * 255 / (2**bits - 1)
    assert np.abs(shown(made) - expected).max() <= 1


@pytest.mark.parametrize(
    "term", ["YBR_FULL", "ybr full", "YCbCr", "YBR_FULL_422", "YBR-FULL-422", "YBR_PARTIAL_422"]
)
def test_luminance_and_differences_with_all_their_samples(term: str) -> None:
    """Uncompressed files that declare halved differences and have them whole."""
    rgb = np.stack(
        [np.tile(np.arange(SIDE) * 4, (4, 1)), np.full((4, SIDE), 90), np.full((4, SIDE), 30)], axis=-1
    )
    # JFIF's matrix, which PS3.3 C.7.6.3.1.2 names.
    red, green, blue = (rgb[..., index].astype(float) for index in range(3))
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    stored = np.stack([luminance, (blue - luminance) / 1.772 + 128, (red - luminance) / 1.402 + 128], axis=-1)
    made = colour_of(np.round(stored).clip(0, 255).astype(np.uint8), PhotometricInterpretation=term)
    assert np.abs(shown(made).astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_halved_differences_with_more_frames_than_declared(frames: int) -> None:
    made = colour_of(np.zeros((4, 8, 3), np.uint8), PhotometricInterpretation="YBR_FULL_422")
    # Two luminances and one of each difference for two pixels: mid-grey.
    made.PixelData = bytes([100, 100, 128, 128]) * 16 * frames
    assert (shown(made) == 100).all()


def test_the_ramp_without_anything() -> None:
    assert (seen(dataset_of(RAMP, 12)) == SPREAD).all()
    assert np.abs(seen(dataset_of(CT)) - np.round((HOUNSFIELD + 1000) * 255 / 2000)).max() <= 1
