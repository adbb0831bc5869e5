"""Attention over packed trees without a T × T mask.

Trunks are causal; a branch sees its trunk and itself.

With a dense mask, attention computes every pair of tokens of a row, also those that causality and the tree
rule out. Nearly all tokens of a tree are in two places: its *trunk*, the chain from the root to the first
fork (image and template: 580 of 1,030 tokens of a SLAKE image), and the branches behind it (the questions
with their answers). So

* all trunks are one batch of plain causal attention (flash attention on a GPU), and
* branches are cut into blocks of queries, each with the keys of its trunk, of its ancestors in earlier blocks
  and of its own.

That is a third to a half of the dense products. It is the same sum in another order, so values are equal up
to rounding.

:func:`install` makes a transformers language model attend like this; the layout of a batch
(:class:`LayerTree`) is passed as the keyword ``tree`` of its forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedpo_ray.errors import UserError

NAME = "packed_tree"
# Most queries in a block. More blocks mean more copies of the keys of a trunk; larger blocks, more masked
# products.
QUERIES_PER_BLOCK = 192
# By model_type: their layers pass the tree on and compute plain scaled dot products.
KNOWN_FAMILIES = frozenset(
    (
        *("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma3_text"),
        *("qwen2_5_vl_text", "qwen3_vl_text"),
        *("phi", "phi3", "cohere", "granite", "olmo2", "smollm3", "starcoder2"),
    )
)
_KNOWN_TO_WORK = f"Known to work are {', '.join(sorted(KNOWN_FAMILIES))}."
_UNSUPPORTED = f"which tree attention does not support. {_KNOWN_TO_WORK}"
# Arguments of transformers' attention interface that change what is computed.
_OTHER_ATTENTION = ("softcap", "s_aux", "position_bias", "dropout")


@dataclass(frozen=True)
class TreeLayout:
    """The tokens of packed rows, sorted into trunks and blocks of branches.

    Positions are flat: row · T + column.

    Attributes:
        order: (G·L + B·Q,) int64, the tokens of G trunks of L slots, then those of B blocks of Q; spare slots
            of a trunk or block repeat its last token.
        place: (R·T,) int64, the slot of each token; padding of rows has slot 0.
        owner: (B,) int64, the trunk of a block.
        ancestors: (B, A) int64, slots among the B·Q: a block's ancestors in earlier blocks, padded with any
            slot.
        sees: (B, Q, L + A + Q) bool, whether a query attends to a slot of its trunk, its ancestors, its
            block.
        spare: int64, the slots that repeat a token.
        padding: int64, the positions that pad rows.
        trunk_shape: (G, L).
    """

    order: Tensor
    place: Tensor
    owner: Tensor
    ancestors: Tensor
    sees: Tensor
    spare: Tensor
    padding: Tensor
    trunk_shape: tuple[int, int]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> TreeLayout:
        """The layout on another device."""
        moved: dict[str, Any] = {
            item.name: value.to(device, non_blocking=non_blocking)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)


def lay_out(subtree_end: Tensor, row_lengths: Sequence[int]) -> TreeLayout:
    """Divides packed rows into trunks and blocks of whole branches.

    Args:
        subtree_end: (R, T) int64, column after the last descendant of every token; tokens in preorder.
        row_lengths: tokens in each row; padding follows.
    """
    rows, length = subtree_end.shape
    ends = (subtree_end + length * torch.arange(rows)[:, None]).flatten()
    known = ends.tolist()
    trees = []
    for row, size in enumerate(row_lengths):
        start, stop = row * length, row * length + size
        while start < stop:
            # The trunk ends after the last token before the first fork.
            fork = start + 1
            while fork < known[start] and known[fork] == known[start]:
                fork += 1
            trees.append((start, fork, known[start]))
            start = known[start]
    blocks = [(number, *block) for number, (_, fork, end) in enumerate(trees) for block in _cut(fork, end)]
    trunks, is_trunk = _slots([(start, fork) for start, fork, _ in trees])
    queries, is_query = _slots([(start, end) for _, start, end in blocks])
    owner = torch.tensor([number for number, _, _ in blocks], dtype=torch.int64)
    above = [_ancestors(known, trees[number][1], start) for number, start, _ in blocks]
    ancestors = torch.zeros((len(blocks), max(map(len, above), default=0)), dtype=torch.int64)
    is_ancestor = torch.zeros_like(ancestors, dtype=torch.bool)
    for number, positions in enumerate(above):
        ancestors[number, : len(positions)] = torch.tensor(positions, dtype=torch.int64)
        is_ancestor[number, : len(positions)] = True
    keys = torch.cat([trunks[owner], ancestors, queries], dim=1)
    sees = (
        (keys[:, None, :] <= queries[:, :, None])
        & (queries[:, :, None] < ends[keys][:, None, :])
        & torch.cat([is_trunk[owner], is_ancestor, is_query], dim=1)[:, None, :]
    )
    order = torch.cat([trunks.flatten(), queries.flatten()])
    is_first = torch.cat([is_trunk.flatten(), is_query.flatten()])
    place = torch.zeros(rows * length, dtype=torch.int64)
    place[order[is_first]] = torch.arange(len(order))[is_first]
    is_padding = torch.arange(length) >= torch.tensor(row_lengths)[:, None]
    return TreeLayout(
        order=order,
        place=place,
        owner=owner,
        ancestors=torch.where(is_ancestor, place[ancestors] - trunks.numel(), 0),
        sees=sees,
        spare=torch.arange(len(order))[~is_first],
        padding=torch.arange(rows * length)[is_padding.flatten()],
        trunk_shape=(trunks.shape[0], trunks.shape[1]),
    )


def _cut(start: int, end: int) -> list[tuple[int, int]]:
    """Equal blocks of at most the block size."""
    count = -(-(end - start) // QUERIES_PER_BLOCK)
    bounds = [start + (end - start) * number // count for number in range(count + 1)] if count else []
    return list(pairwise(bounds))


def _ancestors(ends: Sequence[int], fork: int, start: int) -> list[int]:
    """Positions from ``fork`` (end of the trunk) to ``start`` that are ancestors of later tokens."""
    found = []
    position = fork
    while position < start:
        if ends[position] > start:
            found.append(position)
            position += 1
        else:
            position = ends[position]
    return found


def _slots(spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(N, longest): the positions of every span, padded with its last; and True if not padding."""
    length = max((end - start for start, end in spans), default=0)
    starts, ends = (torch.tensor([span[side] for span in spans], dtype=torch.int64) for side in (0, 1))
    positions = starts[:, None] + torch.arange(length)
    return torch.minimum(positions, ends[:, None] - 1), positions < ends[:, None]


@dataclass(frozen=True)
class LayerTree:
    """The layout of a batch and its mask, made once for all layers.

    Attributes:
        layout: of the batch.
        bias: (B, 1, (H / K)·Q, L + A + Q), 0 where the query attends to the slot and −∞ elsewhere, in the
            type of the keys.
        trunk_bias: (G, 1, (H / K)·L, L), likewise; ``None``: trunks are causal.
    """

    layout: TreeLayout
    bias: Tensor
    trunk_bias: Tensor | None = None


def masked_layer_tree(layout: TreeLayout, mask: Tensor, language_model: Any) -> LayerTree:
    """The tree for layers whose tokens attend to others than all their ancestors.

    Args:
        layout: of R rows of T tokens.
        mask: (R, 1, T, T) bool, True if the query (third axis) attends to the key. A token may also attend to
            later ones if both are in its trunk.
        language_model: whose layers these are.
    """
    length, (num_trunks, trunk_length) = mask.shape[-1], layout.trunk_shape
    trunks = layout.order[: num_trunks * trunk_length].view(num_trunks, trunk_length)
    queries = layout.order[trunks.numel() :].view(len(layout.owner), -1)
    keys = torch.cat([trunks[layout.owner], queries.flatten()[layout.ancestors], queries], dim=1)
    flat = mask.reshape(-1, length)
    is_first = torch.ones_like(layout.order, dtype=torch.bool)
    is_first[layout.spare] = False
    in_trunk = is_first[: trunks.numel()].view_as(trunks)
    trunk_sees = flat[trunks[:, :, None], (trunks % length)[:, None, :]] & in_trunk[:, None, :]
    sees = flat[queries[:, :, None], (keys % length)[:, None, :]] & layout.sees
    return LayerTree(layout, attention_bias(sees, language_model), attention_bias(trunk_sees, language_model))


def attention_bias(sees: Tensor, language_model: Any) -> Tensor:
    """(B, Q, S) bool → (B, 1, (H / K)·Q, S) in the type of the model, for :func:`masked_attention`."""
    config = language_model.config
    shared = config.num_attention_heads // config.num_key_value_heads
    bias = torch.zeros(sees.shape, dtype=language_model.dtype, device=sees.device)
    return bias.masked_fill_(~sees, -torch.inf).repeat(1, shared, 1).unsqueeze(1)


# ---------------------------------------------------------------------- attention


def tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: LayerTree, scaling: float) -> Tensor:
    """Attention of every token to its ancestors and itself.

    Args:
        query: (R, H, T, D).
        key, value: (R, K, T, D) of K key heads, H a multiple of K.
        tree: the layout of the R rows.
        scaling: factor on the products, usually 1/√D.

    Returns:
        (R, T, H, D).
    """
    rows, heads, length, size = query.shape
    layout = tree.layout
    (trunk_query, query), (trunk_key, key), (trunk_value, value) = (
        _split(part, layout) for part in (query, key, value)
    )
    outputs = [_within_trunks(trunk_query, trunk_key, trunk_value, tree.trunk_bias, scaling)]
    if len(layout.owner):
        query, key, value = (
            part.transpose(1, 2)
            for part in (query, _keys(trunk_key, key, layout), _keys(trunk_value, value, layout))
        )
        outputs.append(masked_attention(query, key, value, tree.bias, scaling))
    slots = torch.cat([part.reshape(-1, heads, size) for part in outputs])
    return _Rearrange.apply(slots, layout.place, layout.order, layout.spare).view(rows, length, heads, size)


def _split(states: Tensor, layout: TreeLayout) -> tuple[Tensor, Tensor]:
    """(R, H, T, D) → (G, L, H, D) of the trunks and (B, Q, H, D) of the blocks."""
    flat = states.transpose(1, 2).flatten(0, 1)
    slots = _Rearrange.apply(flat, layout.order, layout.place, layout.padding)
    num_trunks, trunk_length = layout.trunk_shape
    # Not tensor_split, whose gradient is a tensor of zeros for each part and their sum.
    in_trunks = num_trunks * trunk_length
    trunks, blocks = slots.split([in_trunks, len(slots) - in_trunks])
    return (
        trunks.view(num_trunks, trunk_length, *flat.shape[1:]),
        blocks.view(len(layout.owner), layout.sees.shape[1], *flat.shape[1:]),
    )


def _keys(trunks: Tensor, blocks: Tensor, layout: TreeLayout) -> Tensor:
    """(G, L, K, D) and (B, Q, K, D) → (B, L + A + Q, K, D)."""
    if len(trunks) == 1:
        parts = [trunks.expand(len(blocks), *trunks.shape[1:])]
    else:
        parts = [trunks.index_select(0, layout.owner)]
    if layout.ancestors.numel():
        above = blocks.flatten(0, 1).index_select(0, layout.ancestors.flatten())
        parts.append(above.view(*layout.ancestors.shape, *blocks.shape[2:]))
    return torch.cat([*parts, blocks], dim=1)


class _Rearrange(torch.autograd.Function):
    """Rows of a tensor in another order; repeated rows have no gradient of their own.

    The backward pass of an index is a sum over its repetitions, scattered row by row. Here it is an index
    again.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, order: Tensor, inverse: Tensor, unused: Tensor) -> Tensor:
        """states[order]; ``inverse`` restores the order, and the rows ``unused`` are not read."""
        ctx.save_for_backward(inverse, unused)
        return states.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse, unused = ctx.saved_tensors
        found = grad.index_select(0, inverse)
        return (found.index_fill_(0, unused, 0.0) if len(unused) else found), None, None, None


def masked_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Grouped-query attention under a mask, without copies of keys for the query heads that share them.

    Args:
        query: (B, H, Q, D); head h reads the keys of head h // (H / K).
        key, value: (B, K, S, D).
        bias: (B, 1, (H / K)·Q, S), see :func:`attention_bias`.
        scaling: factor on the products.

    Returns:
        (B, Q, H, D).
    """
    batch, heads, count, size = query.shape
    # The heads of a group become further queries of their key head.
    grouped = query.reshape(batch, key.shape[1], -1, size)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scaling)
    return output.reshape(batch, heads, count, size).transpose(1, 2)


def _within_trunks(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """(G, L, H, D), and (G, L, K, D) of keys and values → (G, L, H, D); causal without a bias."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if bias is not None:
        return masked_attention(query, key, value, bias, scaling)
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2)


def attention_of_a_layer(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,  # noqa: ARG001 - transformers' signature
    *,
    scaling: float,
    tree: LayerTree | Mapping[str, LayerTree] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; ``tree`` comes from the keywords of the model's forward.

    Raises:
        UserError: the layer asks for another kind of attention, or did not get the tree.
    """
    # A tensor always has an effect, a number unless it is 0.
    if asked := [
        name for name in _OTHER_ATTENTION if isinstance(others.get(name), Tensor) or others.get(name)
    ]:
        raise UserError(f"a layer of the language model uses {', '.join(asked)}, {_UNSUPPORTED}")
    if tree is None:
        raise UserError(f"the language model does not pass the tree to its layers, {_UNSUPPORTED}")
    # One for all layers, or one by their type.
    found = tree if isinstance(tree, LayerTree) else tree[module.layer_type]
    return tree_attention(query, key, value, found, scaling), None


def check_family(config: Any, *, along_tree: bool) -> None:
    """Refuses language models for which attention on packed trees would give wrong values.

    Args:
        config: of the language model.
        along_tree: whether tree attention is used, or else a dense or block mask.

    Raises:
        UserError: scores are capped, or the family is not known to pass the tree on.
    """
    family = config.model_type
    if along_tree and family not in KNOWN_FAMILIES:
        raise UserError(f"the language model is a {family}, {_UNSUPPORTED}")
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(
            f"the language model is a {family} with attn_logit_softcapping, which attention on packed trees "
            f"does not compute. {_KNOWN_TO_WORK}"
        )


def install(language_model: Any) -> None:
    """Gives a transformers language model tree attention; its forward then needs the keyword ``tree``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_of_a_layer)
    # The mask is in the layout.
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    language_model.set_attn_implementation(NAME)


def is_installed(language_model: Any) -> bool:
    """Whether :func:`install` was called on the model."""
    return language_model.config._attn_implementation == NAME
