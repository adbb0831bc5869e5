"""Reads display tags: malformed numbers, odd spellings, functional groups of enhanced images.

Tags hold patient data, so nothing here puts a value into a message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset

_GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
# Where a functional group keeps what an image without groups has on top.
_MACROS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


class DisplayTags:
    """The display tags of one frame: its own, else the shared ones, else those of the data set.

    Args:
        dataset: of the file.
        frame: from 0.
    """

    def __init__(self, dataset: Dataset, frame: int) -> None:
        self.dataset = dataset
        self.places = [*_functional_groups(dataset, frame), dataset]

    def rescale(self) -> tuple[float, float] | None:
        """Slope and intercept; None where neither is a number.

        A slope of 0 would leave nothing to see and counts as 1.
        """
        for place in self.places:
            slope, intercept = (_first(numbers(place, name)) for name in ("RescaleSlope", "RescaleIntercept"))
            if slope is not None or intercept is not None:
                return slope or 1.0, intercept or 0.0
        return None

    def window(self) -> tuple[float, float, str] | None:
        """Centre, width and function (LINEAR, LINEAR_EXACT or SIGMOID) of the first whole window."""
        for place in self.places:
            pairs = zip(numbers(place, "WindowCenter"), numbers(place, "WindowWidth"), strict=False)
            for center, width in pairs:
                if center is not None and width is not None and width > 0:
                    return center, width, _function(term(place, "VOILUTFunction"), width)
        return None

    def padding(self) -> tuple[float, float] | None:
        """Lowest and highest stored value that only pad the image to a rectangle."""
        kind = next((kind for kind in ("Float", "DoubleFloat") if f"{kind}PixelData" in self.dataset), "")
        value, limit = (
            _first(numbers(self.dataset, f"{kind}PixelPadding{name}")) for name in ("Value", "RangeLimit")
        )
        if value is None:
            return None
        limit = value if limit is None else limit
        bounds = [value, limit] if kind else [self._as_stored(bound) for bound in (value, limit)]
        return min(bounds), max(bounds)

    def _as_stored(self, value: float) -> float:
        """A value read as this file's pixels are: its tag may have the other type (US, SS)."""
        bits = int(self.dataset.get("BitsAllocated") or 16)
        if bits > 16:
            return value
        unsigned = int(value) % 2**bits
        is_negative = self.dataset.get("PixelRepresentation") and unsigned >= 2 ** (bits - 1)
        return unsigned - 2**bits if is_negative else unsigned


def _functional_groups(dataset: Dataset, frame: int) -> Iterable[Dataset]:
    for name in _GROUPS:
        groups = dataset.get(name) or []
        index = frame if name == _GROUPS[0] else 0
        if index < len(groups):
            for macro in _MACROS:
                yield from (groups[index].get(macro) or [])[:1]


def numbers(dataset: Dataset, name: str) -> list[float | None]:
    """The numbers of a tag in order, None for one that is not finite; empty if the tag is missing."""
    if name not in dataset:
        return []
    try:
        value = dataset[name].value
    except Exception:
        # pydicom converts when asked, and raises anything on a text that is no number.
        value = _raw_text(dataset, name)
    if isinstance(value, str):
        value = value.split("\\")
    values = [value] if isinstance(value, int | float) or not isinstance(value, Iterable) else list(value)
    return [] if values in ([None], [""]) else [_number(each) for each in values]


def _raw_text(dataset: Dataset, name: str) -> str:
    value: Any = getattr(dataset.get_item(name), "value", b"")
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _number(value: Any) -> float | None:
    try:
        # A decimal comma is no DICOM, and what it means is plain.
        number = float(value.strip(" \0").replace(",", ".") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _first(values: list[float | None]) -> float | None:
    return values[0] if values else None


def frames_of(dataset: Dataset) -> int:
    """How many frames a file declares; 1 where it does not say, or says no number."""
    return max(1, int(_first(numbers(dataset, "NumberOfFrames")) or 1))


def term(dataset: Dataset, name: str) -> str:
    """A term in capitals with underscores for gaps, "Linear exact" → LINEAR_EXACT; empty if missing."""
    try:
        value = dataset.get(name)
    except Exception:
        return ""
    return re.sub(r"[^A-Z0-9]+", "_", str(value or "").upper()).strip("_")


def _function(named: str, width: float) -> str:
    """The window function; unknown ones are linear, and a linear width under 1 is LINEAR_EXACT."""
    if named in ("SIGMOID", "LINEAR_EXACT"):
        return named
    return "LINEAR" if width >= 1 else "LINEAR_EXACT"


_PALETTE = re.compile(r"^PALETTE(_?COLOU?R)?$")
_MONOCHROME = re.compile(r"^MONO[A-Z_]*0*([12])$")
_LUMINANCE = re.compile(r"^(YBR|YCBCR|YCC|YUV)")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")


def photometric(dataset: Dataset, *, is_jpeg: bool) -> str:
    """The photometric interpretation in its standard spelling; unknown ones follow the compression.

    Args:
        dataset: of the file.
        is_jpeg: whether it is compressed by JPEG, whose colours are luminance and two differences unless it
            is known better.
    """
    named = term(dataset, "PhotometricInterpretation")
    if _PALETTE.match(named):
        return "PALETTE COLOR"
    if int(dataset.get("SamplesPerPixel") or 1) == 1:
        found = _MONOCHROME.match(named)
        return f"MONOCHROME{found.group(1)}" if found else "MONOCHROME2"
    for known in _COLOURS:
        if known.replace("_", "") == named.replace("_", ""):
            return known
    if is_jpeg:
        return "YBR_FULL_422"
    return "YBR_FULL" if _LUMINANCE.match(named) else "RGB"
