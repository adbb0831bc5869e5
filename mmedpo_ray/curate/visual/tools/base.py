"""What a visual tool is, and how a patch grid becomes a heat map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from mmedpo_ray.config.tree import Config


@dataclass(frozen=True)
class Localisation:
    """What a tool sees in an image.

    Attributes:
        heat_map: float32 (H, W) of the image's size, 0 to 1; None if the tool could not work.
        confidence: 0 to 1, that a lesion was found.
        problem: drop reason if the tool could not work.
        detail: what is wrong, without patient text.
        choice: what the tool chose about this sample, JSON-able, without patient text; goes into the pair's
            column ``noise``.
    """

    heat_map: np.ndarray | None
    confidence: float
    problem: str | None = None
    detail: str | None = None
    choice: dict[str, Any] = field(default_factory=dict)


class VisualTool(ABC):
    """Localises the lesion. One instance serves many batches in a Ray task or actor.

    Attributes:
        has_model: whether making an instance loads a model. With one, `curate` keeps the tool in an actor,
            which holds a GPU if the cluster has any; without, it makes the tool again in every task, on CPUs.

    Args:
        config: all settings.
    """

    has_model: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def fingerprint(cls, config: Config) -> list[str]:  # noqa: ARG003 - for tools with files
        """What the tool's results depend on besides the settings: the state of the files it loads.

        Part of the key of `curate`, so that another checkpoint under the same name makes the pairs again.
        Loads no model.

        Raises:
            UserError: a file that the tool needs is not named or not there.
        """
        return []

    @abstractmethod
    def localise(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Localisation]:
        """One localisation per image, in their order; a tool with a model runs as many at once as it can.

        Args:
            images: decoded images in their own modes and sizes, ``curate.visual.batch_images`` at most; for a
                tool with a model just as many, the last repeated if there are fewer.
            rows: the samples asked about, with at least ``sample_id``, ``question``, ``answer`` and
                ``mask_uri``.
        """


def upsample(
    grid: np.ndarray, height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Spreads a patch grid bilinearly over the part of the image that it was computed from.

    Args:
        grid: (rows, columns), one value per patch, of any range.
        height, width: of the image in pixels.
        box: left, top, right, bottom of that part in pixels; None: the whole image.

    Returns:
        float32 (H, W) in [0, 1]: the coldest patch is 0, the hottest 1, and everything outside ``box`` is 0.
    """
    low, high = float(grid.min()), float(grid.max())
    scaled = (grid - low) / (high - low) if high > low else np.zeros_like(grid, dtype=np.float64)
    left, top, right, bottom = box or (0.0, 0.0, float(width), float(height))
    rows, columns = grid.shape
    down, across = _interpolation(height, rows, top, bottom), _interpolation(width, columns, left, right)
    heat_map = down @ scaled.astype(np.float32) @ across.T
    return np.clip(heat_map, 0.0, 1.0, out=heat_map)


@lru_cache(maxsize=32)
def _interpolation(pixels: int, patches: int, start: float, end: float) -> np.ndarray:
    """Linear weights of patches (columns) at pixels (rows), float32; 0 outside ``start`` to ``end``."""
    # Pixel centres in patch coordinates, where patch i has its centre at i.
    place = (np.arange(pixels) + 0.5 - start) / (end - start) * patches - 0.5
    inside = (place >= -0.5) & (place <= patches - 0.5)
    nearest = np.clip(place, 0, patches - 1)
    weights = np.maximum(0.0, 1.0 - np.abs(nearest[:, None] - np.arange(patches)[None, :]))
    weights = (weights * inside[:, None]).astype(np.float32)
    # Shared by all images of this size.
    weights.flags.writeable = False
    return weights
