"""Log-probabilities of responses under a LLaVA. Plain torch; runs anywhere.

:func:`response_logps` is the one place where a policy or a reference is evaluated: one sum a response, computed on the
packed trees of :mod:`mmedpo_ray.align.forest`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmedpo_ray.align.forest import Forest


class LogpOutput(NamedTuple):
    """Sums over response tokens.

    Attributes:
        logps: (N,) float32, Σ log π(token | everything before), nats.
        num_tokens: (N,) int64, tokens summed.
    """

    logps: Tensor
    num_tokens: Tensor


def response_logps(model: Any, batch: Forest) -> LogpOutput:
    """Evaluates every response of a batch.

    Each distinct image passes the vision tower once, each shared token the language model once, and only the hidden
    states that predict a response token meet ``lm_head``: (E, V) logits for E response tokens instead of (R, T, V).

    Args:
        model: a ``LlavaForConditionalGeneration`` or a peft model of one; its tower and projector are frozen.
        batch: the sequences, on the model's device.
    """
    llava = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        features = image_features(llava, batch.pixel_values)
        embeddings = llava.get_input_embeddings()(batch.input_ids)
        is_image = (batch.input_ids == llava.config.image_token_id).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(is_image, features[batch.tree_image].to(embeddings.dtype))
    if torch.is_grad_enabled():
        # Reentrant checkpointing only recomputes a block whose input wants a gradient.
        embeddings.requires_grad_(True)
    hidden = llava.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    logits = llava.lm_head(hidden[batch.edge_row, batch.edge_parent]).float()
    edges = -nn.functional.cross_entropy(logits, batch.edge_token, reduction="none")
    zeros = torch.zeros(batch.num_tokens.shape[0], dtype=torch.float32, device=logits.device)
    return LogpOutput(zeros.index_add(0, batch.term_sequence, edges[batch.term_edge]), batch.num_tokens)


def image_features(llava: Any, pixel_values: Tensor) -> Tensor:
    """Projected features of images in one pass of the frozen tower: (I, 3, H, W) → (I, P, D)."""
    dtype = llava.get_input_embeddings().weight.dtype
    output = llava.get_image_features(pixel_values=pixel_values.to(dtype), return_dict=True)
    return torch.stack(list(output.pooler_output))
