"""The target model's own attention as a visual tool: needs no mask and no further model.

The attention that the tokens predicting the answer pay to each image patch, averaged over these tokens, heads
and layers. On the embedded model and its phantoms this finds the lesion far above chance; dividing by the
attention under a neutral instruction, which helps some large models, made it worse there. The confidence says
how concentrated the attention is, not how likely a disease is: a normal image can have a confident heat map.
As the score of a visual pair it
    therefore ranks pairs by how local their noise is; whether that is clinical relevance is an open question.

The rows of a batch run together. Each layer's weights are averaged as soon as they are there: those of all
layers of a 7B model would fill about a gigabyte per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from mmedpo_ray.config.tree import Config
from mmedpo_ray.curate.visual.tools.base import Localisation, VisualTool, upsample
from mmedpo_ray.errors import UserError
from mmedpo_ray.io.images import to_rgb

if TYPE_CHECKING:
    from mmedpo_ray.models.architectures.base import Inputs
    from mmedpo_ray.models.prompts import PromptWriter

# The confidence compares this share of the patches, the hottest ones, with what uniform attention would give
# them.
_HOT_SHARE = 0.15
_EPSILON = 1e-8


class SelfAttention(VisualTool):
    """Attention of the model to align, from the answer to the image."""

    has_model = True

    @classmethod
    def fingerprint(cls, config: Config) -> list[str]:
        from mmedpo_ray.models.fingerprint import model_fingerprint

        return [model_fingerprint(config.model.path)]

    def __init__(self, config: Config) -> None:
        import torch

        from mmedpo_ray.models.loading import load_model, load_processor
        from mmedpo_ray.models.prompts import PromptWriter

        super().__init__(config)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        self._model: Any = cast(Any, load_model(config.model.path, dtype)).to(self._device)
        # Only the eager form returns the attention it computes.
        self._model.set_attn_implementation("eager")
        self._processor = load_processor(config.model.path)
        self._writer = PromptWriter(self._processor)
        architecture = self._writer.architecture
        if not architecture.patch_grid:
            raise UserError(
                f"curate.visual.tool=self_attention reads attention to the patches of the whole image, and "
                f"the image tokens of {architecture.title} are none. Choose another tool."
            )
        self._layers = self._model.get_submodule(architecture.language_model).layers

    def localise(self, images: list[Image.Image], rows: list[dict[str, Any]]) -> list[Localisation]:
        turns = [_turn(self._writer, row) for row in rows]
        usable = [number for number, turn in enumerate(turns) if turn is not None]
        asked = [turn for turn in turns if turn is not None]
        found = [Localisation(None, 0.0, "image_placeholder_in_question", row["sample_id"]) for row in rows]
        if not asked:
            return found
        pixels = self._writer.pixels([to_rgb(images[number]) for number in usable])
        for number, attention in zip(usable, self._attention(pixels, asked), strict=True):
            found[number] = self._localisation(images[number], attention, rows[number]["sample_id"])
        return found

    def _localisation(self, image: Image.Image, attention: np.ndarray, sample_id: str) -> Localisation:
        grid = patch_grid(attention)
        if grid is None:
            return Localisation(None, 0.0, "no_square_patch_grid", sample_id)
        seen = crop_box(self._processor.image_processor, image.size)
        return Localisation(upsample(grid, image.height, image.width, seen), concentration(attention))

    def _attention(self, pixels: Inputs, turns: list[_Turn]) -> list[np.ndarray]:
        """For each row the attention of the answer to each image token: (P,) float64 of sum 1.

        Args:
            pixels: what the tower takes of B images.
            turns: B rows.
        """
        torch = self._torch
        # The last token of an answer predicts nothing.
        rows = [torch.tensor(turn.prompt + turn.answer[:-1]) for turn in turns]
        # Padded behind, where causal attention never looks, so that a row's numbers are those it has alone.
        padded = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self._writer.pad_token_id
        ).to(self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        mask = torch.arange(padded.shape[1], device=self._device) < lengths[:, None]
        places = [
            (slice(len(turn.prompt) - 1, len(row)), (row == self._writer.image_token_id).to(self._device))
            for turn, row in zip(turns, rows, strict=True)
        ]
        layers: list[Any] = []

        def reduce(_module: Any, _inputs: Any, output: tuple[Any, Any]) -> tuple[Any, None]:
            hidden, weights = output
            means = [
                weights[number, :, answer, : len(image)][..., image].float().mean((0, 1))
                for number, (answer, image) in enumerate(places)
            ]
            layers.append(torch.stack(means))
            # What is kept no longer than this holds one layer's weights at a time.
            return hidden, None

        hooks = [layer.self_attn.register_forward_hook(reduce) for layer in self._layers]
        try:
            with torch.inference_mode():
                # The trunk alone: nobody needs logits over the vocabulary.
                self._model.model(
                    input_ids=padded,
                    attention_mask=mask.long(),
                    **{name: value.to(self._device, self._model.dtype) for name, value in pixels.items()},
                    use_cache=False,
                )
        finally:
            for hook in hooks:
                hook.remove()
        mean = torch.stack(layers).mean(0)
        return list((mean / mean.sum(1, keepdim=True).clamp_min(_EPSILON)).double().cpu().numpy())


@dataclass(frozen=True)
class _Turn:
    """Token ids of a question with its image, and of its answer."""

    prompt: list[int]
    answer: list[int]


def _turn(writer: PromptWriter, row: dict[str, Any]) -> _Turn | None:
    prompt, answer = writer.prompt(row["question"]), writer.response(row["question"], row["answer"])
    return None if prompt is None or answer is None else _Turn(prompt, answer)


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
        image_processor: the model's; CLIP's resizes the shortest edge and crops the centre, LLaVA's may first
            widen the image to a square (``do_pad``), of which the box then is the whole and reaches beyond
            the image.
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
