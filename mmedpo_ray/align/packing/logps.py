"""Log-probabilities of responses under a LLaVA. Plain torch; runs anywhere.

:func:`response_logps` is the one place where a policy or a reference is evaluated: one sum per response,
computed on packed trees (:mod:`mmedpo_ray.align.packing.trees`).
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from mmedpo_ray.align.losses import ResponseLogps
from mmedpo_ray.align.packing import fast_layers, fused_lora, lm_head, tree_attention
from mmedpo_ray.align.packing.tree_attention import attention_bias
from mmedpo_ray.align.packing.trees import PackedTrees
from mmedpo_ray.models.image_tokens import image_mismatch


def response_logps(
    model: Any, batch: PackedTrees, *, with_reference: bool = False, kl_forward_share: float | None = None
) -> ResponseLogps:
    """Evaluates every response of a batch.

    Each distinct image passes the vision tower once, each shared token the language model once, and
    ``lm_head`` only gets the hidden states that predict a response token: (E, V) logits for E response tokens
    instead of (R, T, V), computed in chunks if they are many (:mod:`~mmedpo_ray.align.packing.lm_head`).

    Args:
        model: a ``LlavaForConditionalGeneration`` or a peft model of one; its tower is frozen.
        batch: the sequences, on the model's device.
        with_reference: also evaluate the model with its adapter off, in a second forward without gradients.
        kl_forward_share: share λ of the forward divergence; ``None``: no divergence. Needs
            ``with_reference``.
    """
    llava = model.get_base_model() if hasattr(model, "get_base_model") else model
    embeddings = _embeddings(llava, batch)
    attention = _attention(llava, batch)
    reference = None
    if with_reference:
        with torch.no_grad(), model.disable_adapter():
            # A trained projector gives other image features than the reference's.
            projector = llava.model.multi_modal_projector.parameters()
            is_trained = any(value.requires_grad for value in projector)
            original = _embeddings(llava, batch) if is_trained else embeddings
            reference = _edge_states(llava, batch, original, attention)
    if torch.is_grad_enabled() and getattr(llava.model.language_model, "gradient_checkpointing", False):
        # Reentrant checkpointing only recomputes a block whose input requires a gradient.
        embeddings.requires_grad_(True)
    states = _edge_states(llava, batch, embeddings, attention)
    to_values = (
        llava.lm_head if lm_head.is_installed(llava.lm_head) else partial(lm_head.token_values, llava.lm_head)
    )
    edges, *further = to_values(states, batch.edge_token, reference, kl_forward_share)
    weights = batch.term_weight
    return ResponseLogps(
        logps=_sum(edges, batch, weights),
        tokens=_sum(torch.ones_like(edges), batch, weights).detach(),
        likelihood=_sum(edges, batch),
        num_tokens=batch.num_tokens,
        ref_logps=_sum(further[0], batch, weights) if further else None,
        kl=_sum(further[1], batch) if len(further) > 1 else None,
    )


def _embeddings(llava: Any, batch: PackedTrees) -> Tensor:
    """(R, T, D) token embeddings, image features in the places of image tokens.

    All P tokens of an image are adjacent, so the k-th image token of the batch is number k mod P of its
    image. Without a trained projector or embedding no graph is recorded: the tower has no weights that
    require a gradient.

    Raises:
        UserError: the number of an image's ids differs from the number of its features.
    """
    features = image_features(llava, batch.pixel_values)
    embeddings = llava.get_input_embeddings()(batch.input_ids)
    is_image = batch.input_ids == llava.config.image_token_id
    count = features.shape[1]
    _check_image_ids(llava, is_image, count)
    within = (is_image.flatten().cumsum(0).view_as(is_image) - 1) % count
    shown = nn.functional.embedding(batch.token_image * count + within, features.flatten(0, 1))
    return torch.where(is_image.unsqueeze(-1), shown.to(embeddings.dtype), embeddings)


# Models whose image ids were checked: their number is the processor's, and checking every batch would stall a
# GPU.
_CHECKED: WeakSet[Any] = WeakSet()


def _check_image_ids(llava: Any, is_image: Tensor, count: int) -> None:
    """Checks that every run of image ids in rows (R, T) is ``count`` long, once per model.

    Raises:
        UserError: one is not.
    """
    if llava in _CHECKED:
        return
    flags = nn.functional.pad(is_image.cpu(), (1, 1)).int().diff(dim=1)
    lengths = flags.flatten().eq(-1).nonzero() - flags.flatten().eq(1).nonzero()
    if not len(lengths):
        return
    if (wrong := lengths[lengths != count]).numel():
        raise image_mismatch(int(wrong[0]), count)
    _CHECKED.add(llava)


def _attention(llava: Any, batch: PackedTrees) -> dict[str, Any]:
    """Keywords of the language model's forward that describe the trees."""
    language_model = llava.model.language_model
    keywords: dict[str, Any] = {"attention_mask": None}
    if tree_attention.is_installed(language_model):
        bias = attention_bias(batch.layout.sees, language_model)
        keywords["tree"] = tree_attention.LayerTree(batch.layout, bias)
    elif language_model.config._attn_implementation == "flex_attention":
        keywords["attention_mask"] = batch.block_mask()
    else:
        keywords["attention_mask"] = batch.dense_mask()
    if fast_layers.is_installed(language_model):
        keywords |= {"outputs": batch.outputs, "bias": attention_bias(batch.output_mask(), language_model)}
    return keywords


def _edge_states(llava: Any, batch: PackedTrees, embeddings: Tensor, attention: dict[str, Any]) -> Tensor:
    """(E, D) hidden states of the positions that predict a response token."""
    hidden = llava.model.language_model(
        inputs_embeds=embeddings, position_ids=batch.position_ids, use_cache=False, **attention
    ).last_hidden_state
    if "outputs" in attention:
        return hidden.flatten(0, 1)[batch.edge_output]
    return hidden[batch.edge_row, batch.edge_parent]


def _sum(edges: Tensor, batch: PackedTrees, weights: Tensor | None = None) -> Tensor:
    """(E,) values per token → (N,) sums over responses."""
    terms = edges[batch.term_edge]
    if weights is not None:
        terms = terms * weights
    zeros = torch.zeros(batch.num_tokens.shape[0], dtype=torch.float32, device=edges.device)
    return zeros.index_add(0, batch.term_sequence, terms)


def image_features(llava: Any, pixel_values: Tensor) -> Tensor:
    """Projected features of images in one pass of the frozen tower: (I, 3, H, W) → (I, P, D)."""
    dtype = llava.get_input_embeddings().weight.dtype
    output = llava.get_image_features(pixel_values=pixel_values.to(dtype), return_dict=True)
    return torch.stack(list(output.pooler_output))


def use_packed_forward(model: Any, *, attention: str = "tree", sharded: bool = False) -> None:
    """Prepares a LLaVA for :func:`response_logps`; afterwards its ``forward`` only works on packed trees.

    Args:
        model: a ``LlavaForConditionalGeneration`` or a peft model of one.
        attention: ``tree`` (:mod:`~mmedpo_ray.align.packing.tree_attention`), ``sdpa`` (a dense mask) or
            ``flex`` (FlexAttention).
        sharded: weights will be sharded over ranks (ZeRO-3).

    Raises:
        UserError: this attention would give wrong values for the language model's family.
    """
    llava = model.get_base_model() if hasattr(model, "get_base_model") else model
    language_model = llava.model.language_model
    tree_attention.check_family(language_model.config, along_tree=attention == "tree")
    if attention == "tree":
        tree_attention.install(language_model)
    else:
        language_model.set_attn_implementation("flex_attention" if attention == "flex" else "sdpa")
    fast_layers.install(language_model, along_tree=attention == "tree")
    fused_lora.install(model, sharded=sharded)
    lm_head.install(llava.lm_head)
