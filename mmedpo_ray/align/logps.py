"""Log-probabilities of responses under a LLaVA. Plain torch; runs anywhere.

:func:`response_logps` is the one place where a policy or a reference is evaluated. It takes a :class:`SequenceBatch` and
returns one sum a response; how the sequences share computation is its own affair. Here each sequence is a padded row,
and each distinct image passes the vision tower once however many rows show it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SequenceBatch:
    """R prompts with their responses, padded on the right to T tokens.

    Attributes:
        input_ids: (R, T) int64, prompt (image ids included) then response.
        is_response: (R, T) bool, the response tokens, end token included.
        pixel_values: (I, 3, H, W) float32, the distinct images.
        image_index: (R,) int64, which of them a row shows.
    """

    input_ids: Tensor
    is_response: Tensor
    pixel_values: Tensor
    image_index: Tensor

    def to(self, device: torch.device) -> SequenceBatch:
        """The batch on another device."""
        return replace(
            self, **{item.name: getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)}
        )


class LogpOutput(NamedTuple):
    """Sums over response tokens.

    Attributes:
        logps: (R,) float32, Σ log π(token | everything before), nats.
        num_tokens: (R,) int64, tokens summed.
    """

    logps: Tensor
    num_tokens: Tensor


def response_logps(model: nn.Module, batch: SequenceBatch) -> LogpOutput:
    """Evaluates every response of a batch.

    Causal attention alone keeps the padding on the right out of every sum, so no mask is passed and the fast kernels
    apply. Only the hidden states that predict a response token meet ``lm_head``: (K, V) logits for K response tokens
    instead of (R, T, V).

    Args:
        model: a ``LlavaForConditionalGeneration`` or a peft model of one; its tower and projector are frozen.
        batch: the sequences, on the model's device.
    """
    llava = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        features = image_features(llava, batch.pixel_values)
        embeddings = llava.get_input_embeddings()(batch.input_ids)
        is_image = (batch.input_ids == llava.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(is_image, features[batch.image_index].to(embeddings.dtype))
    if torch.is_grad_enabled():
        # Reentrant checkpointing only recomputes a block whose input wants a gradient.
        embeddings.requires_grad_(True)
    hidden = llava.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    predicted = batch.is_response[:, 1:]
    row, _ = predicted.nonzero(as_tuple=True)
    logits = llava.lm_head(hidden[:, :-1][predicted]).float()
    token_logps = -nn.functional.cross_entropy(logits, batch.input_ids[:, 1:][predicted], reduction="none")
    zeros = torch.zeros(batch.input_ids.shape[0], dtype=torch.float32, device=logits.device)
    return LogpOutput(zeros.index_add(0, row, token_logps), predicted.sum(dim=1))


def image_features(llava: nn.Module, pixel_values: Tensor) -> Tensor:
    """Projected features of images in one pass of the frozen tower: (I, 3, H, W) → (I, P, D)."""
    dtype = llava.get_input_embeddings().weight.dtype
    output = llava.get_image_features(pixel_values=pixel_values.to(dtype), return_dict=True)
    return torch.stack(list(output.pooler_output))
