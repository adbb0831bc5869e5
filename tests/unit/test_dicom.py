"""DICOM files as images: what is on screen, at the depth that matters, and nothing of the patient in any
message."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from mmedpo_ray.evaluate.client import image_data_url
from mmedpo_ray.io import images

SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
PATIENT = "Doe^Jane^Secret"


def dicom(pixels: np.ndarray, *, bits: int | None = None, preamble: bool = True, **tags: Any) -> bytes:
    """A DICOM file of grey (H, W) or colour (H, W, 3) pixels."""
    dataset = pydicom.Dataset()
    dataset.PatientName = PATIENT
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    if preamble:
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    else:
        pydicom.dcmwrite(buffer, dataset, implicit_vr=True, little_endian=True)
    return buffer.getvalue()


def shown(data: bytes) -> np.ndarray:
    return np.asarray(images.decode(data, "x.dcm"))


RAMP = np.arange(-1000, 1000, 20, dtype=np.int16).reshape(10, 10)


def test_a_window_gives_eight_bits() -> None:
    # Stored 0..1980 are −1000..980 Hounsfield units; the window shows −160..240.
    stored = (RAMP + 1000).astype(np.uint16)
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1000, "WindowCenter": 40, "WindowWidth": 400}
    image = images.decode(dicom(stored, bits=12, **tags), "x.dcm")
    assert (image.mode, image.size) == ("L", (10, 10))
    # PS3.3 C.11.2.1.2.1
    expected = np.clip(((RAMP - 39.5) / 399 + 0.5) * 255, 0, 255)
    assert np.abs(np.asarray(image) - expected).max() <= 0.51
    inverted = shown(dicom(stored, bits=12, **tags, PhotometricInterpretation="MONOCHROME1"))
    assert (inverted == 255 - np.asarray(image)).all()


def test_the_first_of_several_windows_counts() -> None:
    several = shown(dicom(RAMP, WindowCenter=[40, 500], WindowWidth=[400, 90]))
    assert (several == shown(dicom(RAMP, WindowCenter=40, WindowWidth=400))).all()


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_other_window_functions(function: str) -> None:
    found = shown(dicom(RAMP, WindowCenter=40, WindowWidth=400, VOILUTFunction=function)).astype(int)
    x = (RAMP - 40) / 400
    expected = np.clip(x + 0.5, 0, 1) if function == "LINEAR_EXACT" else 1 / (1 + np.exp(-4 * x))
    assert np.abs(found - expected * 255).max() <= 0.51


def test_a_voi_table() -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = [4, 0, 12]
    table.LUTData = np.array([0, 1000, 2000, 4095], "<u2").tobytes()
    stored = np.array([[0, 1], [2, 3]], np.uint16)
    found = shown(dicom(stored, bits=12, VOILUTSequence=[table], WindowCenter=1, WindowWidth=1))
    assert (found == np.round(np.array([[0, 1000], [2000, 4095]]) / 4095 * 255)).all()


def test_sixteen_bits_without_a_window_keep_their_depth() -> None:
    image = images.decode(dicom(RAMP), "x.dcm")
    assert image.mode == "I;16"
    assert (np.asarray(image) == RAMP + 1000).all()
    inverted = shown(dicom(RAMP, PhotometricInterpretation="MONOCHROME1"))
    assert (inverted == RAMP.max() - RAMP).all()
    # Fractions are spread over all 16 bits.
    assert shown(dicom(RAMP, RescaleSlope=0.31, RescaleIntercept=3)).max() == 65535
    assert np.asarray(images.to_rgb(image)).min() == 0


@pytest.mark.parametrize(
    "tags", [{"RescaleSlope": 0.31, "RescaleIntercept": 3}, {"RescaleSlope": 0, "RescaleIntercept": 0.5}, {}]
)
def test_a_constant_image_is_black(tags: dict[str, Any]) -> None:
    for dtype in (np.int16, np.uint8, np.int32):
        image = images.decode(dicom(np.full((4, 5), 7, dtype), **tags), "x.dcm")
        assert image.size == (5, 4)
        assert not np.asarray(images.to_rgb(image)).any() or image.mode == "L"
        assert len(np.unique(image)) == 1


def test_padding_does_not_stretch_the_range() -> None:
    padded = RAMP.copy()
    padded[0] = -30000
    found = shown(dicom(padded, PixelPaddingValue=-30000))
    assert (found[1:] == RAMP[1:] - RAMP[1:].min()).all()
    assert (found[0] == 0).all()


def test_eight_bits_stay_as_they_are() -> None:
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10)
    assert (shown(dicom(pixels)) == pixels).all()
    assert (shown(dicom(pixels, PhotometricInterpretation="MONOCHROME1")) == 255 - pixels).all()


@pytest.mark.parametrize(
    "window", [{"WindowCenter": 0, "WindowWidth": 0}, {"WindowCenter": 9000, "WindowWidth": 10}]
)
def test_a_window_that_shows_nothing_is_ignored(window: dict[str, Any]) -> None:
    assert (shown(dicom(RAMP, **window)) == RAMP + 1000).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("preamble", [True, False])
@pytest.mark.parametrize(
    "empty",
    [
        ["RescaleSlope", "RescaleIntercept"],
        ["WindowCenter", "WindowWidth"],
        ["WindowWidth"],
        ["VOILUTFunction"],
        ["PixelPaddingValue", "NumberOfFrames"],
        ["ModalityLUTSequence", "VOILUTSequence"],
    ],
)
def test_an_empty_tag_is_absent(empty: list[str], preamble: bool, photometric: str) -> None:
    """Writers fill in the tags of a module without a value of their own."""
    whole = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 40, "WindowWidth": 400}
    without = {name: value for name, value in whole.items() if name not in empty}
    if empty == ["WindowWidth"]:
        del without["WindowCenter"]
    nothing = {name: [] if name.endswith("Sequence") else None for name in empty}
    given_ = {"preamble": preamble, "PhotometricInterpretation": photometric}
    for pixels in (RAMP, (RAMP + 1000).astype(np.uint16), np.arange(100, dtype=np.uint8).reshape(10, 10)):
        found = shown(dicom(pixels, **given_, **(whole | nothing)))
        expected = shown(dicom(pixels, **given_, **without))
        assert found.dtype == expected.dtype
        assert (found == expected).all()


@pytest.mark.parametrize(
    ("tags", "same_as"),
    [
        ({"RescaleSlope": 3, "RescaleIntercept": None}, {"RescaleSlope": 3, "RescaleIntercept": 0}),
        ({"RescaleSlope": None, "RescaleIntercept": -7}, {"RescaleSlope": 1, "RescaleIntercept": -7}),
        ({"RescaleSlope": 3}, {"RescaleSlope": 3, "RescaleIntercept": 0}),
        ({"RescaleIntercept": -7}, {"RescaleSlope": 1, "RescaleIntercept": -7}),
    ],
)
def test_half_a_rescaling_is_the_half_that_is_there(tags: dict[str, Any], same_as: dict[str, Any]) -> None:
    for window in ({}, {"WindowCenter": 40, "WindowWidth": 400}):
        assert (shown(dicom(RAMP, **tags, **window)) == shown(dicom(RAMP, **same_as, **window))).all()


@pytest.mark.parametrize("pixels", [RAMP, (RAMP + 1000).astype(np.uint16)])
@pytest.mark.parametrize(
    ("center", "width"),
    [
        (["", 40], ["", 400]),
        (["", 40], [90, 400]),
        ([500, 40], ["", 400]),
        ([500, 40, 7], [0, 400, 9]),
        ([40, 500], 400),
        ([40, 500], [400]),
    ],
)
def test_the_first_whole_window_of_a_list_counts(pixels: np.ndarray, center: Any, width: Any) -> None:
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        tags = {"PhotometricInterpretation": photometric}
        several = shown(dicom(pixels, **tags, WindowCenter=center, WindowWidth=width))
        assert (several == shown(dicom(pixels, **tags, WindowCenter=40, WindowWidth=400))).all()


@pytest.mark.parametrize("name", ["WindowCenter", "WindowWidth"])
def test_a_window_that_is_no_number_is_ignored(name: str) -> None:
    data = dicom(RAMP, **({"WindowCenter": 40, "WindowWidth": 400} | {name: "54321.75"}))
    assert (shown(data.replace(b"54321.75", b"5432l,75")) == RAMP + 1000).all()


def test_an_unusable_voi_table_leaves_the_window() -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = None
    window = {"WindowCenter": 40, "WindowWidth": 400}
    assert (shown(dicom(RAMP, VOILUTSequence=[table], **window)) == shown(dicom(RAMP, **window))).all()


def test_a_falling_rescaling_is_windowed_too() -> None:
    falling = shown(dicom(RAMP, RescaleSlope=-1, RescaleIntercept=0, WindowCenter=40, WindowWidth=400))
    expected = np.clip(((-RAMP.astype(int) - 39.5) / 399 + 0.5) * 255, 0, 255)
    assert falling.dtype == np.uint8
    assert np.abs(falling - expected).max() <= 0.51


def test_signed_monochrome1_is_inverted_after_the_window() -> None:
    tags = {"WindowCenter": [-200, 500], "WindowWidth": [300, 90]}
    found = shown(dicom(RAMP, PhotometricInterpretation="MONOCHROME1", **tags))
    expected = 255 - np.clip(((RAMP + 200.5) / 299 + 0.5) * 255, 0, 255)
    assert np.abs(found - expected).max() <= 0.51


def test_colour() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    image = images.decode(dicom(pixels), "x.dcm")
    assert image.mode == "RGB"
    assert (np.asarray(image) == pixels).all()
    assert (shown(dicom(pixels.astype(np.uint16) * 257)) == pixels).all()


def test_a_file_without_preamble() -> None:
    data = dicom(RAMP, preamble=False)
    assert data[:2] == b"\x08\x00"
    assert (shown(data) == RAMP + 1000).all()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("CT_small.dcm", "I;16"),
        ("MR_small.dcm", "L"),
        ("MR_small_implicit.dcm", "L"),
        ("MR_small_bigendian.dcm", "L"),
        ("MR_small_RLE.dcm", "L"),
        ("MR_small_jp2klossless.dcm", "L"),
        ("SC_rgb_jpeg_dcmtk.dcm", "RGB"),
        ("SC_ybr_full_422_uncompressed.dcm", "RGB"),
        ("SC_rgb_rle_16bit.dcm", "RGB"),
        ("examples_palette.dcm", "RGB"),
    ],
)
def test_real_files(name: str, mode: str) -> None:
    image = images.decode((SAMPLES / name).read_bytes(), name)
    assert image.mode == mode
    assert len(np.unique(np.asarray(image))) > 4


def test_one_picture_in_every_encoding() -> None:
    names = ("MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm")
    first, *others = (shown((SAMPLES / name).read_bytes()) for name in names)
    assert all((other == first).all() for other in others)


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (dicom(RAMP)[:300], "image_undecodable", "DICOM"),
        (dicom(RAMP)[:-20], "image_undecodable", "DICOM"),
        (dicom(RAMP, Rows=9), "image_undecodable", None),
        (dicom(RAMP, Rows=60000, Columns=60000), "image_too_large", "60000×60000"),
        (dicom(RAMP.reshape(10, 10), NumberOfFrames=2, Rows=5), "image_multi_frame", "2 frames"),
        (
            dicom(RAMP, NumberOfFrames=2, Rows=5, RescaleSlope=None, PhotometricInterpretation="MONOCHROME1"),
            "image_multi_frame",
            "2 frames",
        ),
        ((SAMPLES / "test-SR.dcm").read_bytes(), "image_undecodable", "no pixel data"),
        ((SAMPLES / "rtstruct.dcm").read_bytes(), "image_undecodable", "no pixel data"),
        ((SAMPLES / "dicomdirtests" / "DICOMDIR").read_bytes(), "image_undecodable", "no pixel data"),
        (b"\x08\x00" + bytes(40), "image_undecodable", "DICOM"),
        (bytes(128) + b"DICM", "image_undecodable", "DICOM"),
    ],
)
def test_what_cannot_be_used(data: bytes, reason: str, detail: str | None) -> None:
    if detail is None:
        # Fewer rows than stored: pydicom takes the first ones.
        assert shown(data).shape == (9, 10)
        return
    with pytest.raises(images.ImageError) as caught:
        images.decode(data, "x.dcm")
    assert caught.value.reason == reason
    assert detail in caught.value.detail


@given(
    st.lists(st.tuples(st.integers(132, 700), st.integers(0, 255)), min_size=1, max_size=12),
    st.integers(0, 30),
    st.sampled_from(["CT_small.dcm", "MR_small_RLE.dcm", "SC_rgb_jpeg_dcmtk.dcm", "made"]),
)
def test_no_damage_breaks_it_or_betrays_the_patient(
    changes: list[tuple[int, int]], cut: int, name: str
) -> None:
    data = bytearray(dicom(RAMP) if name == "made" else (SAMPLES / name).read_bytes())
    for place, value in changes:
        if place < len(data):
            data[place] = value
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            image = images.decode(bytes(data[: len(data) - cut]), "x.dcm", max_pixels=10**6)
        assert image.mode in ("L", "I;16", "RGB")
    except images.ImageError as error:
        assert error.__cause__ is None
        assert len(error.detail) < 200
        heard.append(error.detail)
    finally:
        logging.getLogger().removeHandler(handler)
    heard += [str(item.message) for item in caught]
    assert not [text for text in heard if "Doe" in text or "Secret" in text or "CompressedSamples" in text]


def test_later_stages_read_it_as_any_image(tmp_path: Path) -> None:
    path = tmp_path / "ct"
    path.write_bytes(dicom(RAMP, WindowCenter=40, WindowWidth=400))
    assert images.load_rgb(str(path)).mode == "RGB"
    url = image_data_url(str(path))
    assert url.startswith("data:image/png;base64,"), "a chat endpoint gets pixels, no patient data"


def test_images_that_begin_like_dicom_stay_images() -> None:
    assert not images.is_dicom(images.encode_png(Image.new("L", (3, 3))))
    assert not images.is_dicom(b"")
    assert images.is_dicom(dicom(RAMP))
