"""The target model's own attention as a visual tool: needs no mask and no further model.

The attention that the tokens predicting the answer pay to each image patch, averaged over these tokens, heads and layers. On
the embedded model and its phantoms this finds the lesion far above chance; dividing by the attention under a neutral
instruction, which helps some large models, made it worse there. The confidence says how concentrated the attention is, not
how likely a disease is: a normal image can have a confident heat map. As the score of a visual pair it therefore ranks pairs by
how local their noise is; whether that is clinical relevance is an open question.

One row at a time: until they are averaged, the attention weights of a 7B model fill about a gigabyte a row.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from PIL import Image

from mmedpo_ray.config import Config
from mmedpo_ray.curate.tools.base import Localisation, VisualTool, upsample
from mmedpo_ray.images import to_rgb

# The confidence compares this share of the patches, the hottest ones, with what uniform attention would give them.
_HOT_SHARE = 0.15
_EPSILON = 1e-8


class SelfAttention(VisualTool):
    """Attention of the model to align, from the answer to the image."""

    has_model = True

    @classmethod
    def fingerprint(cls, config: Config) -> list[str]:
        from mmedpo_ray.models.loading import model_fingerprint

        return [model_fingerprint(config.model.path)]

    def __init__(self, config: Config) -> None:
        import torch

        from mmedpo_ray.models.loading import PromptWriter, load_model, load_processor

        super().__init__(config)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        self._model: Any = cast(Any, load_model(config.model.path, dtype)).to(self._device)
        # Only the eager form returns the attention it computes.
        self._model.set_attn_implementation("eager")
        self._processor = load_processor(config.model.path)
        self._writer = PromptWriter(self._processor)

    def localise(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Localisation]:
        return [self._localise(image, row) for image, row in zip(images, rows, strict=True)]

    def _localise(self, image: Image.Image, row: dict[str, Any]) -> Localisation:
        prompt = self._writer.prompt(row["question"])
        answer = self._writer.response(row["question"], row["answer"])
        if prompt is None or answer is None:
            return Localisation(None, 0.0, "image_placeholder_in_question", row["sample_id"])
        rgb = to_rgb(image)
        pixels = self._writer.pixels([rgb]).to(self._device, self._model.dtype)
        attention = self._attention(pixels, prompt, answer)
        grid = patch_grid(attention)
        if grid is None:
            return Localisation(None, 0.0, "no_square_patch_grid", row["sample_id"])
        return Localisation(
            upsample(grid, image.height, image.width, crop_box(self._processor.image_processor, rgb.size)),
            concentration(attention),
        )

    def _attention(self, pixels: Any, prompt: list[int], answer: list[int]) -> np.ndarray:
        """Attention of the tokens that predict the answer to each image token, (P,) float64 of sum 1."""
        torch = self._torch
        ids = torch.tensor([prompt + answer[:-1]], device=self._device)
        with torch.inference_mode():
            out = self._model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                output_attentions=True,
                use_cache=False,
            )
        is_image = ids[0] == self._writer.image_token_id
        rows = slice(len(prompt) - 1, ids.shape[1])
        # (1, heads, T, T) a layer.
        weights = torch.stack(
            [layer[0, :, rows][:, :, is_image].float().mean((0, 1)) for layer in out.attentions]
        ).mean(0)
        return (weights / weights.sum().clamp_min(_EPSILON)).double().cpu().numpy()


def patch_grid(values: np.ndarray) -> np.ndarray | None:
    """Arranges one value an image token as a square grid; None where they make none."""
    side = round(values.size**0.5)
    return values.reshape(side, side) if side * side == values.size else None


def concentration(values: np.ndarray) -> float:
    """How far P shares are from uniform, 0 (uniform) to 1 (all in the hottest 15 %): (m − h) / (1 − h).

    m is what the hottest patches hold together, h their number over P.
    """
    share = np.asarray(values, dtype=np.float64)
    count = max(1, round(_HOT_SHARE * share.size))
    if share.size <= count or share.sum() <= 0:
        return 0.0
    held = np.sort(share / share.sum())[-count:].sum()
    uniform = count / share.size
    return float(np.clip((held - uniform) / (1 - uniform), 0.0, 1.0))


def crop_box(image_processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of an image that the model sees, (left, top, right, bottom) in pixels of the original.

    Args:
        image_processor: the model's; CLIP's resizes the shortest edge and crops the centre, LLaVA's may first widen the
            image to a square (``do_pad``), of which the box then is the whole and reaches beyond the image.
        size: width and height of the original.
    """
    width, height = size
    if hasattr(image_processor, "pad_to_square") and image_processor.do_pad:
        side = max(size)
        left, top = float(-((side - width) // 2)), float(-((side - height) // 2))
        return left, top, left + side, top + side
    edge = (image_processor.size or {}).get("shortest_edge") if image_processor.do_resize else None
    if edge is None or not getattr(image_processor, "do_center_crop", False):
        return 0.0, 0.0, float(width), float(height)
    scale = edge / min(width, height)
    crop = image_processor.crop_size
    seen_width = min(width, crop["width"] / scale)
    seen_height = min(height, crop["height"] / scale)
    left, top = (width - seen_width) / 2, (height - seen_height) / 2
    return left, top, left + seen_width, top + seen_height
