"""What a visual tool is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmedpo_ray.config import Config


@dataclass(frozen=True)
class Localisation:
    """What a tool sees in an image.

    Attributes:
        heat_map: float32 (H, W) of the image's size, 0 to 1; None where the tool could not work.
        confidence: 0 to 1, that a lesion was found.
        problem: drop reason where the tool could not work.
        detail: what is wrong, without patient text.
    """

    heat_map: np.ndarray | None
    confidence: float
    problem: str | None = None
    detail: str | None = None


class VisualTool(ABC):
    """Localises the lesion. One instance serves many batches in a Ray task or actor.

    Attributes:
        has_model: it loads a model, so it runs in an actor that is kept.

    Args:
        config: all settings.
    """

    has_model: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def localise(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Localisation]:
        """One localisation an image.

        Args:
            images: decoded images in their own modes.
            rows: the samples asked about, with at least ``question``, ``answer`` and ``mask_uri``.
        """
