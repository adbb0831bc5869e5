"""Lookup tables of DICOM (modality, VOI, palette), in every packing that files have (PS3.3 C.11.1, C.11.2, C.7.6.3.1.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmedpo_ray.dicom.tags import numbers

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
        bits: of an entry, as declared.
    """

    first: int
    entries: np.ndarray
    bits: int

    def apply(self, values: np.ndarray) -> np.ndarray:
        """The entries of some inputs, which are rounded to whole numbers."""
        index = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1)
        return self.entries[index.astype(np.int64)]


def sequence_table(dataset: Dataset, name: str, values: np.ndarray) -> LookupTable | None:
    """The first table of a LUT sequence; None where there is none, or it is shorter than it says.

    Args:
        dataset: of the file.
        name: ModalityLUTSequence or VOILUTSequence.
        values: inputs, which tell whether the first entry's may be negative.
    """
    items = dataset.get(name)
    if not items:
        return None
    return _table(items[0], "LUTDescriptor", "LUTData", _is_little(dataset), is_signed=bool(values.min() < 0))


def palette(dataset: Dataset) -> list[LookupTable] | None:
    """The red, green and blue table, entries in 8 bits; None where one is missing or shorter than it says."""
    is_signed = bool(dataset.get("PixelRepresentation"))
    tables = []
    for colour in _COLOURS:
        descriptor, data = (f"{colour}PaletteColorLookupTable{part}" for part in ("Descriptor", "Data"))
        if data not in dataset:
            data = f"Segmented{data}"
        table = _table(dataset, descriptor, data, _is_little(dataset), is_signed)
        if table is None:
            return None
        tables.append(table)
    # Entries of 16 bits with nothing above the lower 8 are 8-bit colours, whatever the descriptor says.
    if max(int(table.entries.max()) for table in tables) < 256:
        return tables
    return [LookupTable(table.first, table.entries >> 8, 8) for table in tables]


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
    value = item[data].value
    entries: np.ndarray | None
    if data.startswith("Segmented"):
        expanded = _expanded(_units(value, bits, is_little))
        entries = expanded[:count] if len(expanded) >= count else None
    else:
        entries = _entries(value, count, bits, is_little)
    if entries is None:
        return None
    return LookupTable(first, entries.astype(np.int64), bits)


def _entries(value: Any, count: int, bits: int, is_little: bool) -> np.ndarray | None:
    """A table's entries: words, bytes, or bytes two a word; None where there are too few."""
    if isinstance(value, bytes | bytearray):
        if len(value) >= 2 * count:
            return np.frombuffer(value, "<u2" if is_little else ">u2", count)
        packed = np.frombuffer(value, np.uint8)
    else:
        words = np.atleast_1d(np.asarray(value, dtype=np.int64)) % _WORD
        if len(words) >= count:
            return words[:count]
        # The first of two entries is in the lower byte.
        packed = words.astype("<u2").view(np.uint8)
    return packed[:count] if bits <= 8 and len(packed) >= count else None


def _units(value: Any, bits: int, is_little: bool) -> list[int]:
    """What segments are made of: bytes of a table of 8 bits, else words."""
    if not isinstance(value, bytes | bytearray):
        words = np.atleast_1d(np.asarray(value, dtype=np.int64)) % _WORD
        return (words.astype("<u2").view(np.uint8) if bits <= 8 else words).tolist()
    if bits <= 8:
        return list(value)
    return np.frombuffer(value[: len(value) // 2 * 2], "<u2" if is_little else ">u2").tolist()


def _expanded(units: list[int]) -> np.ndarray:
    """A segmented table written out (PS3.3 C.7.9.2): discrete, linear and indirect segments."""
    found: list[int] = []
    place = 0
    while place + 1 < len(units):
        add = _repeat if units[place] == 2 else _segment
        place = add(units, place, found)
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


def _repeat(units: list[int], place: int, found: list[int]) -> int:
    """Adds earlier segments again: their number, and the place of the first in bytes, low half first."""
    half, width = (_WORD, 2) if max(units) > 255 or len(units) <= place + 5 else (256, 1)
    if width == 2:
        start, end = (units[place + 2] + half * units[place + 3]) // 2, place + 4
    else:
        start = sum(unit << (8 * number) for number, unit in enumerate(units[place + 2 : place + 6]))
        end = place + 6
    for _ in range(units[place + 1]):
        if start >= place or units[start] == 2:
            break
        start = _segment(units, start, found)
    return end
