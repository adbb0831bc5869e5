"""Gemma 3 and MedGemma: tokens of an image see one another, and most layers see a window.

Two of its layers' masks differ from a plain tree's. The tokens of an image attend to the whole image, also to
what follows. And layers of type ``sliding_attention`` see the last ``sliding_window`` tokens of a sequence;
in a tree that window is counted by depth, because between a token and its ancestors stand tokens of other
sequences.

vLLM's CPU backend does not attend in both directions inside an image (0.32), and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmedpo_ray.errors import UserError
from mmedpo_ray.models.architectures.base import (
    Architecture,
    ImageTokens,
    check_known_layers,
    hub_tower_name,
)

_FULL, _SLIDING = "full_attention", "sliding_attention"


class Gemma3(Architecture):
    """``Gemma3ForConditionalGeneration``."""

    title = "Gemma 3, MedGemma"
    one_image_size = True
    layer_masks = True
    exact_on_cpu = False

    def check(self, config: Mapping[str, Any], name: str) -> None:
        """Capped logits and attention in both directions in text are refused."""
        text = config.get("text_config") or config
        for setting in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
            if text.get(setting):
                raise UserError(f"{name} has {setting}, which is not computed here for {self.title}.")
        check_known_layers(config, {_FULL, _SLIDING}, name)

    def check_processor(self, processor: Any, config: Any, name: str) -> None:
        """The number of an image's tokens must be the model's; crops beside the image are refused."""
        super().check_processor(processor, config, name)
        if processor.image_processor.do_pan_and_scan:
            raise UserError(
                f"{name} adds crops to an image (do_pan_and_scan), which is not supported. Set it to false "
                "in preprocessor_config.json (or in image_processor of processor_config.json)."
            )
        if processor.image_seq_length != config.mm_tokens_per_image:
            raise UserError(
                f"a prompt has {processor.image_seq_length} ids for an image, but the model gives "
                f"{config.mm_tokens_per_image} features for it. Set image_seq_length in "
                "processor_config.json to mm_tokens_per_image of config.json."
            )

    def image_token_id(self, processor: Any) -> int:
        """The processor itself calls ``<start_of_image>``, the placeholder, the image token."""
        return processor.tokenizer.image_token_id

    def placeholder(self, processor: Any) -> str:
        return processor.boi_token

    def written_image(self, processor: Any) -> str:
        """With its newlines, which may be one token with others beside them."""
        image = processor.tokenizer.image_token
        return processor.full_image_sequence.replace(image * processor.image_seq_length, image)

    def image_tokens(self, processor: Any, size: tuple[int, int]) -> int:  # noqa: ARG002
        return processor.image_seq_length

    def fixed_image_tokens(self, config: Any) -> int:
        return config.mm_tokens_per_image

    def masks(self, sees: Tensor, tokens: ImageTokens, config: Any) -> dict[str, Tensor]:
        """(R, 1, T, T) bool for each type of layer."""
        before = torch.nn.functional.pad(tokens.is_image, (1, 0))[:, :-1]
        run = (tokens.is_image & ~before).cumsum(1)
        same = (run[:, :, None] == run[:, None, :]) & (tokens.is_image[:, :, None] & tokens.is_image[:, None])
        full = sees | same
        distance = tokens.depth[:, :, None] - tokens.depth[:, None, :]
        near = distance < config.text_config.sliding_window
        return {_FULL: full[:, None], _SLIDING: (full & near)[:, None]}

    def saved_name(self, weight: str) -> str:
        return hub_tower_name(weight)
