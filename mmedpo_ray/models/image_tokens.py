"""How many token ids stand for an image, and whether a processor makes images as the model takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmedpo_ray.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL import Image
    from transformers import LlavaProcessor

_CORRECT_THE_PROCESSOR = (
    "Correct patch_size, num_additional_image_tokens (1 for a tower with a class token such as CLIP, 0 for "
    "SigLIP) and vision_feature_select_strategy (that of config.json) in processor_config.json."
)
_CORRECT_THE_IMAGE_PROCESSOR = "in preprocessor_config.json (or in image_processor of processor_config.json)"


def check_images(processor: LlavaProcessor, source: str, name: str) -> None:
    """Compares what the processor makes of an image with what the configured model takes.

    Args:
        processor: of the model.
        source: folder or hub name of the model.
        name: the same for messages.

    Raises:
        UserError: the image's size, its number of ids or the id differ.
    """
    from transformers import LlavaConfig

    try:
        config: Any = LlavaConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name}: {first_line(error)}.") from error
    if processor.image_token_id != config.image_token_id:
        raise UserError(
            f"the processor of {name} writes an image as id {processor.image_token_id} "
            f"({processor.image_token}), but the model's image_token_index is {config.image_token_id}. Set "
            "image_token in processor_config.json, or image_token_index in config.json."
        )
    ids = count_image_tokens(processor)
    tower = config.vision_config
    side = tower.image_size
    made = tuple(processor.image_processor(_blank_image(), return_tensors="pt")["pixel_values"].shape[-2:])
    if made != (side, side):
        raise UserError(
            f"the image processor of {name} makes images of {made[0]} x {made[1]} pixels, but its vision "
            f"tower takes {side} x {side}. Correct size and crop_size {_CORRECT_THE_IMAGE_PROCESSOR}."
        )
    has_class_token = tower.model_type == "clip_vision_model"
    drops_one = config.vision_feature_select_strategy == "default"
    features = (side // tower.patch_size) ** 2 + has_class_token - drops_one
    if ids != features:
        raise image_mismatch(ids, features)


def count_image_tokens(processor: LlavaProcessor) -> int:
    """Number of ids that the processor itself writes for an image.

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
        # Its configuration may hold numbers of any size and kind, which mostly fail once there is an image.
        raise UserError(
            f"the image processor cannot process an image ({type(error).__name__}). Correct the numbers "
            f"{_CORRECT_THE_IMAGE_PROCESSOR}."
        ) from error
    return list(encoded["input_ids"][0]).count(processor.image_token_id)


def image_mismatch(ids: int, features: int) -> UserError:
    """The error for prompts with another number of ids per image than the tower has features."""
    return UserError(
        f"a prompt has {ids} ids for an image, but the vision tower gives {features} features for it. "
        f"{_CORRECT_THE_PROCESSOR}"
    )


def _blank_image() -> Image.Image:
    """An image that is not square, so that processing which keeps the sides of an image is noticed."""
    from PIL import Image

    return Image.new("RGB", (48, 32))
