"""DICOM images as a reader sees them on screen: rescaled, windowed, with bright as bright.

What comes out:
- A grey image with a window or a VOI table is 8 bit (L): the site chose that range of values as the one to
  look at, and the full range of a CT (air to metal) would leave soft tissue a few grey levels.
- A grey image of more than 8 bits without one keeps its depth (I;16), shifted so that its darkest value is 0;
  models scale it by its range, noise is added at full depth. Fewer than 8 bits are spread over 8.
- Colour is RGB.

Of a file of several frames the caller says which one is meant. Nothing of the file but sizes, bits, frames,
the numbers and terms of its display ever enters a message: tags hold patient data.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmedpo_ray.io.dicom.deflated import inflated
from mmedpo_ray.io.dicom.display import show_grey
from mmedpo_ray.io.dicom.lookup_tables import palette
from mmedpo_ray.io.dicom.pixels import Bits, check_pixels, stored_pixels
from mmedpo_ray.io.dicom.tags import DisplayTags, frames_of
from mmedpo_ray.io.image_error import MADE_BY, ImageError, check_frame, check_size

if TYPE_CHECKING:
    from pydicom import Dataset

# An inflated data set may be so large where the caller sets no limit.
MAX_BYTES = 1_000_000_000


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
        ImageError: ``image_undecodable`` (also without pixels, or compressed by a method without a decoder
            here), ``image_too_large``, ``image_multi_frame``, or ``image_no_such_frame``.
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
        return frames_of(_read(data, name, max_bytes))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Silences warnings, which quote tags, and raises any error as an :class:`ImageError`."""
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

    whole = inflated(data, name, MAX_BYTES if max_bytes is None else max_bytes)
    return pydicom.dcmread(io.BytesIO(whole), force=True)


def _decode(dataset: Dataset, name: str, max_pixels: int | None, frame: int | None) -> Image.Image:
    check_pixels(dataset, name)
    check_size(name, int(dataset.Columns), int(dataset.Rows), max_pixels)
    frames = frames_of(dataset)
    check_frame(name, frames, frame)
    index = (frame or 1) - 1
    words, bits = stored_pixels(dataset, name, index)
    image, notes = _shown(words, bits, DisplayTags(dataset, index))
    image.info[MADE_BY] = [
        f"DICOM, {dataset.file_meta.TransferSyntaxUID.name}",
        *([f"frame {index + 1} of {frames}"] if frames > 1 else []),
        f"{bits.stored} bits",
        *notes,
    ]
    return image


def _shown(words: np.ndarray, bits: Bits, tags: DisplayTags) -> tuple[Image.Image, list[str]]:
    kind = tags.dataset.PhotometricInterpretation
    if words.ndim == 3:
        return _rgb(bits.values(words), bits.stored), [kind.split("_")[0]]
    colours = palette(tags.dataset) if kind == "PALETTE COLOR" else None
    if colours is not None:
        stored = bits.values(words)
        return _rgb(np.stack([table.apply(stored) for table in colours], axis=-1), 8), ["palette"]
    return show_grey(words, bits, tags, inverted=kind == "MONOCHROME1")


def _rgb(stored: np.ndarray, bits: int) -> Image.Image:
    """RGB from stored values of the given depth, shape (H, W, 3)."""
    stored = stored[..., :3]
    if bits > 8:
        stored = stored >> (bits - 8)
    elif bits < 8:
        stored = np.round(stored * (255 / (2**bits - 1)))
    return Image.fromarray(np.ascontiguousarray(stored.astype(np.uint8)))
