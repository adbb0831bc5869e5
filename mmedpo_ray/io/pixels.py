"""Arithmetic on arrays of pixels that several kinds of file need."""

from __future__ import annotations

import numpy as np

_ROWS = 64


def read_off(table: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The entry of a table for each pixel.

    Args:
        table: (N,) what each value becomes.
        pixels: (H, W) unsigned integers below N.

    Returns:
        (H, W), of the table's type.
    """
    found = np.empty(pixels.shape, table.dtype)
    # Some rows at a time: NumPy makes 64-bit places of the pixels first, which then stay in the cache.
    for start in range(0, len(found), _ROWS):
        rows = slice(start, start + _ROWS)
        np.take(table, pixels[rows], out=found[rows], mode="clip")
    return found


def finite(pixels: np.ndarray) -> np.ndarray:
    """Float pixels, with infinite ones and NaN (as the lowest) clipped to the range of the others."""
    known = np.isfinite(pixels)
    if known.all():
        return pixels
    low, high = (pixels[known].min(), pixels[known].max()) if known.any() else (0.0, 0.0)
    return np.nan_to_num(pixels, nan=low, posinf=high, neginf=low)
