"""Log-probabilities of responses under a vision-language model. Plain torch; runs anywhere.

:func:`response_logps` is the one place where a policy or a reference is evaluated: one sum per response,
computed on packed trees (:mod:`mmedpo_ray.align.packing.trees`). The language model is called itself, with
embeddings, positions and the trees; what differs by architecture is in
:mod:`mmedpo_ray.models.architectures`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from mmedpo_ray.align.losses import ResponseLogps
from mmedpo_ray.align.packing import fast_layers, fused_lora, lm_head, tree_attention
from mmedpo_ray.align.packing.tree_attention import attention_bias
from mmedpo_ray.align.packing.trees import PackedTrees
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.architectures import architecture_of
from mmedpo_ray.models.architectures.base import Architecture, ImageTokens


def response_logps(
    model: Any, batch: PackedTrees, *, with_reference: bool = False, kl_forward_share: float | None = None
) -> ResponseLogps:
    """Evaluates every response of a batch.

    Each distinct image passes the vision tower once, each shared token the language model once, and
    ``lm_head`` only gets the hidden states that predict a response token: (E, V) logits for E response tokens
    instead of (R, T, V), computed in chunks if they are many (:mod:`~mmedpo_ray.align.packing.lm_head`).

    Args:
        model: of a known architecture, or a peft model of one; its tower is frozen.
        batch: the sequences, on the model's device.
        with_reference: also evaluate the model with its adapter off, in a second forward without gradients.
        kl_forward_share: share λ of the forward divergence; ``None``: no divergence. Needs
            ``with_reference``.
    """
    base, architecture = _base(model), architecture_of(_base(model))
    inputs = _inputs(base, architecture, batch)
    attention = _attention(base, architecture, batch, inputs.tokens)
    reference = None
    if with_reference:
        with torch.no_grad(), model.disable_adapter():
            # A trained projector gives other image features than the reference's.
            projector = (base.get_submodule(name) for name in architecture.projector)
            is_trained = any(value.requires_grad for part in projector for value in part.parameters())
            original = _inputs(base, architecture, batch) if is_trained else inputs
            reference = _edge_states(base, architecture, batch, original, attention)
    if torch.is_grad_enabled() and getattr(_language_model(base), "gradient_checkpointing", False):
        # Reentrant checkpointing only recomputes a block whose input requires a gradient.
        inputs.embeddings.requires_grad_(True)
    states = _edge_states(base, architecture, batch, inputs, attention)
    to_values = (
        base.lm_head if lm_head.is_installed(base.lm_head) else partial(lm_head.token_values, base.lm_head)
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


class _Inputs(NamedTuple):
    """What the language model gets besides the trees.

    Attributes:
        embeddings: (R, T, D), image features in the places of image tokens.
        positions: (R, T) or (3, R, T).
        tokens: which tokens are of images.
        arguments: further keywords.
    """

    embeddings: Tensor
    positions: Tensor
    tokens: ImageTokens
    arguments: dict[str, Any]


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _language_model(base: Any) -> Any:
    return base.get_submodule(architecture_of(base).language_model)


def _inputs(base: Any, architecture: Architecture, batch: PackedTrees) -> _Inputs:
    """Embeddings with the features of the images.

    Without a trained projector or embedding no graph is recorded: the tower has no weights that require a
    gradient.

    Raises:
        UserError: the number of an image's ids differs from the number of its features.
    """
    levels, counts = architecture.features(base, batch.images)
    is_image = batch.input_ids == base.config.image_token_id
    tokens = _image_tokens(base, batch, is_image, counts)
    table, ids = base.get_input_embeddings(), batch.input_ids
    if base.config.image_token_id >= table.num_embeddings:
        ids = ids.masked_fill(is_image, 0)
    embeddings = table(ids)
    shown = nn.functional.embedding(tokens.feature, levels[0]).to(embeddings.dtype)
    return _Inputs(
        embeddings=torch.where(is_image.unsqueeze(-1), shown, embeddings),
        positions=architecture.positions(tokens, batch.images, base.config),
        tokens=tokens,
        arguments=architecture.arguments(levels, tokens),
    )


# Models whose image ids were checked and are of one number: checking every batch would stall a GPU.
_CHECKED: WeakSet[Any] = WeakSet()


def _image_tokens(base: Any, batch: PackedTrees, is_image: Tensor, counts: list[int]) -> ImageTokens:
    """Which feature each image token stands for.

    All tokens of a tree's image come in order, so the k-th image token of a tree is number k mod P of the
    image's P features: if the question comes first, a tree has them once per question.

    Args:
        base: the model.
        batch: I images in R rows of T tokens.
        is_image: (R, T) bool.
        counts: features of each image.

    Raises:
        UserError: an image has another number of ids.
    """
    if base not in _CHECKED:
        _check_image_ids(batch, is_image, counts)
        if architecture_of(base).one_image_size:
            _CHECKED.add(base)
    number = (is_image.flatten().cumsum(0) - 1).view_as(is_image)
    if len(set(counts)) == 1:
        within = number % counts[0]
        feature = batch.token_image * counts[0] + within
    else:
        features = torch.tensor(counts, device=is_image.device)
        # The number of a tree's first image token; trees may stand in any order.
        first = torch.full_like(features, is_image.numel())
        first = first.scatter_reduce(0, batch.token_image[is_image], number[is_image], "amin")
        within = (number - first[batch.token_image]) % features[batch.token_image]
        feature = (features.cumsum(0) - features)[batch.token_image] + within
    return ImageTokens(is_image, feature, within, batch.token_image, batch.position_ids, batch.subtree_end)


def _check_image_ids(batch: PackedTrees, is_image: Tensor, counts: list[int]) -> None:
    """Checks that every run of image ids in rows (R, T) has as many as its image has features.

    Raises:
        UserError: one has not.
    """
    shown, flags = batch.token_image.cpu(), nn.functional.pad(is_image.cpu(), (1, 1)).int().diff(dim=1)
    starts, ends = ((flags == sign).nonzero() for sign in (1, -1))
    lengths = (ends - starts)[:, 1]
    features = torch.tensor(counts)[shown[starts[:, 0], starts[:, 1]]]
    wrong = lengths != features
    if wrong.any():
        raise UserError(
            f"a prompt has {int(lengths[wrong][0])} ids for an image, but the vision tower gives "
            f"{int(features[wrong][0])} features for it. Either the image has changed since the pairs were "
            "prepared (delete the run's prepared table), or processor_config.json does not fit config.json."
        )


def _attention(
    base: Any, architecture: Architecture, batch: PackedTrees, tokens: ImageTokens
) -> dict[str, Any]:
    """Keywords of the language model's forward that describe the trees."""
    language_model = _language_model(base)
    keywords: dict[str, Any] = {"attention_mask": None}
    along_trees = tree_attention.is_installed(language_model)
    if architecture.layer_masks:
        masks = architecture.masks(batch.dense_mask()[:, 0], tokens, base.config)
        if along_trees:
            _refuse_images_in_branches(batch, tokens)
            keywords["tree"] = {
                kind: tree_attention.masked_layer_tree(batch.layout, mask, language_model)
                for kind, mask in masks.items()
            }
        keywords["attention_mask"] = dict.fromkeys(masks) if along_trees else masks
    elif along_trees:
        bias = attention_bias(batch.layout.sees, language_model)
        keywords["tree"] = tree_attention.LayerTree(batch.layout, bias)
    elif language_model.config._attn_implementation == "flex_attention":
        keywords["attention_mask"] = batch.block_mask()
    else:
        keywords["attention_mask"] = batch.dense_mask()
    if fast_layers.is_installed(language_model):
        keywords |= {"outputs": batch.outputs, "bias": attention_bias(batch.output_mask(), language_model)}
    return keywords


def _refuse_images_in_branches(batch: PackedTrees, tokens: ImageTokens) -> None:
    """Images that see what follows them must be in a trunk, whose tokens are computed together.

    Raises:
        UserError: one is not, because the chat template writes the question first.
    """
    trunks, length = batch.layout.trunk_shape
    if tokens.is_image.flatten()[batch.layout.order[trunks * length :]].any():
        raise UserError(
            "the chat template writes the question before the image, and the tokens of an image see one "
            "another. Use the model's own template, or set align.attention=sdpa."
        )


def _edge_states(
    base: Any, architecture: Architecture, batch: PackedTrees, inputs: _Inputs, attention: dict[str, Any]
) -> Tensor:
    """(E, D) hidden states of the positions that predict a response token."""
    hidden = (
        base.get_submodule(architecture.language_model)(
            inputs_embeds=inputs.embeddings,
            position_ids=inputs.positions,
            use_cache=False,
            **attention,
            **inputs.arguments,
        )
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


def use_packed_forward(model: Any, *, attention: str = "tree", sharded: bool = False) -> None:
    """Prepares a model for :func:`response_logps`; afterwards its ``forward`` only works on packed trees.

    Args:
        model: of a known architecture, or a peft model of one.
        attention: ``tree`` (:mod:`~mmedpo_ray.align.packing.tree_attention`), ``sdpa`` (a dense mask) or
            ``flex`` (FlexAttention).
        sharded: weights will be sharded over ranks (ZeRO-3).

    Raises:
        UserError: this attention would give wrong values for the language model's family.
    """
    base = _base(model)
    check_attention(architecture_of(base), attention)
    language_model = _language_model(base)
    tree_attention.check_family(language_model.config, along_tree=attention == "tree")
    if attention == "tree":
        tree_attention.install(language_model)
    else:
        language_model.set_attn_implementation("flex_attention" if attention == "flex" else "sdpa")
    fast_layers.install(language_model, along_tree=attention == "tree")
    fused_lora.install(model, sharded=sharded)
    lm_head.install(base.lm_head)


def check_attention(architecture: Architecture, attention: str) -> None:
    """Refuses a way of attention that would give wrong values.

    Raises:
        UserError: FlexAttention for an architecture whose masks are not those of plain trees.
    """
    if architecture.layer_masks and attention == "flex":
        raise UserError(
            f"align.attention=flex does not compute {architecture.title}, whose layers have masks of their "
            "own. Set it to tree or sdpa."
        )
