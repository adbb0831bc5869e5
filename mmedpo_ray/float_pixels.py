"""Pixels that are floats, which may be no numbers."""

from __future__ import annotations

import numpy as np


def finite(pixels: np.ndarray) -> np.ndarray:
    """Float pixels with the infinite and the undefined ones at the ends of the range of the others (NaN: the lower)."""
    known = np.isfinite(pixels)
    if known.all():
        return pixels
    low, high = (pixels[known].min(), pixels[known].max()) if known.any() else (0.0, 0.0)
    return np.nan_to_num(pixels, nan=low, posinf=high, neginf=low)
