"""Stored values of a grey image → what is on screen: rescaled, windowed, with bright as bright.

Every step looks at one value at a time, so it is computed once for each value that pixels of up to 16 bits
can have, and the image is read off that table.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from PIL import Image

from mmedpo_ray.io.dicom.lookup_tables import LookupTable, sequence_table
from mmedpo_ray.io.dicom.pixels import Bits
from mmedpo_ray.io.dicom.tags import DisplayTags
from mmedpo_ray.io.pixels import read_off

Notes = list[str]


def show_grey(
    words: np.ndarray, bits: Bits, tags: DisplayTags, *, inverted: bool
) -> tuple[Image.Image, Notes]:
    """The image of one frame, and how it was made.

    Args:
        words: (H, W) integers or floats, as stored.
        bits: which bits of them count.
        tags: of the frame.
        inverted: whether low values are bright (MONOCHROME1).

    Returns:
        Mode L where a window or a VOI table says what to look at, or where 8 bits hold all; else I;16, from
        0.
    """
    grey = _Grey(words, bits, tags)
    for apply in (grey.by_table, grey.by_window):
        shown = apply()
        if shown is None:
            continue
        if inverted:
            shown = 255 - shown
        image = grey.image(shown)
        darkest, brightest = image.getextrema()
        if darkest != brightest or grey.is_flat():
            return image, [*grey.notes, *(["inverted"] if inverted else [])]
        grey.notes[-1] += " shows nothing"
    shown = grey.full_range()
    return grey.image(shown, inverted=inverted), [*grey.notes, *(["inverted"] if inverted else [])]


class _Grey:
    """The values of one frame on their way to the screen: for each possible code, or for each pixel."""

    def __init__(self, words: np.ndarray, bits: Bits, tags: DisplayTags) -> None:
        self.notes: Notes = []
        self._words = words
        self._codes = _codes(words)
        self._tags = tags
        self._bits = bits
        raw = words if self._codes is None else self._codes
        stored = bits.values(raw)
        self._is_padding, stored = _padding(raw, stored, bits, tags)
        self._table: LookupTable | None = None
        self._values = self._modality(stored)

    def image(self, shown: np.ndarray, *, inverted: bool = False) -> Image.Image:
        """The image of the shown values; ``inverted`` reverses the range that occurs."""
        pixels = shown if self._codes is None else read_off(shown, _unsigned(self._words))
        if inverted:
            pixels = (255 if pixels.dtype == np.uint8 else pixels.max()) - pixels
        return Image.fromarray(pixels)

    def is_flat(self) -> bool:
        """Whether all pixels have one value."""
        return float(np.ptp(self._values[self._occurring])) == 0

    @cached_property
    def _occurring(self) -> np.ndarray:
        """Which values of the table (or pixels) occur in the image and are numbers."""
        is_number = np.isfinite(self._values)
        if self._codes is None:
            return is_number if is_number.any() else np.ones_like(is_number)
        found = np.zeros(len(self._codes), bool)
        found[_unsigned(self._words)] = True
        return found

    def _highest(self) -> float:
        return float(self._values[self._occurring].max())

    def _modality(self, stored: np.ndarray) -> np.ndarray:
        """Values in the unit of the modality, float64, by its table or else its rescaling."""
        self._values = np.asarray(stored, dtype=np.float64)
        self._table = sequence_table(self._tags, "ModalityLUTSequence", stored, self._highest)
        if self._table is not None:
            self.notes.append(f"modality table of {len(self._table.entries)}")
            return self._table.apply(stored).astype(np.float64)
        rescale = self._tags.rescale()
        if rescale is None:
            return self._values
        self.notes.append(f"rescale {rescale[0]:g}·x{rescale[1]:+g}")
        return self._values * rescale[0] + rescale[1]

    def by_table(self) -> np.ndarray | None:
        """Applies the VOI table, uint8; its own maximum is white, since tables often declare unused bits."""
        table = sequence_table(self._tags, "VOILUTSequence", self._values, self._highest)
        if table is None or table.entries.max() <= 0:
            return None
        self.notes.append(f"VOI table of {len(table.entries)}")
        return _grey(table.apply(np.nan_to_num(self._values)) / table.entries.max())

    def by_window(self) -> np.ndarray | None:
        """The window applied, uint8 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
        window = self._tags.window()
        if window is None:
            return None
        center, width, function = window
        values = self._values
        self.notes.append(f"window {center:g}/{width:g} {function.lower().replace('_', ' ')}")
        if function == "SIGMOID":
            return _grey(1 / (1 + np.exp(-4 * (values - center) / width)))
        if function == "LINEAR_EXACT":
            return _grey((values - center) / width + 0.5)
        if width == 1:
            return _grey((values > center - 0.5).astype(np.float64))
        return _grey((values - (center - 0.5)) / (width - 1) + 0.5)

    def full_range(self) -> np.ndarray:
        """Shows all values: 8 bits unchanged, few bits spread over 8, else uint16, scaled if needed."""
        inside = occurring = self._full_occurring()
        if self._is_padding is not None:
            # What pads the image to a rectangle is far outside the range of the rest.
            unpadded = occurring & ~self._is_padding
            if unpadded.any():
                inside = unpadded
                self.notes.append("padding left out")
        values = self._values
        low, high = float(values[inside].min()), float(values[inside].max())
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        whole = bool((values[occurring] == np.round(values[occurring])).all())
        bits = self._bits.stored
        if whole and bits <= 8 and inside is occurring and low >= 0 and high <= 2**bits - 1:
            if bits < 8:
                self.notes.append(f"{bits} bits spread over 8")
            return np.round(np.clip(values, 0, high) * (255 / (2**bits - 1))).astype(np.uint8)
        shown = np.clip(values, low, high) - low
        if high > low and (not whole or high - low > 65535):
            shown *= 65535 / (high - low)
            self.notes.append("scaled to 16 bits")
        else:
            self.notes.append("16 bits")
        return np.round(shown).astype(np.uint16)

    def _full_occurring(self) -> np.ndarray:
        codes, words = self._codes, self._words
        if (
            codes is None
            or self._is_padding is not None
            or self._table is not None
            or not self._bits.is_lowest(words)
        ):
            return self._occurring
        # Between the extremes lies nothing that is darker or brighter, so which values occur does not matter.
        return (codes >= words.min()) & (codes <= words.max())


def _padding(
    raw: np.ndarray, stored: np.ndarray, bits: Bits, tags: DisplayTags
) -> tuple[np.ndarray | None, np.ndarray]:
    """Which values only pad the image (None: none declared), and the stored values with the right padding.

    The standard lets padding lie outside the range of the bits that hold pixels; cut off, it would be a grey
    among others.
    """
    bounds = tags.padding()
    if bounds is None:
        return None, stored
    is_padding = _between(stored, bounds)
    if bits.complete or bits.lowest:
        return is_padding, stored
    outside = _between(raw, bounds) & ~is_padding
    return is_padding | outside, np.where(outside, raw, stored)


def _between(values: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    return (values >= bounds[0]) & (values <= bounds[1])


def _codes(stored: np.ndarray) -> np.ndarray | None:
    """Every value that pixels of this type can have, indexed by their bits; None beyond 16 bits."""
    if stored.dtype.kind not in "iu" or stored.dtype.itemsize > 2:
        return None
    bits = 8 * stored.dtype.itemsize
    return np.arange(2**bits, dtype=f"u{stored.dtype.itemsize}").view(stored.dtype.newbyteorder("="))


def _unsigned(stored: np.ndarray) -> np.ndarray:
    """Pixels of up to 16 bits by their bits, as places in a table of all codes."""
    native = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("="))
    return native.view(f"u{stored.dtype.itemsize}")


def _grey(shares: np.ndarray) -> np.ndarray:
    """Shares of white as uint8."""
    return np.round(np.clip(np.nan_to_num(shares), 0, 1) * 255).astype(np.uint8)
