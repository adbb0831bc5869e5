"""Kinds of DICOM file that are valid or common, and easily shown wrong: groups, padding, frames, terms,
deflate."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from dicom_files import (
    BYTES,
    CT,
    GREYS,
    RAMP,
    SAMPLES,
    SIDE,
    SPREAD,
    STEPS,
    dataset_of,
    file_of,
    item,
    seen,
    seen_file,
    shown,
    table,
)
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian

from mmedpo_ray.io import images
from mmedpo_ray.io.image_error import ImageError

# ---------------------------------------------------------------------- few bits, floats


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("inverted", [False, True])
def test_few_bits_without_a_window_are_spread_over_eight(bits, inverted):
    pixels = np.tile(np.arange(2**bits, dtype=np.uint8), (4, 1))
    made = dataset_of(pixels, bits)
    if inverted:
        made.PhotometricInterpretation = "MONOCHROME1"
    expected = np.round(np.arange(2**bits) * 255 / (2**bits - 1))
    assert (seen(made) == (255 - expected if inverted else expected)).all()


def test_bits_packed_eight_a_byte():
    made = dataset_of(np.zeros((8, 8), np.uint8))
    made.BitsAllocated, made.BitsStored, made.HighBit = 1, 1, 0
    made.PixelData = bytes([0b10101010] * 8)
    assert (seen(made) == [0, 255] * 4).all()


@pytest.mark.parametrize(("tag", "dtype"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
@pytest.mark.parametrize("inverted", [False, True])
def test_float_pixels(tag, dtype, inverted):
    made = dataset_of(RAMP.astype(dtype))
    data = made.PixelData
    for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(made, name)
    setattr(made, tag, data)
    if inverted:
        made.PhotometricInterpretation = "MONOCHROME1"
    expected = np.round(STEPS * 255 / 4032)
    assert np.abs(seen(made) - (255 - expected if inverted else expected)).max() <= 1


# ---------------------------------------------------------------------- functional groups


def groups(*, rescale: bool, window: bool) -> Dataset:
    found = Dataset()
    if rescale:
        found.PixelValueTransformationSequence = Sequence([item(RescaleSlope=1, RescaleIntercept=-1024)])
    if window:
        found.FrameVOILUTSequence = Sequence([item(WindowCenter=40, WindowWidth=400)])
    return found


@pytest.mark.parametrize(
    ("shared", "per_frame", "top"),
    [
        ("rescale window", "", ""),
        ("", "rescale window", ""),
        ("rescale", "window", ""),
        ("window", "rescale", ""),
        ("rescale", "", "window"),
        ("", "window", "rescale"),
    ],
)
def test_enhanced_images_are_shown_as_plain_ones(shared, per_frame, top):
    plain = dataset_of(RAMP, 12, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    enhanced = dataset_of(RAMP, 12, NumberOfFrames=1)
    for name, where in (
        ("SharedFunctionalGroupsSequence", shared),
        ("PerFrameFunctionalGroupsSequence", per_frame),
    ):
        setattr(
            enhanced,
            name,
            Sequence([groups(rescale="rescale" in where, window="window" in where)] if where else []),
        )
    if "rescale" in top:
        enhanced.RescaleSlope, enhanced.RescaleIntercept = 1, -1024
    if "window" in top:
        enhanced.WindowCenter, enhanced.WindowWidth = 40, 400
    assert (shown(enhanced) == shown(plain)).all()


@pytest.mark.parametrize("group", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_a_functional_group_may_hold_a_voi_table(group):
    """The frame VOI LUT macro with a table (PS3.3 C.7.6.16.2.10b)."""
    lut = table([4096, 0, 8], BYTES[::-1].tolist(), "US")
    macro = item(FrameVOILUTSequence=Sequence([item(VOILUTSequence=Sequence([lut]))]))
    made = dataset_of(RAMP, 12, NumberOfFrames=1, **{group: Sequence([macro])})
    assert np.abs(seen(made) - (255 - GREYS)).max() <= 1


def test_each_frame_has_its_own_window():
    both = np.stack([RAMP, RAMP])
    made = dataset_of(both, 12, NumberOfFrames=2)
    made.PerFrameFunctionalGroupsSequence = Sequence(
        [
            item(FrameVOILUTSequence=Sequence([item(WindowCenter=center, WindowWidth=400)]))
            for center in (1000, 3000)
        ]
    )
    plain = [shown(dataset_of(RAMP, 12, WindowCenter=center, WindowWidth=400)) for center in (1000, 3000)]
    assert (shown(made, frame=1) == plain[0]).all()
    assert (shown(made, frame=2) == plain[1]).all()
    assert images.count_frames(file_of(made), "x") == 2
    with pytest.raises(ImageError) as error:
        shown(made)
    assert error.value.reason == "image_multi_frame"
    with pytest.raises(ImageError) as error:
        shown(made, frame=3)
    assert error.value.reason == "image_no_such_frame"


# ---------------------------------------------------------------------- padding


@pytest.mark.parametrize(
    "padding",
    [
        {"PixelPaddingValue": ("SS", -2000)},
        {"PixelPaddingValue": ("US", 63536)},
        {"PixelPaddingValue": ("US", 63536), "PixelPaddingRangeLimit": ("US", 63536)},
        {"PixelPaddingValue": ("SS", -2050), "PixelPaddingRangeLimit": ("SS", -1990)},
        {"PixelPaddingValue": ("SS", -1990), "PixelPaddingRangeLimit": ("US", 63486)},
    ],
)
@pytest.mark.parametrize("inverted", [False, True])
def test_padding_of_either_type_and_range_is_left_out(padding, inverted):
    pixels = CT.copy()
    pixels[:, :4] = -2000
    made = dataset_of(pixels)
    if inverted:
        made.PhotometricInterpretation = "MONOCHROME1"
    for name, (vr, value) in padding.items():
        made.add_new(name, vr, value)
    inside = CT[0, 4:].astype(float)
    expected = np.round((inside - inside.min()) * 255 / np.ptp(inside))
    assert np.abs(seen(made)[4:] - (255 - expected if inverted else expected)).max() <= 1


def test_high_padding_of_unsigned_pixels():
    pixels = RAMP.copy()
    pixels[:, -4:] = 65535
    made = dataset_of(pixels)
    made.add_new("PixelPaddingValue", "SS", -1)
    assert np.abs(seen(made)[:-4] - np.round(STEPS[:-4] * 255 / STEPS[-5])).max() <= 1


# ---------------------------------------------------------------------- frames, terms, numbers


@pytest.mark.parametrize("frames", [None, 1, "1"])
def test_pixels_beyond_the_declared_frame_are_left_alone(frames):
    made = dataset_of(RAMP, 12)
    made.PixelData = RAMP.tobytes() + RAMP[:, ::-1].tobytes()
    if frames is not None:
        made.NumberOfFrames = frames
    image = images.decode(file_of(made), "x.dcm")
    assert image.size == (SIDE, SIDE)
    assert (np.asarray(images.to_rgb(image))[0, :, 0] == np.round(STEPS * 255 / 4032)).all()


@pytest.mark.parametrize(
    ("term", "inverted"),
    [
        ("MONOCHROME2", False),
        ("monochrome2", False),
        ("MONOCHROME 2", False),
        ("MONOCHROME1 ", True),
        ("Monochrome_1", True),
        ("MONOCHROM1", True),
        ("MONOCHROME01", True),
        ("MONO1", True),
        ("MONOCHROME", False),
        ("UNKNOWN", False),
        ("", False),
    ],
)
def test_photometric_terms_in_odd_spellings(term, inverted):
    made = dataset_of(RAMP, 12, PhotometricInterpretation=term, WindowCenter=2048, WindowWidth=4096)
    assert np.abs(seen(made) - (255 - GREYS if inverted else GREYS)).max() <= 1


@pytest.mark.parametrize(
    ("function", "same_as"),
    [
        ("linear", "LINEAR"),
        ("Linear Exact", "LINEAR_EXACT"),
        ("LINEAR EXACT ", "LINEAR_EXACT"),
        ("sigmoid", "SIGMOID"),
        ("HOUSE", "LINEAR"),
    ],
)
def test_window_functions_in_odd_spellings(function, same_as):
    one, other = (
        dataset_of(RAMP, 12, WindowCenter=2000, WindowWidth=600, VOILUTFunction=name)
        for name in (function, same_as)
    )
    assert (shown(one) == shown(other)).all()


@pytest.mark.parametrize("slope", [b"1,0 ", b"one ", b"1.0.0 ", b"nan ", b"0 "])
def test_rescale_values_that_are_no_numbers_leave_the_image(slope):
    made = dataset_of(RAMP, 12, RescaleSlope="1.0 ", RescaleIntercept="0")
    data = file_of(made)
    element = struct.pack("<HH2sH", 0x0028, 0x1053, b"DS", 4) + b"1.0 "
    assert element in data
    broken = struct.pack("<HH2sH", 0x0028, 0x1053, b"DS", len(slope)) + slope
    pixels = np.asarray(images.to_rgb(images.decode(data.replace(element, broken), "x")))[0, :, 0]
    assert (pixels == np.round(STEPS * 255 / 4032)).all()


@pytest.mark.parametrize("count", [b"1A", b"x ", b"-1", b"0 "])
def test_a_number_of_frames_that_is_none_is_one(count):
    data = file_of(dataset_of(RAMP, 12, NumberOfFrames="1"))
    element = struct.pack("<HH2sH", 0x0028, 0x0008, b"IS", 2)
    assert element + b"1 " in data
    assert (seen_file(data.replace(element + b"1 ", element + count)) == SPREAD).all()


def test_a_window_with_a_decimal_comma():
    made = dataset_of(RAMP, 12, WindowCenter="2048", WindowWidth="4096")
    data = file_of(made).replace(b"DS\x04\x004096", b"DS\x06\x004096,0")
    assert np.abs(np.asarray(images.decode(data, "x"))[0] - GREYS).max() <= 1


@pytest.mark.parametrize(
    "missing", ["PhotometricInterpretation", "PixelRepresentation", "BitsStored", "SamplesPerPixel"]
)
def test_tags_that_writers_leave_out(missing):
    made = dataset_of(RAMP, 16, WindowCenter=2048, WindowWidth=4096)
    delattr(made, missing)
    assert np.abs(seen(made) - GREYS).max() <= 1


# ---------------------------------------------------------------------- deflate, decoders, no pixels


def test_deflated_files_are_read_up_to_the_limit():
    made = dataset_of(RAMP, 12, WindowCenter=2048, WindowWidth=4096)
    plain = shown(made)
    data = file_of(made, DeflatedExplicitVRLittleEndian)
    assert (np.asarray(images.decode(data, "x")) == plain).all()
    with pytest.raises(ImageError) as error:
        images.decode(data, "x", max_bytes=RAMP.nbytes)
    assert error.value.reason == "image_too_large"
    assert len(zlib.compress(RAMP.tobytes())) < RAMP.nbytes


def test_deflated_files_of_other_writers():
    made = dataset_of(RAMP, 12, WindowCenter=2048, WindowWidth=4096)
    data = file_of(made, DeflatedExplicitVRLittleEndian)
    # Without the length of the header's group.
    place = data.index(b"\x02\x00\x00\x00UL")
    assert (seen_file(data[:place] + data[place + 12 :]) == seen(made)).all()
    # With the header of zlib.
    start = 144 + int.from_bytes(data[140:144], "little")
    content = zlib.decompress(data[start:], -zlib.MAX_WBITS)
    assert (seen_file(data[:start] + zlib.compress(content)) == seen(made)).all()
    with pytest.raises(ImageError) as error:
        images.decode(data[:start] + b"\xff" * 99, "x")
    assert error.value.reason == "image_undecodable"


def test_a_file_that_only_names_the_deflated_syntax_is_not_inflated():
    made = dataset_of(RAMP, 12, StudyDescription=DeflatedExplicitVRLittleEndian)
    assert (seen(made) == SPREAD).all()


@pytest.mark.parametrize(
    ("tag", "value"), [("PixelData", b""), ("Rows", None), ("Columns", None), ("BitsAllocated", 0)]
)
def test_what_no_image_has_is_named(tag, value):
    made = dataset_of(RAMP, 12)
    setattr(made, tag, value)
    with pytest.raises(ImageError) as error:
        images.decode(file_of(made), "x")
    assert error.value.reason == "image_undecodable"
    assert ("no pixel data" if tag == "PixelData" else tag) in error.value.detail


def test_a_real_deflated_file():
    assert images.decode((SAMPLES / "image_dfl.dcm").read_bytes(), "x").size == (512, 512)


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_jpeg_ls_lossless.dcm",
        "JPEG2000.dcm",
        "MR_small_jp2klossless.dcm",
        "JPEGLSNearLossless_16.dcm",
    ],
)
def test_every_common_compression_has_a_decoder(name):
    image = images.decode((SAMPLES / name).read_bytes(), "x")
    assert np.ptp(np.asarray(image)) > 0


@pytest.mark.parametrize(
    "name",
    [
        "test-SR.dcm",
        "rtplan.dcm",
        "rtstruct.dcm",
        "dicomdirtests/DICOMDIR",
        "waveform_ecg.dcm",
        "reportsi.dcm",
    ],
)
def test_files_without_pixels_say_so(name):
    with pytest.raises(ImageError) as error:
        images.decode((SAMPLES / name).read_bytes(), "x")
    assert error.value.reason == "image_undecodable"
    assert "no pixel data" in error.value.detail


# ---------------------------------------------------------------------- damage


@given(st.binary(max_size=200), st.integers(0, 3))
def test_damaged_files_are_refused(noise, place):
    data = bytearray(file_of(dataset_of(RAMP, 12)))
    start = 300 + place * 50
    data[start : start + len(noise)] = noise
    try:
        image = images.decode(bytes(data), "x", max_pixels=10**7)
    except ImageError as error:
        assert error.reason.startswith("image_")
    else:
        assert image.width * image.height <= 10**7
