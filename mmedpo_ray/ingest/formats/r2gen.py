"""R2Gen's `annotation.json` for report generation.

``{"train": [{"id", "report", "image_path": […]}], "val": …, "test": …}``

IU X-Ray studies have two views, MIMIC-CXR ones one or more (its rows carry more members, which are ignored).
The answer is the report, the question is ``data.report_instruction``. A lesion mask may be named like the
image, by a path or a list of them, of which the first counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from PIL import Image

from mmedpo_ray.datasets.cleaning import clean
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest.annotations import MASK_KEY, AnnotationReader, Turn
from mmedpo_ray.ingest.image_checker import ImageChecker, ImageFacts
from mmedpo_ray.io import images

_GREY = ("1", "L", "I;16", "I;16B", "I;16L", "I", "F")


class R2GenReader(AnnotationReader):
    """Reads studies with their reports."""

    layout = "sections"
    train_name = "annotation.json"
    sections: ClassVar[Mapping[str, str]] = {"train": "train", "val": "validate", "test": "test"}

    def files(self) -> list[tuple[str, str | None]]:
        if self.data.test_file is not None:
            raise UserError(
                "data.test_file has no place in data.format=r2gen: the annotation file holds the test part. "
                "Leave it out."
            )
        return [(self.data.train_file or self.train_name, None)]

    def split_of(self, row: dict[str, Any], split: str | None) -> str | None:  # noqa: ARG002 - the section says it
        if split not in self.sections.values():
            raise UnusableError("unknown_split")
        return split

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        return [Turn(self.data.report_instruction, clean(row.get("report")), "report")]

    def image(self, row: dict[str, Any], folder: str, checker: ImageChecker) -> ImageFacts:
        paths = row.get("image_path")
        if isinstance(paths, str):
            paths = [paths]
        if not isinstance(paths, list) or not paths:
            raise UnusableError("no_image_name")
        shown = paths[:1] if self.data.views == "first" else paths
        views = [self.found_image(path, folder, checker) for path in shown]
        found = views[0] if len(views) == 1 else self._composite(views, checker)
        mask = row.get(MASK_KEY)
        mask = mask[0] if isinstance(mask, list) and mask else mask
        return replace(found, mask_uri=self.mask(mask, folder, checker))

    def _composite(self, found: list[ImageFacts], checker: ImageChecker) -> ImageFacts:
        """Writes all views of a study as one image; its name is the hash of its bytes."""
        views = [checker.load(view.uri) for view in found]
        data = images.encode_png(side_by_side(views, self.data.max_pixels))
        return ImageFacts(*checker.write_file(data, "png"), found[0].image_id)


def side_by_side(views: list[Image.Image], max_pixels: int) -> Image.Image:
    """The views from left to right, each scaled to the height of the tallest; grey if all are, else RGB.

    Raises:
        UnusableError: the result would have more than ``max_pixels``.
    """
    height = max(view.height for view in views)
    sizes = [(max(1, round(view.width * height / view.height)), height) for view in views]
    width = sum(size[0] for size in sizes)
    if width * height > max_pixels:
        raise UnusableError("image_too_large", f"{len(views)} views side by side: {width}×{height} pixels")
    mode = "L" if all(view.mode in _GREY for view in views) else "RGB"
    result = Image.new(mode, (width, height))
    left = 0
    for view, size in zip(views, sizes, strict=True):
        scaled = images.to_rgb(view).convert(mode).resize(size, Image.Resampling.LANCZOS)
        result.paste(scaled, (left, 0))
        left += size[0]
    return result
