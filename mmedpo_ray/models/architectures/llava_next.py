"""LLaVA-NeXT (1.6) and LLaVA-OneVision: an image whole and in tiles by its shape (anyres)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmedpo_ray.models.architectures.base import Architecture, Inputs, hub_tower_name

if TYPE_CHECKING:
    from PIL import Image


class LlavaNext(Architecture):
    """``LlavaNextForConditionalGeneration``."""

    title = "LLaVA-NeXT"

    def inputs(self, processor: Any, images: Sequence[Image.Image]) -> Inputs:
        """Tiles (I, N, 3, H, W) padded to the most of an image, and height and width (I, 2)."""
        made = processor.image_processor(list(images), return_tensors="pt")
        return {"pixel_values": made["pixel_values"], "image_sizes": torch.as_tensor(made["image_sizes"])}

    def collate(self, inputs: Sequence[Inputs]) -> Inputs:
        most = max(each["pixel_values"].shape[1] for each in inputs)
        return {
            "pixel_values": torch.cat([_padded(each["pixel_values"], most) for each in inputs]),
            "image_sizes": torch.cat([each["image_sizes"] for each in inputs]),
        }

    def saved_name(self, weight: str) -> str:
        return hub_tower_name(weight)


class LlavaOneVision(LlavaNext):
    """``LlavaOnevisionForConditionalGeneration``; its class in vLLM 0.32 has no LoRA."""

    title = "LLaVA-OneVision"
    serves_adapters = False


def _padded(tiles: Tensor, most: int) -> Tensor:
    return torch.nn.functional.pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - tiles.shape[1]))
