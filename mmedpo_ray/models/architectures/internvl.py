"""InternVL3 in transformers' own form (``-hf``): an image is cut into 1 to 12 tiles and a thumbnail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmedpo_ray.models.architectures.base import Architecture, Inputs, in_type_of

if TYPE_CHECKING:
    from PIL import Image


class InternVL(Architecture):
    """``InternVLForConditionalGeneration``."""

    title = "InternVL3 (hf)"

    def written_image(self, processor: Any) -> str:
        return f"{processor.start_image_token}{processor.image_token}{processor.end_image_token}"

    def image_tokens(self, processor: Any, size: tuple[int, int]) -> int:
        """Without the tokens that begin and end an image, which the processor counts too."""
        return super().image_tokens(processor, size) - 2

    def inputs(self, processor: Any, images: Sequence[Image.Image]) -> Inputs:
        """Tiles (N, 3, H, W) of all images, one after the other, and how many (I,) each has."""
        # The processor's default, not the image processor's.
        made = processor.image_processor(list(images), crop_to_patches=True, return_tensors="pt")
        return {"pixel_values": made["pixel_values"], "num_tiles": made["num_patches"].flatten()}

    def features(self, model: Any, inputs: Inputs) -> tuple[list[Tensor], list[int]]:
        """Features of the tiles."""
        tiles = {"pixel_values": inputs["pixel_values"]}
        found = model.get_image_features(**in_type_of(model, tiles), return_dict=True).pooler_output
        return [found.flatten(0, 1)], [found.shape[1] * count for count in inputs["num_tiles"].tolist()]
