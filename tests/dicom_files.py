"""DICOM files made for tests: a ramp of 64 columns, in every kind that the standard or its writers know."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from mmedpo_ray.io import images

SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
SIDE = 64
STEPS = np.arange(SIDE) * 64
RAMP = np.tile(STEPS.astype(np.uint16), (SIDE, 1))
HOUNSFIELD = np.linspace(-1000, 1000, SIDE).round()
CT = np.tile(HOUNSFIELD.astype(np.int16), (SIDE, 1))
# The ramp through a table or window over all 12 bits, and over its own range.
GREYS = np.round(STEPS * 255 / 4095)
SPREAD = np.round(STEPS * 255 / 4032)
BYTES = np.round(np.arange(4096) * 255 / 4095).astype(np.uint8)
WORDS = np.arange(4096, dtype=np.uint16)


def dataset_of(pixels: np.ndarray, bits: int | None = None, **tags: Any) -> Dataset:
    """A data set of grey (H, W) or (N, H, W) pixels."""
    found = Dataset()
    found.SOPClassUID, found.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    found.Rows, found.Columns = pixels.shape[-2:]
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated = pixels.dtype.itemsize * 8
    found.BitsStored = bits or found.BitsAllocated
    found.HighBit = found.BitsStored - 1
    found.PixelRepresentation = int(pixels.dtype.kind == "i")
    found.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(found, name, value)
    return found


def colour_of(pixels: np.ndarray, bits: int | None = None, **tags: Any) -> Dataset:
    """A data set of colour (H, W, 3) pixels."""
    found = dataset_of(
        pixels[..., 0], bits, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0
    )
    found.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(found, name, value)
    return found


def compressed(dataset: Dataset, frames: list[bytes], syntax: str) -> bytes:
    """A file of frames that are compressed already."""
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    return file_of(dataset, syntax)


def file_of(dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """The bytes of a file."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def item(**tags: Any) -> Dataset:
    """An item of a sequence."""
    found = Dataset()
    for name, value in tags.items():
        setattr(found, name, value)
    return found


def table(descriptor: list[int], data: Any, vr: str) -> Dataset:
    """An item of a LUT sequence."""
    found = Dataset()
    found.add_new("LUTDescriptor", "US" if descriptor[1] >= 0 else "SS", descriptor)
    found.add_new("LUTData", vr, data)
    return found


def shown(dataset: Dataset, **how: Any) -> np.ndarray:
    """The decoded picture."""
    return np.asarray(images.decode(file_of(dataset), "x.dcm", **how))


def seen_file(data: bytes, **how: Any) -> np.ndarray:
    """The first row as a model sees it, 8 bits of red."""
    return np.asarray(images.to_rgb(images.decode(data, "x.dcm", **how)))[0, :, 0].astype(int)


def seen(dataset: Dataset, **how: Any) -> np.ndarray:
    """The first row as a model sees it, 8 bits of red."""
    return seen_file(file_of(dataset), **how)
