"""Decoding of a DICOM image beside pydicom's own pixel decoding and one resize, in one run, turn by turn.

python benchmarks/dicom_decoding.py --side 2048 --rounds 9
"""

from __future__ import annotations

import argparse
import io
import platform
import time
from collections.abc import Callable

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage

from mmedpo_ray.io import images

_MODEL_SIDE = 336


def film(side: int, syntax: str, **tags: float) -> bytes:
    """A smooth 12-bit image with noise, as a file."""
    across = np.linspace(0, np.pi, side)
    noise = np.random.default_rng(0).normal(0, 20, (side, side))
    pixels = (2000 + 1500 * np.outer(np.sin(across), np.cos(across)) + noise).clip(0, 4095).astype(np.uint16)
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    dataset.Rows = dataset.Columns = side
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def by_pydicom(data: bytes) -> None:
    """Pixels by pydicom alone, and one resize."""
    stored = pixel_array(pydicom.dcmread(io.BytesIO(data)))
    Image.fromarray((stored >> 4).astype(np.uint8)).resize(
        (_MODEL_SIDE, _MODEL_SIDE), Image.Resampling.BICUBIC
    )


def decoded(data: bytes) -> None:
    """The picture in its own mode."""
    images.decode(data, "x")


def as_rgb(data: bytes) -> None:
    """The picture as models take it, 8-bit RGB, before their processor."""
    images.to_rgb(images.decode(data, "x"))


def seconds(action: Callable[[bytes], None], data: bytes) -> float:
    start = time.perf_counter()
    action(data)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=2048, help="pixels a side (default 2048)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default 9)")
    arguments = parser.parse_args()
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    print(
        f"{platform.processor() or platform.machine()}, {arguments.side}² pixels of 12 bits, median of "
        f"{arguments.rounds}"
    )
    for name, syntax, tags in (
        ("uncompressed, window", ExplicitVRLittleEndian, window),
        (
            "uncompressed, rescale and window",
            ExplicitVRLittleEndian,
            window | {"RescaleSlope": 1, "RescaleIntercept": 0},
        ),
        ("uncompressed, full range", ExplicitVRLittleEndian, {}),
        ("RLE, window", RLELossless, window),
    ):
        data = film(arguments.side, syntax, **tags)
        times = np.array(
            [
                [seconds(each, data) for each in (decoded, as_rgb, by_pydicom)]
                for _ in range(arguments.rounds + 1)
            ][1:]
        )
        alone, with_rgb, theirs = 1e3 * np.median(times, axis=0)
        ratios = times[:, :2] / times[:, 2:]
        (low, low_rgb), (middle, middle_rgb), (high, high_rgb) = np.quantile(ratios, [0, 0.5, 1], axis=0)
        print(
            f"{name}: {alone:.1f} ms against {theirs:.1f} ms, ratio {middle:.2f} ({low:.2f} to {high:.2f}); "
            f"as RGB {with_rgb:.1f} ms, {middle_rgb:.2f} ({low_rgb:.2f} to {high_rgb:.2f})"
        )


if __name__ == "__main__":
    main()
