"""Stored values of a grey image → what is on screen: rescaled, windowed, with bright as bright.

Every step looks at one value at a time, so it is computed once for each value that pixels of up to 16 bits can have, and the image
is read off that table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmedpo_ray.dicom.tables import sequence_table
from mmedpo_ray.dicom.tags import DisplayTags

if TYPE_CHECKING:
    from pydicom import Dataset

Notes = list[str]

_ROWS = 64


def show_grey(stored: np.ndarray, dataset: Dataset, frame: int, inverted: bool) -> tuple[Image.Image, Notes]:
    """The image of one frame, and how it was made.

    Args:
        stored: (H, W) integers or floats.
        dataset: of the file.
        frame: from 0.
        inverted: whether low values are bright (MONOCHROME1).

    Returns:
        Mode L where a window or a VOI table says what to look at, or where 8 bits hold all; else I;16, from 0.
    """
    tags = DisplayTags(dataset, frame)
    notes: Notes = []
    codes = _codes(stored)
    values = _modality(stored if codes is None else codes, tags, notes)
    for apply in (_by_table, _by_window):
        shown = apply(values, tags, notes)
        if shown is None:
            continue
        if inverted:
            shown = 255 - shown
        image = _image(shown, stored, codes)
        darkest, brightest = image.getextrema()
        if darkest != brightest or _range_of(stored, codes, values) == 0:
            return image, [*notes, *(["inverted"] if inverted else [])]
        notes[-1] += " shows nothing"
    shown = _full_range(values, stored, codes, tags, notes)
    if inverted:
        notes.append("inverted")
    return _image(shown, stored, codes, inverted=inverted), notes


def _codes(stored: np.ndarray) -> np.ndarray | None:
    """Every value that pixels of this type can have, by their bits read as an unsigned number; None beyond 16 bits."""
    if stored.dtype.kind not in "iu" or stored.dtype.itemsize > 2:
        return None
    bits = 8 * stored.dtype.itemsize
    return np.arange(2**bits, dtype=f"u{stored.dtype.itemsize}").view(stored.dtype.newbyteorder("="))


def _unsigned(stored: np.ndarray) -> np.ndarray:
    """Pixels of up to 16 bits by their bits, as places in a table of all codes."""
    native = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("="))
    return native.view(f"u{stored.dtype.itemsize}")


def _image(
    shown: np.ndarray, stored: np.ndarray, codes: np.ndarray | None, *, inverted: bool = False
) -> Image.Image:
    """The image whose pixels are the shown value of each stored one; ``inverted`` turns the range that occurs round."""
    if codes is None:
        pixels = shown
    else:
        unsigned = _unsigned(stored)
        pixels = np.empty(unsigned.shape, shown.dtype)
        # Some rows at a time: NumPy makes 64-bit places of the pixels first, which then stay in the cache.
        for start in range(0, len(pixels), _ROWS):
            rows = slice(start, start + _ROWS)
            np.take(shown, unsigned[rows], out=pixels[rows], mode="clip")
    if inverted:
        pixels = (255 if pixels.dtype == np.uint8 else pixels.max()) - pixels
    return Image.fromarray(pixels)


def _modality(stored: np.ndarray, tags: DisplayTags, notes: Notes) -> np.ndarray:
    """Values in the unit of the modality, float64, by its table or else its rescaling."""
    table = sequence_table(tags.dataset, "ModalityLUTSequence", stored)
    if table is not None:
        notes.append(f"modality table of {len(table.entries)}")
        return table.apply(stored).astype(np.float64)
    values = np.asarray(stored, dtype=np.float64)
    rescale = tags.rescale()
    if rescale is None:
        return values
    notes.append(f"rescale {rescale[0]:g}·x{rescale[1]:+g}")
    return values * rescale[0] + rescale[1]


def _by_table(values: np.ndarray, tags: DisplayTags, notes: Notes) -> np.ndarray | None:
    """The VOI table applied, uint8; its own maximum is white, as tables often declare more bits than they use."""
    table = sequence_table(tags.dataset, "VOILUTSequence", values)
    if table is None or table.entries.max() <= 0:
        return None
    notes.append(f"VOI table of {len(table.entries)}")
    return _grey(table.apply(values) / table.entries.max())


def _by_window(values: np.ndarray, tags: DisplayTags, notes: Notes) -> np.ndarray | None:
    """The window applied, uint8 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    window = tags.window()
    if window is None:
        return None
    center, width, function = window
    notes.append(f"window {center:g}/{width:g} {function.lower().replace('_', ' ')}")
    if function == "SIGMOID":
        return _grey(1 / (1 + np.exp(-4 * (values - center) / width)))
    if function == "LINEAR_EXACT":
        return _grey((values - center) / width + 0.5)
    if width == 1:
        return _grey((values > center - 0.5).astype(np.float64))
    return _grey((values - (center - 0.5)) / (width - 1) + 0.5)


def _grey(shares: np.ndarray) -> np.ndarray:
    """Shares of white as uint8."""
    return np.round(np.clip(np.nan_to_num(shares), 0, 1) * 255).astype(np.uint8)


def _occurring(stored: np.ndarray, codes: np.ndarray | None) -> np.ndarray:
    """Which values of the table (or pixels) occur in the image."""
    if codes is None:
        return np.ones(stored.shape, bool)
    found = np.zeros(len(codes), bool)
    found[_unsigned(stored)] = True
    return found


def _range_of(stored: np.ndarray, codes: np.ndarray | None, values: np.ndarray) -> float:
    return float(np.ptp(values[_occurring(stored, codes)]))


def _full_range(
    values: np.ndarray, stored: np.ndarray, codes: np.ndarray | None, tags: DisplayTags, notes: Notes
) -> np.ndarray:
    """All values: as they are where 8 bits hold them, few bits spread over 8, else as uint16 from 0, scaled only if they need it."""
    values = np.nan_to_num(values, posinf=0, neginf=0)
    padding = tags.padding()
    is_affine = "ModalityLUTSequence" not in tags.dataset
    if codes is not None and is_affine and padding is None:
        # Between the extremes lies nothing that is darker or brighter, so which values occur does not matter.
        inside = occurring = (codes >= stored.min()) & (codes <= stored.max())
    else:
        inside = occurring = _occurring(stored, codes)
    if padding is not None:
        # What pads the image to a rectangle is far outside the range of the rest.
        raw = stored if codes is None else codes
        unpadded = occurring & ~((raw >= padding[0]) & (raw <= padding[1]))
        if unpadded.any():
            inside = unpadded
            notes.append("padding left out")
    low, high = float(values[inside].min()), float(values[inside].max())
    bits = int(tags.dataset.get("BitsStored") or 8 * stored.dtype.itemsize)
    whole = bool((values[occurring] == np.round(values[occurring])).all())
    if whole and bits <= 8 and inside is occurring and low >= 0 and high <= 2**bits - 1:
        if bits < 8:
            notes.append(f"{bits} bits spread over 8")
        return np.round(np.clip(values, 0, high) * (255 / (2**bits - 1))).astype(np.uint8)
    shown = np.clip(values, low, high) - low
    if high > low and (not whole or high - low > 65535):
        shown *= 65535 / (high - low)
        notes.append("scaled to 16 bits")
    else:
        notes.append("16 bits")
    return np.round(shown).astype(np.uint16)
