"""Spreads the pairs of one step over ranks and micro-batches, from their token counts alone.

Trees are cut if they exceed a micro-batch, and the pieces go, largest first, into the emptiest bin with room
(the longest-processing-time rule): O(pairs) for the cutting, and a scan of the bins in NumPy for every piece.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mmedpo_ray.align.data.token_counts import TokenCounts
from mmedpo_ray.align.packing.trees import num_slots
from mmedpo_ray.align.settings import AlignConfig


class Limits(NamedTuple):
    """How much a rank runs through the model at once.

    Attributes:
        pairs: most pairs in a micro-batch.
        tokens: most tokens in a micro-batch after packing, padding included; a single pair may exceed it.
    """

    pairs: int
    tokens: float = math.inf

    @classmethod
    def of(cls, align: AlignConfig) -> Limits:
        """The limits in the settings."""
        return cls(align.pairs_per_forward, align.tokens_per_forward or math.inf)


@dataclass
class _Group:
    """Pairs that are computed together: a piece of a tree, or a micro-batch while it is filled.

    Attributes:
        members: the pairs.
        sizes: tokens of each image's tree.
        trees: numbers of the trees that the pairs are from.
    """

    members: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    trees: set[int] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        return sum(self.sizes)


def balance(
    trees: Iterable[Sequence[int]], counts: TokenCounts, num_ranks: int, limits: Limits
) -> list[list[int]]:
    """The micro-batches of a step: ``bins[rank::num_ranks]`` are those of a rank, the same number for each.

    Args:
        trees: the pairs of every image, as numbers for ``counts``.
        counts: token counts.
        num_ranks: over which the bins are spread.
        limits: of a micro-batch.

    Returns:
        Bins of pairs; some may be empty.
    """
    pieces = _pieces([list(tree) for tree in trees], counts, limits)
    pieces.sort(key=lambda piece: (-piece.tokens, piece.members[0]))
    total = sum(len(piece.members) for piece in pieces)
    # A lower bound: pieces of one tree may share tokens again, and a single pair may exceed the limit.
    parts = Counter(tree for piece in pieces for tree in piece.trees)
    whole = [piece for piece in pieces if all(parts[tree] == 1 for tree in piece.trees)]
    tokens = sum(piece.tokens for piece in whole if piece.tokens <= limits.tokens)
    rounds = max(
        1, math.ceil(total / (num_ranks * limits.pairs)), math.ceil(tokens / (num_ranks * limits.tokens))
    )
    while (bins := _fill(pieces, num_ranks * rounds, counts, limits)) is None:
        # Larger steps for many rounds, because every attempt places all pieces.
        rounds += 1 + rounds // 16
    return bins


def _pieces(trees: Sequence[list[int]], counts: TokenCounts, limits: Limits) -> list[_Group]:
    """The trees, cut if they do not fit into a micro-batch; pieces repeat the image's tokens."""
    found = []
    for number, (tree, sizes) in enumerate(zip(trees, counts.sizes(trees), strict=True)):
        if len(tree) <= limits.pairs and num_slots(sizes) <= limits.tokens:
            found += [_Group(tree, sizes, {number})] if tree else []
            continue
        parts: list[list[int]] = []
        for member in tree:
            if parts and len(parts[-1]) < limits.pairs and _fits([*parts[-1], member], counts, limits):
                parts[-1].append(member)
            else:
                parts.append([member])
        found += [_Group(part, of, {number}) for part, of in zip(parts, counts.sizes(parts), strict=True)]
    return found


def _fits(members: list[int], counts: TokenCounts, limits: Limits) -> bool:
    return limits.tokens == math.inf or num_slots(counts.sizes([members])[0]) <= limits.tokens


def _fill(
    pieces: Sequence[_Group], num_bins: int, counts: TokenCounts, limits: Limits
) -> list[list[int]] | None:
    """Puts each piece into the emptiest bin that has room; ``None`` if one fits nowhere."""
    bins = [_Group() for _ in range(num_bins)]
    tokens, pairs = np.zeros(num_bins), np.zeros(num_bins, np.int64)
    for piece in pieces:
        is_full = (pairs > 0) & (pairs + len(piece.members) > limits.pairs)
        sizes = None
        while sizes is None:
            target = int(np.where(is_full, math.inf, tokens).argmin())
            if is_full[target]:
                return None
            sizes = _merged_sizes(bins[target], piece, counts, limits)
            is_full[target] = sizes is None
        chosen = bins[target]
        chosen.members += piece.members
        chosen.sizes = sizes
        chosen.trees |= piece.trees
        tokens[target] = chosen.tokens
        pairs[target] += len(piece.members)
    return [item.members for item in bins]


def _merged_sizes(into: _Group, piece: _Group, counts: TokenCounts, limits: Limits) -> list[int] | None:
    """Tokens of each image's tree in a bin with one more piece; ``None`` if they are too many."""
    if piece.trees & into.trees:
        # They share tokens.
        sizes = counts.sizes([into.members + piece.members])[0]
    else:
        sizes = into.sizes + piece.sizes
    # A cheap upper bound first: one row per tree, as long as the longest.
    may_exceed = into.members and len(sizes) * max(sizes) > limits.tokens
    return None if may_exceed and num_slots(sizes) > limits.tokens else sizes
