"""LLaVA 1.5: CLIP or SigLIP, a projector, and a Llama, Mistral or Qwen2. LLaVA-Med 1.5 once converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.architectures.base import Architecture, hub_tower_name

if TYPE_CHECKING:
    from PIL import Image

# These give a fixed number of features per image.
_TOWERS = ("clip_vision_model", "siglip_vision_model")
_CORRECT_THE_PROCESSOR = (
    "Correct patch_size, num_additional_image_tokens (1 for a tower with a class token such as CLIP, 0 for "
    "SigLIP) and vision_feature_select_strategy (that of config.json) in processor_config.json."
)
_CORRECT_THE_IMAGE_PROCESSOR = "in preprocessor_config.json (or in image_processor of processor_config.json)"


class Llava(Architecture):
    """``LlavaForConditionalGeneration``."""

    title = "LLaVA 1.5, LLaVA-Med 1.5"
    one_image_size = True
    patch_grid = True

    def check(self, config: Mapping[str, Any], name: str) -> None:
        """Only towers with a fixed number of features are taken."""
        tower = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
        if tower not in _TOWERS:
            raise UserError(f"{name} has a {tower} tower. Supported are {' and '.join(_TOWERS)}.")

    def check_processor(self, processor: Any, config: Any, name: str) -> None:
        """The image's size, its number of ids and the id must be the model's."""
        super().check_processor(processor, config, name)
        ids = self.image_tokens(processor)
        tower = config.vision_config
        side = tower.image_size
        made = tuple(self.inputs(processor, [_blank_image()])["pixel_values"].shape[-2:])
        if made != (side, side):
            raise UserError(
                f"the image processor of {name} makes images of {made[0]} x {made[1]} pixels, but its vision "
                f"tower takes {side} x {side}. Correct size and crop_size {_CORRECT_THE_IMAGE_PROCESSOR}."
            )
        has_class_token = tower.model_type == "clip_vision_model"
        drops_one = config.vision_feature_select_strategy == "default"
        features = (side // tower.patch_size) ** 2 + has_class_token - drops_one
        if ids != features:
            raise UserError(
                f"a prompt has {ids} ids for an image, but the vision tower gives {features} features for "
                f"it. {_CORRECT_THE_PROCESSOR}"
            )

    def image_tokens(self, processor: Any, size: tuple[int, int] | None = None) -> int:  # noqa: ARG002
        """Number of ids that the processor itself writes for any image.

        Raises:
            UserError: the processor cannot process an image or lacks what the number depends on.
        """
        settings = ("patch_size", "num_additional_image_tokens")
        if missing := [name for name in settings if getattr(processor, name) is None]:
            raise UserError(
                f"the processor lacks {' and '.join(missing)}, so it cannot tell how many ids an image has. "
                f"{_CORRECT_THE_PROCESSOR}"
            )
        try:
            encoded = processor(images=_blank_image(), text=processor.image_token)
        except Exception as error:
            # Its configuration may hold numbers of any size and kind, which mostly fail once there is an
            # image.
            raise UserError(
                f"the image processor cannot process an image ({type(error).__name__}). Correct the numbers "
                f"{_CORRECT_THE_IMAGE_PROCESSOR}."
            ) from error
        return list(encoded["input_ids"][0]).count(processor.image_token_id)

    def fixed_image_tokens(self, config: Any) -> int:
        """As the checkpoint says."""
        return config.image_seq_length

    def saved_name(self, weight: str) -> str:
        return hub_tower_name(weight)


def saved_parameter(parameter: str) -> str:
    """The hub's name of a parameter of a built ``LlavaForConditionalGeneration`` (transformers 5)."""
    if parameter.startswith("lm_head."):
        return f"language_model.{parameter}"
    name = parameter.removeprefix("model.")
    if name.startswith("language_model."):
        return f"language_model.model.{name.removeprefix('language_model.')}"
    return hub_tower_name(name)


def _blank_image() -> Image.Image:
    """An image that is not square, so that processing which keeps the sides of an image is noticed."""
    from PIL import Image

    return Image.new("RGB", (48, 32))
