"""The lesion mask that came with the data, as a visual tool that is always right."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from mmedpo_ray.curate.visual.tools.base import Localisation, VisualTool
from mmedpo_ray.io import images as image_files
from mmedpo_ray.io.masks import marked_pixels
from mmedpo_ray.radiology.labelled_boxes import asked_region


class DatasetMask(VisualTool):
    """Reads ``mask_uri``, of SLAKE's masks the part asked about; confidence 1 if anything is marked."""

    def localise(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Localisation]:
        limit = self.config.data.max_pixels
        return [_read(image, row, limit) for image, row in zip(images, rows, strict=True)]


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
