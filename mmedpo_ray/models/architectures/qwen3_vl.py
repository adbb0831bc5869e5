"""Qwen3-VL: Qwen2.5-VL, and features of inner layers of the tower enter the first text layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmedpo_ray.models.architectures.base import ImageTokens, Inputs, in_type_of
from mmedpo_ray.models.architectures.qwen2_5_vl import Qwen25VL


class Qwen3VL(Qwen25VL):
    """``Qwen3VLForConditionalGeneration``."""

    title = "Qwen3-VL"
    projector = ("model.visual.merger", "model.visual.deepstack_merger_list")

    def features(self, model: Any, inputs: Inputs) -> tuple[list[Tensor], list[int]]:
        """What stands in the places of image tokens, and what is added behind each of the first layers."""
        output = model.get_image_features(**in_type_of(model, inputs), return_dict=True)
        levels = [output.pooler_output, *output.deepstack_features]
        return [torch.cat(list(level)) for level in levels], [len(image) for image in output.pooler_output]

    def arguments(self, levels: Sequence[Tensor], tokens: ImageTokens) -> dict[str, Any]:
        """The inner features in the order of the image tokens."""
        shown = tokens.feature[tokens.is_image]
        return {
            "visual_pos_masks": tokens.is_image,
            "deepstack_visual_embeds": [level[shown] for level in levels[1:]],
        }
