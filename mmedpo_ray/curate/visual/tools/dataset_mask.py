"""The lesion mask that came with the data, as a visual tool that is always right."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from mmedpo_ray.curate.visual.tools.base import Localisation, VisualTool
from mmedpo_ray.io import images as image_files
from mmedpo_ray.radiology.labelled_boxes import asked_region

# Formats whose compression may change pixels; it then leaves faint ringing around what is marked.
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
_LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp")
_GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L")


class DatasetMask(VisualTool):
    """Reads ``mask_uri``, of a SLAKE mask the part that was asked about; the confidence is 1 where it marks anything."""

    def localise(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Localisation]:
        limit = self.config.data.max_pixels
        return [_read(image, row, limit) for image, row in zip(images, rows, strict=True)]


def marked_pixels(mask: Image.Image) -> np.ndarray:
    """What a mask marks, bool (H, W).

    Every pixel that is not black, so that each label of a mask of labels counts; of a lossy file (by its format, ``mask`` as
    it was decoded) those at least half as bright as its brightest.
    """
    # Opaque black is no lesion: an alpha channel only says that there is a picture.
    values = np.asarray(mask if mask.mode in (*_GREY, "RGB") else image_files.to_rgb(mask))
    if values.ndim == 3:
        values = values.max(axis=2)
    marked = np.asarray(values > 0)
    return marked & (values >= values.max() / 2) if _is_lossy(mask) else marked


def _is_lossy(mask: Image.Image) -> bool:
    return mask.format in _LOSSY or (mask.format == "TIFF" and mask.info.get("compression") in _LOSSY_IN_TIFF)


def _read(image: Image.Image, row: dict[str, Any], max_pixels: int) -> Localisation:
    uri: str | None = row["mask_uri"]
    if uri is None:
        return Localisation(None, 0.0, "no_mask", "the sample has no lesion mask")
    try:
        mask = image_files.load_image(uri, max_pixels)
    except image_files.ImageError as error:
        return Localisation(None, 0.0, error.reason.replace("image_", "mask_"), error.detail)
    if mask.size != image.size:
        return Localisation(None, 0.0, "mask_size", f"{uri}: mask {mask.size}, image {image.size}")
    lesion, choice = asked_region(marked_pixels(mask), uri, row["question"], row["answer"])
    return Localisation(np.asarray(lesion, dtype=np.float32), float(lesion.any()), choice=choice)
