"""Stored pixels of one frame: found in the file, decompressed, without what shares their words."""

from __future__ import annotations

import zlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedpo_ray.io.dicom.tags import frames_of, numbers, photometric
from mmedpo_ray.io.image_error import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_NEEDED = ("Rows", "Columns", "BitsAllocated")
# Pillow decodes what it can, as in every other file; imagecodecs the rest; others where they are installed.
_DECODERS = ("pydicom", "pillow", "imagecodecs")
# Each frame deflated by itself (PS3.5 A.4.14), which pydicom does not know.
_DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"


@dataclass(frozen=True)
class Bits:
    """Which bits of a word hold a pixel (PS3.5 8.1.1); the others may hold overlays, or anything.

    Attributes:
        stored: how many bits.
        lowest: the place of the lowest of them.
        complete: whether these are all bits of the word, or the decoder has cut the others off.
    """

    stored: int
    lowest: int = 0
    complete: bool = True

    def is_lowest(self, words: np.ndarray) -> bool:
        """Whether words are the values of their pixels as they are: no bit outside these is set."""
        if self.complete:
            return True
        low, high = (
            (-(2 ** (self.stored - 1)), 2 ** (self.stored - 1) - 1)
            if words.dtype.kind == "i"
            else (0, 2**self.stored - 1)
        )
        return self.lowest == 0 and low <= int(words.min()) and int(words.max()) <= high

    def values(self, words: np.ndarray) -> np.ndarray:
        """The pixels' values, of the same type."""
        if self.complete or words.dtype.kind not in "iu":
            return words
        allocated = 8 * words.dtype.itemsize
        return (words << (allocated - self.lowest - self.stored)) >> (allocated - self.stored)


def check_pixels(dataset: Dataset, name: str) -> None:
    """Whether there is an image in a file.

    Raises:
        ImageError: ``image_undecodable``.
    """
    if not any(tag in dataset and dataset[tag].value for tag in PIXELS):
        raise ImageError("image_undecodable", f"{name}: DICOM, no pixel data")
    for tag in _NEEDED:
        if not dataset.get(tag):
            raise ImageError("image_undecodable", f"{name}: DICOM without {tag}, which pixels need")


def stored_pixels(dataset: Dataset, name: str, index: int) -> tuple[np.ndarray, Bits]:
    """The words of one frame, (H, W) or (H, W, 3), and which of their bits count.

    What a file holds beyond the frames that it declares is left alone. Fills in tags that decoders need.

    Args:
        dataset: of the file, changed.
        name: what messages call it.
        index: of the frame, from 0.

    Raises:
        ImageError: ``image_undecodable``: the compression is damaged, or there is no decoder.
    """
    _complete(dataset)
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == _DEFLATED_FRAMES:
        index = _inflate_frame(dataset, index)
        syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise ImageError(
            "image_undecodable",
            f"{name}: DICOM of an unknown transfer syntax; export its images to another one",
        )
    # Of plain words we know better than pydicom, which takes the lower bits whatever HighBit says.
    is_plain = not syntax.is_compressed or syntax.name.startswith("RLE")
    options: dict[str, Any] = {"index": index, "allow_excess_frames": False}
    if is_plain:
        options["correct_unused_bits"] = False
    words = _decompressed(dataset, name, options) if syntax.is_compressed else _read(dataset, name, options)
    bits = int(dataset.get("BitsStored") or 8 * words.dtype.itemsize)
    return words, _bits(dataset, words, bits) if is_plain else Bits(bits)


def _bits(dataset: Dataset, words: np.ndarray, stored: int) -> Bits:
    allocated = 8 * words.dtype.itemsize
    if words.dtype.kind not in "iu" or stored >= allocated or int(dataset.BitsAllocated) < 8:
        return Bits(stored)
    high = int((numbers(dataset, "HighBit") or [None])[0] or 0)
    lowest = high - stored + 1
    if 0 < lowest <= allocated - stored:
        # Some writers mean the lower bits all the same: then nothing is above them.
        unsigned = words.view(f"{words.dtype.byteorder}u{words.dtype.itemsize}")
        if int(unsigned.max()) >> stored:
            return Bits(stored, lowest, complete=False)
    return Bits(stored, complete=False)


def _complete(dataset: Dataset) -> None:
    """Fills in what pydicom's decoders demand and writers leave out or misspell."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import (
        ExplicitVRBigEndian,
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        JPEGTransferSyntaxes,
    )

    meta: Any = getattr(dataset, "file_meta", None)
    if meta is None or "TransferSyntaxUID" not in meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta = FileMetaDataset() if meta is None else meta
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    if "NumberOfFrames" in dataset:
        dataset.NumberOfFrames = frames_of(dataset)
    defaults = {"SamplesPerPixel": 1, "PixelRepresentation": 0, "BitsStored": dataset.BitsAllocated}
    if int(dataset.get("SamplesPerPixel") or 1) > 1:
        defaults |= {"PlanarConfiguration": 0}
    for tag, value in defaults.items():
        if dataset.get(tag) is None:
            setattr(dataset, tag, value)
    dataset.PhotometricInterpretation = photometric(
        dataset, is_jpeg=dataset.file_meta.TransferSyntaxUID in JPEGTransferSyntaxes
    )
    is_halved = dataset.PhotometricInterpretation == "YBR_FULL_422" and int(dataset.BitsAllocated) == 8
    if is_halved and "PixelData" in dataset and not dataset["PixelData"].is_undefined_length:
        _settle_subsampling(dataset)


def _settle_subsampling(dataset: Dataset) -> None:
    """Uncompressed YBR_FULL_422; some files store it whole, some hold more frames than they declare."""
    pixels = dataset.Rows * dataset.Columns * frames_of(dataset)
    length = len(dataset.PixelData)
    if 0 <= length - 3 * pixels <= 1:
        dataset.PhotometricInterpretation = "YBR_FULL"
    elif length > 2 * pixels:
        # pydicom takes this for whole differences and refuses it.
        dataset.PixelData = dataset.PixelData[: 2 * pixels]


def _read(dataset: Dataset, name: str, options: dict[str, Any]) -> np.ndarray:
    from pydicom.pixels import pixel_array

    try:
        return pixel_array(dataset, **options)
    except ValueError:
        pass
    raise ImageError(
        "image_undecodable",
        f"{name}: DICOM, fewer pixels than it declares, or sizes and depths that contradict each other",
    )


def _decompressed(dataset: Dataset, name: str, options: dict[str, Any]) -> np.ndarray:
    from pydicom.pixels import get_decoder, pixel_array

    from mmedpo_ray.io.dicom import codecs

    codecs.register()
    syntax = dataset.file_meta.TransferSyntaxUID
    available: tuple[str, ...] = ()
    # Video has no decoder at all.
    with suppress(NotImplementedError):
        available = get_decoder(syntax).available_plugins
    ranks = {plugin: rank for rank, plugin in enumerate(_DECODERS)}
    # GDCM ends the process on some damaged files.
    for plugin in sorted({*available} - {"gdcm"}, key=lambda plugin: (ranks.get(plugin, len(ranks)), plugin)):
        try:
            return pixel_array(dataset, **options, decoding_plugin=plugin)
        except Exception:
            # Each decoder has formats of its own that it cannot read.
            continue
    if not available:
        detail = "no decoder reads it here; export its frames to another transfer syntax"
    else:
        detail = (
            "damaged, or install a decoder for pydicom that reads it (pip install pylibjpeg "
            "pylibjpeg-libjpeg) on every node"
        )
    raise ImageError("image_undecodable", f"{name}: DICOM compressed by {syntax.name}; {detail}")


def _inflate_frame(dataset: Dataset, index: int) -> int:
    """Makes a file of deflated frames an uncompressed one of one frame; returns the frame's index in it.

    Raises:
        Exception: it is damaged, and what pydicom or zlib say of it.
    """
    from pydicom.encaps import get_frame
    from pydicom.uid import ExplicitVRLittleEndian

    samples = int(dataset.SamplesPerPixel)
    length = -(-int(dataset.Rows) * int(dataset.Columns) * samples * int(dataset.BitsAllocated) // 8)
    frames = frames_of(dataset)
    deflated = get_frame(dataset.PixelData, index, number_of_frames=frames)
    pixels = zlib.decompressobj(-zlib.MAX_WBITS).decompress(deflated, length)
    dataset.PixelData = pixels + b"\0" * (len(pixels) % 2)
    dataset["PixelData"].is_undefined_length = False
    dataset.NumberOfFrames = 1
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return 0
