"""DICOM images as a reader sees them on screen: rescaled, windowed, with bright as bright.

What comes out:
- A grey image with a window or a VOI table is 8 bit (L): the site chose that range of values as the one to look at, and
  the full range of a CT (air to metal) would leave soft tissue a few grey levels.
- A grey image of more than 8 bits without one keeps its depth (I;16), shifted so that its darkest value is 0; models
  scale it by its range, noise is added at full depth. Fewer than 8 bits are spread over 8.
- Colour is RGB.

Of a file of several frames the caller says which one is meant. Nothing of the file but sizes, bits, frames, the numbers and terms
of its display ever enters a message: tags hold patient data.
"""

from __future__ import annotations

import io
import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmedpo_ray.dicom.display import show_grey
from mmedpo_ray.dicom.tables import palette
from mmedpo_ray.dicom.tags import photometric
from mmedpo_ray.image_error import MADE_BY, ImageError, check_frame, check_size

if TYPE_CHECKING:
    from pydicom import Dataset

# An inflated data set may be so large where the caller sets no limit.
MAX_BYTES = 1_000_000_000
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_INFLATED = b"1.2.840.10008.1.2.1\0\0\0"
_HEAD = 2048
# Preamble, prefix, and the element that holds the length of the header after it.
_GROUP_LENGTH = slice(140, 144)
_HEADER = 144
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# Pillow decodes what it can, as in every other file; GDCM the rest.
_DECODERS = ("pydicom", "pillow", "pylibjpeg", "pyjpegls", "gdcm")


def decode(
    data: bytes, name: str, max_pixels: int | None, frame: int | None = None, max_bytes: int | None = None
) -> Image.Image:
    """Decodes a DICOM file, or one frame of it.

    Args:
        data: the file's bytes.
        name: what messages call it.
        max_pixels: a larger image is not decoded; None: any size is.
        frame: which of several frames, from 1; None: the file must have one.
        max_bytes: a deflated data set that inflates to more is refused; None: ``MAX_BYTES``.

    Returns:
        An image of mode L, I;16 or RGB; its ``info`` says how it was made.

    Raises:
        ImageError: ``image_undecodable`` (also without pixels, or compressed by a method without a decoder here),
            ``image_too_large``, ``image_multi_frame``, or ``no_such_frame``.
    """
    with _reading(name):
        dataset = _read(data, name, max_bytes)
        return _decode(dataset, name, max_pixels, frame)


def count_frames(data: bytes, name: str, max_bytes: int | None = None) -> int:
    """How many frames a file declares.

    Raises:
        ImageError: it cannot be read.
    """
    with _reading(name):
        return _frames(_read(data, name, max_bytes))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Silences warnings, which quote the file's tags, and arithmetic on odd windows; makes an :class:`ImageError` of any error."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            yield
            return
        except ImageError:
            raise
        except Exception as error:
            # The parser raises anything on damaged files, and its messages quote them.
            kind = type(error).__name__
        raise ImageError("image_undecodable", f"{name}: DICOM, {kind}")


def _read(data: bytes, name: str, max_bytes: int | None) -> Dataset:
    import pydicom

    if _DEFLATED in data[:_HEAD]:
        data = _inflated(data, name, MAX_BYTES if max_bytes is None else max_bytes)
    return pydicom.dcmread(io.BytesIO(data), force=True)


def _inflated(data: bytes, name: str, max_bytes: int) -> bytes:
    """The file with its data set inflated, never to more than ``max_bytes``, which the parser would not look at."""
    start = _HEADER + int.from_bytes(data[_GROUP_LENGTH], "little")
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    content = inflate.decompress(data[start:], max_bytes)
    if inflate.unconsumed_tail:
        raise ImageError("image_too_large", f"{name}: DICOM that inflates to more than {max_bytes} bytes")
    return data[:start].replace(_DEFLATED, _INFLATED) + content


def _frames(dataset: Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _decode(dataset: Dataset, name: str, max_pixels: int | None, frame: int | None) -> Image.Image:
    if not any(tag in dataset for tag in _PIXELS):
        raise ImageError("image_undecodable", f"{name}: DICOM without pixel data")
    check_size(name, int(dataset.Columns), int(dataset.Rows), max_pixels)
    frames = _frames(dataset)
    check_frame(name, frames, frame)
    index = (frame or 1) - 1
    _complete(dataset)
    stored = _stored(dataset, name, index)
    image, notes = _shown(stored, dataset, index)
    bits = int(dataset.get("BitsStored") or 8 * stored.dtype.itemsize)
    image.info[MADE_BY] = [
        f"DICOM, {dataset.file_meta.TransferSyntaxUID.name}",
        *([f"frame {index + 1} of {frames}"] if frames > 1 else []),
        f"{bits} bits",
        *notes,
    ]
    return image


def _complete(dataset: Dataset) -> None:
    """Fills in what pydicom's decoders demand and writers leave out or misspell."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    meta: Any = getattr(dataset, "file_meta", None)
    if meta is None or "TransferSyntaxUID" not in meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta = FileMetaDataset() if meta is None else meta
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    dataset.PhotometricInterpretation = photometric(dataset)
    defaults = {"SamplesPerPixel": 1, "PixelRepresentation": 0}
    if "BitsAllocated" in dataset:
        defaults |= {"BitsStored": dataset.BitsAllocated}
    if int(dataset.get("SamplesPerPixel") or 1) > 1:
        defaults |= {"PlanarConfiguration": 0}
    for tag, value in defaults.items():
        if dataset.get(tag) is None:
            setattr(dataset, tag, value)


def _stored(dataset: Dataset, name: str, index: int) -> np.ndarray:
    """The values of one frame, (H, W) or (H, W, 3); what a file holds beyond the frames that it declares is left alone."""
    from pydicom.pixels import get_decoder, pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise ImageError("image_undecodable", f"{name}: DICOM of an unknown transfer syntax")
    options: dict[str, Any] = {"index": index, "allow_excess_frames": False}
    if not syntax.is_compressed:
        return pixel_array(dataset, **options)
    available: tuple[str, ...] = ()
    # Video has no decoder at all.
    with suppress(NotImplementedError):
        available = get_decoder(syntax).available_plugins
    for plugin in sorted(available, key=_DECODERS.index):
        try:
            return pixel_array(dataset, **options, decoding_plugin=plugin)
        except Exception:
            # Each decoder has formats of its own that it cannot read: 12-bit JPEG, some JPEG 2000.
            continue
    raise ImageError(
        "image_undecodable",
        f"{name}: DICOM compressed by {syntax.name}, damaged or without a decoder here; install a decoder for pydicom "
        "(pylibjpeg-libjpeg for 12-bit JPEG, pylibjpeg-openjpeg for JPEG 2000) on every node",
    )


def _shown(stored: np.ndarray, dataset: Dataset, index: int) -> tuple[Image.Image, list[str]]:
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR" and stored.ndim == 2:
        colours = palette(dataset)
        if colours is not None:
            return _rgb(np.stack([table.apply(stored) for table in colours], axis=-1), 8), ["palette"]
    if stored.ndim == 3:
        return _rgb(stored, int(dataset.BitsStored)), [kind.split("_")[0]]
    return show_grey(stored, dataset, index, inverted=kind == "MONOCHROME1")


def _rgb(stored: np.ndarray, bits: int) -> Image.Image:
    """RGB from stored values of the given depth, shape (H, W, 3)."""
    if bits > 8:
        stored = stored >> (bits - 8)
    return Image.fromarray(np.ascontiguousarray(stored[..., :3]).astype(np.uint8))
