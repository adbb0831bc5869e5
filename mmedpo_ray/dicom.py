"""DICOM images as a reader sees them on screen: rescaled, windowed, with bright as bright.

What comes out:
- A grey image with a window or a VOI table is 8 bit (L): the site chose that range of values as the one to look at, and
  the full range of a CT (air to metal) would leave soft tissue a few grey levels.
- A grey image of more than 8 bits without one keeps its depth (I;16), shifted so that its darkest value is 0; models
  scale it by its range, noise is added at full depth.
- Colour is RGB.

A file of several frames cannot be used: which frame a question is about is not known, and the first may not show it.
Nothing of the file but numbers of pixels, bits and frames ever enters a message: tags hold patient data.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmedpo_ray.images import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_HEAD = 2048
# Beyond every value a modality yields; shows the ends of a window's output.
_FAR = 1e9
# Tags that say how stored values are shown. Writers fill them in without a value, which pydicom's functions do not expect.
_DISPLAY = (
    "RescaleSlope",
    "RescaleIntercept",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PixelPaddingValue",
)


def decode(data: bytes, name: str, max_pixels: int | None) -> Image.Image:
    """Decodes a DICOM file.

    Args:
        data: the file's bytes.
        name: what messages call it.
        max_pixels: a larger image is not decoded; None: any size is.

    Returns:
        An image of mode L, I;16 or RGB.

    Raises:
        ImageError: ``image_undecodable`` (also compressed by a method without a decoder here), ``image_too_large`` or
            ``image_multi_frame``.
    """
    if _DEFLATED in data[:_HEAD]:
        # The parser would inflate the whole file, whatever its size, before the size of the image is known.
        raise ImageError("image_undecodable", f"{name}: DICOM with a deflated data set")
    with _quiet():
        try:
            return _decode(data, name, max_pixels)
        except ImageError:
            raise
        except Exception as error:
            # The parser raises anything on damaged files, and its messages quote them.
            kind = type(error).__name__
        raise ImageError("image_undecodable", f"{name}: DICOM, {kind}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings, which quote the file's tags, and arithmetic on odd windows."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _decode(data: bytes, name: str, max_pixels: int | None) -> Image.Image:
    import pydicom
    from pydicom.pixels import pixel_array

    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    width, height = int(dataset.Columns), int(dataset.Rows)
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError("image_too_large", f"{name}: {width}×{height} pixels, limit {max_pixels}")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ImageError("image_multi_frame", f"{name}: {frames} frames; export the one that is meant")
    _check_syntax(dataset, name)
    _tidy_display(dataset)
    stored = pixel_array(dataset)
    photometric = str(dataset.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        return _colour(_palette(stored, dataset), bits=16)
    if stored.ndim == 3:
        return _colour(stored, int(dataset.BitsStored))
    return _grey(stored, dataset, inverted=photometric == "MONOCHROME1")


def _check_syntax(dataset: Dataset, name: str) -> None:
    """Says why a compressed image cannot be decoded; fills in the syntax of files that do without a header."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.pixels import get_decoder
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    meta: Any = getattr(dataset, "file_meta", None)
    if meta is None or "TransferSyntaxUID" not in meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta = FileMetaDataset() if meta is None else meta
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
        return
    syntax = meta.TransferSyntaxUID
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise ImageError("image_undecodable", f"{name}: DICOM of an unknown transfer syntax")
    if not get_decoder(syntax).is_available:
        raise ImageError(
            "image_undecodable",
            f"{name}: DICOM compressed by {syntax.name}; install a decoder for pydicom (pylibjpeg) on every node",
        )


def _colour(stored: np.ndarray, bits: int) -> Image.Image:
    """RGB from stored values of the given depth, shape (H, W, 3)."""
    if bits > 8:
        stored = stored >> (bits - 8)
    return Image.fromarray(np.ascontiguousarray(stored[..., :3]).astype(np.uint8))


def _palette(stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    found = apply_color_lut(stored, dataset)
    return found.astype(np.uint16) << 8 if found.dtype == np.uint8 else found


def _grey(stored: np.ndarray, dataset: Dataset, inverted: bool) -> Image.Image:
    from pydicom.pixels import apply_modality_lut

    values = apply_modality_lut(stored, dataset)
    shown = _windowed(values, dataset)
    if shown is None:
        shown = _full_range(values, stored, dataset)
    if inverted:
        shown = (255 if shown.dtype == np.uint8 else shown.max()) - shown
    return Image.fromarray(shown)


def _tidy_display(dataset: Dataset) -> None:
    """Leaves out tags without a value, completes half a rescaling and keeps of several windows the first whole one."""
    for name in _DISPLAY:
        if name in dataset and dataset[name].VM == 0:
            del dataset[name]
    if "RescaleSlope" in dataset or "RescaleIntercept" in dataset:
        dataset.RescaleSlope = dataset.get("RescaleSlope", 1)
        dataset.RescaleIntercept = dataset.get("RescaleIntercept", 0)
    centers, widths = (_values(dataset, name) for name in ("WindowCenter", "WindowWidth"))
    whole = (pair for pair in zip(centers, widths, strict=False) if _is_window(*pair))
    window = next(whole, None)
    if window is not None:
        dataset.WindowCenter, dataset.WindowWidth = window
    else:
        for name in ("WindowCenter", "WindowWidth"):
            dataset.pop(name, None)


def _values(dataset: Dataset, name: str) -> list[Any]:
    if name not in dataset:
        return []
    value = dataset[name].value
    return list(value) if dataset[name].VM > 1 else [value]


def _is_window(center: Any, width: Any) -> bool:
    """Whether both are numbers, the width above 0; an empty member of a list is an empty text."""
    return all(isinstance(value, int | float | Decimal) for value in (center, width)) and width > 0


def _windowed(values: np.ndarray, dataset: Dataset) -> np.ndarray | None:
    """The VOI table or else the window applied, as uint8; None where there is none or it shows nothing."""
    for look in (_by_table, _by_window):
        try:
            found = look(values, dataset)
        except (ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
            # An impossible table or window (width 0): the image itself is sound.
            continue
        if found is None:
            continue
        shown, dark, bright = found
        if not np.isfinite(shown).all() or (shown.min() == shown.max() and np.ptp(values) > 0):
            continue
        # Where the rescaling falls, so does the range of the output.
        if abs(bright - dark) > 0:
            return np.round(np.clip((shown - dark) / (bright - dark), 0, 1) * 255).astype(np.uint8)
    return None


def _by_table(values: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, float, float] | None:
    """The first VOI table applied, and what it makes of the darkest and the brightest; None where there is none."""
    from pydicom.pixels import apply_voi

    if not dataset.get("VOILUTSequence"):
        return None
    bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
    return apply_voi(values, dataset).astype(np.float64), 0.0, float(2**bits - 1)


def _by_window(values: np.ndarray, dataset: Dataset) -> tuple[np.ndarray, float, float] | None:
    """The window applied by PS3.3 C.11.2.1.2 (linear, linear exact, sigmoid), as :func:`_by_table` does."""
    from pydicom.pixels import apply_windowing

    if "WindowCenter" not in dataset:
        return None
    dark, bright = apply_windowing(np.array([-_FAR, _FAR]), dataset)
    return apply_windowing(values, dataset), float(dark), float(bright)


def _full_range(values: np.ndarray, stored: np.ndarray, dataset: Dataset) -> np.ndarray:
    """All values: unchanged as uint8 where 8 bits hold them, else as uint16 from 0, scaled only if they need it."""
    values = np.nan_to_num(np.asarray(values, dtype=np.float64))
    whole = bool((values == np.round(values)).all())
    if int(dataset.BitsStored) <= 8 and whole and values.min() >= 0 and values.max() <= 255:
        return values.astype(np.uint8)
    # What pads the image to a rectangle is far outside the range of the rest.
    padding = dataset.get("PixelPaddingValue")
    inside = values[stored != padding] if padding is not None else values
    inside = inside if inside.size else values
    low, high = float(inside.min()), float(inside.max())
    shown = np.clip(values, low, high) - low
    if high > low and (not whole or high - low > 65535):
        shown *= 65535 / (high - low)
    return np.round(shown).astype(np.uint16)
