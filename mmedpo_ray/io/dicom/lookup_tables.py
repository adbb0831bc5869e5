"""Lookup tables of DICOM (modality, VOI, palette), in every packing that files have.

PS3.3 C.11.1, C.11.2, C.7.6.3.1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedpo_ray.io.dicom.tags import DisplayTags, numbers

if TYPE_CHECKING:
    from pydicom import Dataset

_WORD = 1 << 16
_COLOURS = ("Red", "Green", "Blue")


@dataclass(frozen=True)
class LookupTable:
    """A table of values.

    Attributes:
        first: the input that the first entry belongs to.
        entries: (N,) what comes out; inputs below and above get the first and the last.
        is_whole: whether there are as many entries as it says.
    """

    first: int
    entries: np.ndarray
    is_whole: bool

    def apply(self, values: np.ndarray) -> np.ndarray:
        """The entries of some inputs, which are rounded to whole numbers."""
        index = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1)
        return self.entries[index.astype(np.int64)]

    def reaches(self, value: float) -> bool:
        """Whether there is an entry for a value, or a higher one."""
        return value <= self.first + len(self.entries) - 1


def sequence_table(
    tags: DisplayTags, name: str, values: np.ndarray, highest: Callable[[], float]
) -> LookupTable | None:
    """The first usable table of a LUT sequence; None where there is none.

    Args:
        tags: of the frame.
        name: ModalityLUTSequence or VOILUTSequence.
        values: inputs, which tell whether the first entry's may be negative.
        highest: the highest input of the image; a table that is shorter than it says must reach it.
    """
    is_signed = bool(values.min() < 0)
    for place in tags.places:
        for item in place.get(name) or []:
            table = _table(item, "LUTDescriptor", "LUTData", _is_little(tags.dataset), is_signed)
            if table is not None and (table.is_whole or table.reaches(highest())):
                return table
    return None


def palette(dataset: Dataset) -> list[LookupTable] | None:
    """The red, green and blue table, entries in 8 bits; None where one is missing or shorter than it says."""
    is_signed = bool(dataset.get("PixelRepresentation"))
    tables = []
    for colour in _COLOURS:
        descriptor, data = (f"{colour}PaletteColorLookupTable{part}" for part in ("Descriptor", "Data"))
        if data not in dataset:
            data = f"Segmented{data}"
        table = _table(dataset, descriptor, data, _is_little(dataset), is_signed)
        if table is None or not table.is_whole:
            return None
        tables.append(table)
    # Some writers declare more bits than they use; nobody means a palette whose brightest colour is almost
    # black.
    highest = max(int(table.entries.max()) for table in tables)
    bits = next(bits for bits in (8, 12, 16) if highest < 2**bits)
    return [replace(table, entries=table.entries >> (bits - 8)) for table in tables]


def _is_little(dataset: Dataset) -> bool:
    return dataset.original_encoding[1] is not False


def _table(item: Dataset, descriptor: str, data: str, is_little: bool, is_signed: bool) -> LookupTable | None:
    described = numbers(item, descriptor)
    if len(described) != 3 or None in described or data not in item:
        return None
    count, first, bits = (int(value or 0) for value in described)
    count = count % _WORD or _WORD
    if is_signed:
        first = (first + _WORD // 2) % _WORD - _WORD // 2
    else:
        first %= _WORD
    words, packed = _units(item[data].value, is_little or item[data].VR == "OB")
    if data.startswith("Segmented"):
        entries = _segments(words, packed, count, bits)
    else:
        entries = _entries(words, packed, count, bits)
    if not len(entries):
        return None
    return LookupTable(first, entries[:count].astype(np.int64), len(entries) >= count)


def _units(value: Any, is_little: bool) -> tuple[np.ndarray, np.ndarray]:
    """A table's data as words, and as bytes with the lower byte of each word first."""
    if isinstance(value, bytes | bytearray):
        whole = bytes(value) + b"\0" * (len(value) % 2)
        words = np.frombuffer(whole, "<u2" if is_little else ">u2")
        return words[: len(value) // 2], words.astype("<u2").view(np.uint8)[: len(value)]
    words = (np.atleast_1d(np.asarray([] if value is None else value, dtype=np.int64)) % _WORD).astype("<u2")
    return words, words.view(np.uint8)


def _entries(words: np.ndarray, packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """A table's entries: words or, where these are too few, 8-bit ones two a word."""
    # Words of 8 bits that are too few stay so: they would give zero for every other entry.
    is_packed = bits <= 8 and len(words) < count <= len(packed) and bool((packed[1::2] != 0).any())
    return packed if is_packed else words


def _segments(words: np.ndarray, packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """A segmented table written out; of 8 bits its units are bytes, or words as some write them."""
    ways = [(words, 2)] if bits > 8 else [(packed, 1), (words, 2)]
    written = [_expanded(units.tolist(), width) for units, width in ways]
    return next((each for each in written if len(each) == count), written[0])


def _expanded(units: list[int], width: int) -> np.ndarray:
    """A segmented table written out (PS3.3 C.7.9.2): discrete, linear and indirect segments.

    Args:
        units: what segments are made of.
        width: bytes a unit.
    """
    found: list[int] = []
    place = 0
    while place + 1 < len(units) and len(found) <= _WORD:
        place = _repeat(units, place, found, width) if units[place] == 2 else _segment(units, place, found)
    return np.array(found, dtype=np.int64)


def _segment(units: list[int], place: int, found: list[int]) -> int:
    """Adds a discrete or linear segment; returns where the next begins, the end for one that is neither."""
    code, length = units[place], units[place + 1]
    if code == 0:
        found += units[place + 2 : place + 2 + length]
        return place + 2 + length
    if code != 1 or place + 2 >= len(units) or not found:
        return len(units)
    steps = np.linspace(found[-1], units[place + 2], length + 1)[1:]
    found += np.rint(steps).astype(np.int64).tolist()
    return place + 3


def _repeat(units: list[int], place: int, found: list[int], width: int) -> int:
    """Copies earlier segments; the operands are their number and the offset of the first in bytes."""
    end = place + 2 + 4 // width
    start = sum(unit << (8 * width * number) for number, unit in enumerate(units[place + 2 : end])) // width
    for _ in range(units[place + 1]):
        if start >= place or units[start] == 2:
            break
        start = _segment(units, start, found)
    return end
