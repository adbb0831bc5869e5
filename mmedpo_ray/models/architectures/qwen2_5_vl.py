"""Qwen2.5-VL: images of any size and shape, and rotary positions of three axes. Lingshu, HuatuoGPT-Vision.

An image of h × w merged patches takes h·w tokens and max(h, w) positions. With one position for each token,
as other models have them, transformers computes something else without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.architectures.base import Architecture, ImageTokens, Inputs, check_known_layers

if TYPE_CHECKING:
    from PIL import Image


class Qwen25VL(Architecture):
    """``Qwen2_5_VLForConditionalGeneration``."""

    title = "Qwen2.5-VL, Lingshu, HuatuoGPT-Vision (Qwen2.5-VL)"
    tower = ("model.visual",)
    projector: tuple[str, ...] = ("model.visual.merger",)

    def check(self, config: Mapping[str, Any], name: str) -> None:
        """Layers with a sliding window are refused: in a tree a token sees all its ancestors."""
        text = config.get("text_config") or config
        if text.get("use_sliding_window"):
            raise UserError(f"{name} has use_sliding_window, which is not supported for {self.title}.")
        check_known_layers(config, {"full_attention"}, name)

    def inputs(self, processor: Any, images: Sequence[Image.Image]) -> Inputs:
        """Patches (P, C) of all images, one after the other, and the grid (I, 3) of each."""
        made = processor.image_processor(list(images), return_tensors="pt")
        return {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}

    def positions(self, tokens: ImageTokens, inputs: Inputs, config: Any) -> Tensor:
        """(3, R, T): time, height and width.

        Of the image, time is the position where it begins. What follows an image of h × w goes on max(h, w)
        behind that, h·w tokens later.
        """
        grid = (
            inputs["image_grid_thw"].to(tokens.depth.device)[:, 1:] // config.vision_config.spatial_merge_size
        )
        height, width = grid[tokens.image].unbind(-1)
        shift = torch.maximum(height, width) - height * width
        # Behind an image is who descends from one of its tokens: a token before, in preorder, whose
        # subtree has not ended.
        ends = torch.where(tokens.is_image, tokens.subtree_end, 0).cummax(dim=1).values
        column = torch.arange(ends.shape[1], device=ends.device)
        text = tokens.depth + torch.where(column < ends, shift, 0)
        start = tokens.depth - tokens.within
        image = torch.stack([start, start + tokens.within // width, start + tokens.within % width])
        return torch.where(tokens.is_image, image, text)
