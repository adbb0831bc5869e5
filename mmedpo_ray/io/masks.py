"""Lesion masks as image files: which pixels they mark."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmedpo_ray.io.images import to_rgb

# Formats whose compression may change pixels; it then leaves faint ringing around what is marked.
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
_LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp")
_GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L")


def marked_pixels(mask: Image.Image) -> np.ndarray:
    """What a mask marks, bool (H, W).

    Every pixel that is not black is marked, so that each label of a mask of labels counts. In a lossy file (by the format
    of ``mask`` as it was decoded) only pixels at least half as bright as the brightest one are.
    """
    # Opaque black is no lesion: an alpha channel only says that there is a picture.
    values = np.asarray(mask if mask.mode in (*_GREY, "RGB") else to_rgb(mask))
    if values.ndim == 3:
        values = values.max(axis=2)
    marked = np.asarray(values > 0)
    return marked & (values >= values.max() / 2) if _is_lossy(mask) else marked


def _is_lossy(mask: Image.Image) -> bool:
    return mask.format in _LOSSY or (mask.format == "TIFF" and mask.info.get("compression") in _LOSSY_IN_TIFF)
