"""Lookup tables of DICOM (VOI, modality, palettes), in every depth and packing."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import (
    BYTES,
    CT,
    GREYS,
    HOUNSFIELD,
    RAMP,
    SAMPLES,
    SIDE,
    SPREAD,
    STEPS,
    WORDS,
    dataset_of,
    file_of,
    seen,
    seen_file,
    shown,
    table,
)
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from mmedpo_ray.io import images

# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "lut",
    [
        table([4096, 0, 8], BYTES.tolist(), "US"),
        table([4096, 0, 8], BYTES.astype("<u2").tobytes(), "OW"),
        table([4096, 0, 8], BYTES.tobytes(), "OW"),
        table([4096, 0, 8], BYTES.view("<u2").tolist(), "US"),
        table([4096, 0, 12], WORDS.tolist(), "US"),
        table([4096, 0, 16], WORDS.tolist(), "US"),
        table([4096, 0, 16], (WORDS * 16).tolist(), "US"),
        table([4096, 0, 10], (WORDS // 4).tolist(), "US"),
        table([0, 0, 16], np.arange(65536).clip(0, 4095).astype("<u2").tobytes(), "OW"),
    ],
)
def test_voi_tables_of_every_depth_and_packing(lut):
    made = dataset_of(RAMP, 12, VOILUTSequence=Sequence([lut]))
    assert np.abs(seen(made) - GREYS).max() <= 1
    made.WindowCenter, made.WindowWidth = 100, 10
    assert np.abs(seen(made) - GREYS).max() <= 1


def test_a_voi_table_that_is_too_short_leaves_the_window_or_the_full_range():
    short = table([4096, 0, 16], WORDS[:100].tolist(), "US")
    made = dataset_of(RAMP, 12, VOILUTSequence=Sequence([short]))
    assert np.abs(seen(made) - np.round(STEPS * 255 / 4032)).max() <= 1
    made.WindowCenter, made.WindowWidth = 2048, 4096
    assert np.abs(seen(made) - GREYS).max() <= 1


@pytest.mark.parametrize("bits", [8, 12])
def test_a_table_that_is_too_short_counts_where_it_reaches_every_pixel(bits):
    entries = (BYTES if bits == 8 else WORDS)[:4040]
    lut = table([4096, 0, bits], entries.tolist(), "US")
    made = dataset_of(RAMP, 12, VOILUTSequence=Sequence([lut]), WindowCenter=100, WindowWidth=10)
    assert np.abs(seen(made) - SPREAD).max() <= 2


def test_words_of_8_bits_that_are_too_few_are_not_packed_ones():
    lut = table([4096, 0, 8], BYTES[:2048].tolist(), "US")
    made = dataset_of(RAMP + 1, 12, VOILUTSequence=Sequence([lut]), WindowCenter=2048, WindowWidth=4096)
    assert np.abs(seen(made) - GREYS).max() <= 1


def test_the_first_usable_table_counts():
    short, whole = (table([4096, 0, 12], entries.tolist(), "US") for entries in (WORDS[:9], WORDS[::-1]))
    made = dataset_of(RAMP, 12, VOILUTSequence=Sequence([short, whole]))
    assert np.abs(seen(made) - (255 - GREYS)).max() <= 1


@pytest.mark.parametrize("tag", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize(
    "lut",
    [
        table([4096, 0, 8], BYTES[::-1].copy().view("<u2").astype(">u2").tobytes(), "OW"),
        table([4096, 0, 8], BYTES[::-1].copy().view("<u2").tolist(), "US"),
        table([4096, 0, 8], BYTES[::-1].tolist(), "US"),
        table([4096, 0, 8], BYTES[::-1].tobytes(), "OB"),
        table([4096, 0, 12], WORDS[::-1].astype(">u2").tobytes(), "OW"),
    ],
)
def test_tables_of_big_endian_files(lut, tag):
    made = dataset_of(RAMP, 12, **{tag: Sequence([lut])})
    made.PixelData = RAMP.astype(">u2").tobytes()
    buffer = io.BytesIO()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    pydicom.dcmwrite(buffer, made, enforce_file_format=True, implicit_vr=False, little_endian=False)
    assert np.abs(seen_file(buffer.getvalue()) - (255 - SPREAD)).max() <= 4


@pytest.mark.parametrize(
    "lut", [table([4096, 0, 8], BYTES.tobytes(), "OW"), table([4096, 0, 12], WORDS.tolist(), "US")]
)
def test_tables_of_implicit_files(lut):
    made = file_of(dataset_of(RAMP, 12, VOILUTSequence=Sequence([lut])), ImplicitVRLittleEndian)
    assert np.abs(seen_file(made) - GREYS).max() <= 1


def test_a_voi_table_whose_first_input_is_negative():
    lut = table([2001, -1000, 16], np.arange(2001, dtype=np.uint16).tolist(), "US")
    made = dataset_of(CT, VOILUTSequence=Sequence([lut]))
    assert np.abs(seen(made) - np.round((HOUNSFIELD + 1000) * 255 / 2000)).max() <= 1
    # Written as an unsigned number.
    lut.add_new("LUTDescriptor", "US", [2001, 65536 - 1000, 16])
    assert np.abs(seen(made) - np.round((HOUNSFIELD + 1000) * 255 / 2000)).max() <= 1


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_modality_tables_of_every_depth(bits):
    lut = table([4096, 0, bits], (WORDS >> (12 - min(bits, 12))).tolist(), "US")
    lut.ModalityLUTType = "US"
    expected = np.round(STEPS * 255 / 4032)
    made = dataset_of(RAMP, 12, ModalityLUTSequence=Sequence([lut]))
    assert np.abs(seen(made) - expected).max() <= 256 / 2 ** min(bits, 8) + 1
    made.PhotometricInterpretation = "MONOCHROME1"
    assert np.abs(seen(made) - (255 - expected)).max() <= 256 / 2 ** min(bits, 8) + 1


# ---------------------------------------------------------------------- palettes


def palette_image(bits: int, data: list[bytes], segmented: bool = False, first: int = 0) -> Dataset:
    pixels = np.tile(np.arange(SIDE, dtype=np.uint8) * 4, (SIDE, 1))
    made = dataset_of(pixels, PhotometricInterpretation="PALETTE COLOR")
    for colour, each in zip(("Red", "Green", "Blue"), data, strict=True):
        made.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, first, bits])
        name = f"{colour}PaletteColorLookupTableData"
        made.add_new(f"Segmented{name}" if segmented else name, "OW", each)
    return made


GREY8 = np.arange(256)


@pytest.mark.parametrize(
    ("bits", "entries"),
    [
        (8, GREY8.astype(np.uint8).tobytes()),
        (8, GREY8.astype("<u2").tobytes()),
        (16, (GREY8 * 257).astype("<u2").tobytes()),
        (16, (GREY8 * 256).astype("<u2").tobytes()),
        (16, GREY8.astype("<u2").tobytes()),
        (12, (GREY8 * 16).astype("<u2").tobytes()),
        (16, (GREY8 * 16).astype("<u2").tobytes()),
    ],
)
def test_palettes_of_every_depth_and_packing(bits, entries):
    pixels = shown(palette_image(bits, [entries] * 3))
    assert pixels.shape == (SIDE, SIDE, 3)
    assert (pixels[0] == (np.arange(SIDE) * 4)[:, None]).all()


def test_the_three_tables_of_a_palette_keep_apart():
    red, green, blue = (np.roll(GREY8, shift).astype(np.uint8) for shift in (0, 10, 20))
    pixels = shown(palette_image(8, [red.tobytes(), green.tobytes(), blue.tobytes()]))
    codes = np.arange(SIDE) * 4
    assert (pixels[0] == np.stack([red[codes], green[codes], blue[codes]], axis=-1)).all()


def test_segmented_palettes():
    # One entry as it is, then a line of 255 steps up to 65,280.
    line = struct.pack("<6H", 0, 1, 0, 1, 255, 255 * 256)
    pixels = shown(palette_image(16, [line] * 3, segmented=True))
    assert np.abs(pixels[0, :, 0].astype(int) - np.arange(SIDE) * 4).max() <= 1
    # 128 entries written out, and the same once more by reference to byte 0.
    half = struct.pack("<130H", 0, 128, *(GREY8[:128] * 512)) + struct.pack("<4H", 2, 1, 0, 0)
    pixels = shown(palette_image(16, [half] * 3, segmented=True))
    assert (pixels[0, :, 0] == (np.arange(SIDE) * 4 % 128) * 2).all()


@pytest.mark.parametrize("pack", [bytes, lambda units: struct.pack(f"<{len(units)}H", *units)])
def test_segmented_palettes_of_8_bits(pack):
    line = pack([0, 1, 0, 1, 255, 255])
    pixels = shown(palette_image(8, [line] * 3, segmented=True))
    assert np.abs(pixels[0, :, 0].astype(int) - np.arange(SIDE) * 4).max() <= 1


def test_a_segmented_palette_of_16_bits_with_low_values():
    # A line of 128 steps, and the same again by reference, then one that ends where a byte ends.
    units = [0, 1, 0, 1, 127, 127, 2, 2, 0, 0]
    pixels = shown(palette_image(16, [struct.pack(f"<{len(units)}H", *units)] * 3, segmented=True))
    assert (pixels[0, :, 0] == np.arange(SIDE) * 4 % 128).all()


def test_a_palette_with_a_colour_missing_leaves_the_stored_values():
    made = palette_image(8, [GREY8.astype(np.uint8).tobytes()] * 3)
    del made.BluePaletteColorLookupTableData
    assert (seen(made) == np.arange(SIDE) * 4).all()


def test_a_real_segmented_palette_equals_pydicom():
    path = SAMPLES / "gdcm-US-ALOKA-16.dcm"
    if not path.is_file():
        path = Path(pytest.importorskip("data_store").__file__).parent / "data" / path.name
    dataset = pydicom.dcmread(path)
    expected = pydicom.pixels.apply_color_lut(dataset.pixel_array, dataset)
    pixels = np.asarray(images.decode(path.read_bytes(), "x"))
    assert (pixels == expected[..., :3] >> (8 if expected.dtype == np.uint16 else 0)).all()
