"""Spreads the pairs of one step over ranks and micro-batches, from their token counts alone.

Trees are cut where they exceed a micro-batch, and the pieces go, largest first, to the emptiest bin with room (the longest-
processing-time rule): O(pairs) for the cutting and a scan of the bins in NumPy for every piece.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmedpo_ray.align.data.token_counts import TokenCounts
from mmedpo_ray.align.packing.trees import num_slots
from mmedpo_ray.align.settings import AlignConfig


@dataclass(frozen=True)
class Limits:
    """How much a rank runs through the model at once.

    Attributes:
        pairs: most pairs in a micro-batch.
        tokens: most tokens in a micro-batch after packing, rows filled up; a single pair may exceed it.
    """

    pairs: int
    tokens: float = math.inf

    @classmethod
    def of(cls, align: AlignConfig) -> Limits:
        """What the settings allow."""
        return cls(align.pairs_per_forward, align.tokens_per_forward or math.inf)


@dataclass
class _Piece:
    """Pairs of tree number ``tree`` that stay together, with the tokens of each image's tree."""

    tree: int
    members: list[int]
    sizes: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.sizes)


@dataclass
class _Bin:
    """A micro-batch as it fills: its pairs, the tokens of each image's tree, and which trees its pieces are of."""

    members: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    trees: set[int] = field(default_factory=set)


def balance(
    trees: Iterable[Sequence[int]], counts: TokenCounts, num_ranks: int, limits: Limits
) -> list[list[int]]:
    """The micro-batches of a step: ``bins[rank::num_ranks]`` are those of a rank, equally many for each.

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
    # Pieces of one tree may share tokens again, and a single pair may exceed the limit; the other trees fill what they fill.
    parts = Counter(piece.tree for piece in pieces)
    tokens = sum(piece.tokens for piece in pieces if parts[piece.tree] == 1 and piece.tokens <= limits.tokens)
    rounds = max(
        1, math.ceil(total / (num_ranks * limits.pairs)), math.ceil(tokens / (num_ranks * limits.tokens))
    )
    while (bins := _fill(pieces, num_ranks * rounds, counts, limits)) is None:
        # Of many rounds a few more at once: every attempt looks at all pieces.
        rounds += 1 + rounds // 16
    return bins


def _pieces(trees: Sequence[list[int]], counts: TokenCounts, limits: Limits) -> list[_Piece]:
    """The trees, cut where they do not fit into a micro-batch; each piece of a tree repeats the image's tokens."""
    found = []
    for number, (tree, sizes) in enumerate(zip(trees, counts.sizes(trees), strict=True)):
        if len(tree) <= limits.pairs and num_slots(sizes) <= limits.tokens:
            found += [_Piece(number, tree, sizes)] if tree else []
        else:
            parts = _cut(tree, counts, limits)
            found += [_Piece(number, part, of) for part, of in zip(parts, counts.sizes(parts), strict=True)]
    return found


def _cut(tree: Sequence[int], counts: TokenCounts, limits: Limits) -> list[list[int]]:
    """Parts of a tree that fit into a micro-batch."""
    parts: list[list[int]] = []
    for member in tree:
        last = parts[-1] if parts else None
        if (
            last is None
            or len(last) == limits.pairs
            or (limits.tokens < math.inf and num_slots(counts.sizes([[*last, member]])[0]) > limits.tokens)
        ):
            parts.append([member])
        else:
            last.append(member)
    return parts


def _fill(
    pieces: Sequence[_Piece], num_bins: int, counts: TokenCounts, limits: Limits
) -> list[list[int]] | None:
    """Puts each piece into the emptiest bin that has room; ``None`` if one fits nowhere."""
    bins = [_Bin() for _ in range(num_bins)]
    tokens, pairs = np.zeros(num_bins), np.zeros(num_bins, np.int64)
    for piece in pieces:
        is_full = (pairs > 0) & (pairs + len(piece.members) > limits.pairs)
        target = int(np.where(is_full, math.inf, tokens).argmin())
        while not is_full[target] and (sizes := _together(bins[target], piece, counts, limits)) is None:
            is_full[target] = True
            target = int(np.where(is_full, math.inf, tokens).argmin())
        if is_full[target]:
            return None
        assert sizes is not None
        chosen = bins[target]
        chosen.members += piece.members
        chosen.sizes = sizes
        chosen.trees.add(piece.tree)
        tokens[target] = sum(sizes)
        pairs[target] += len(piece.members)
    return [item.members for item in bins]


def _together(into: _Bin, piece: _Piece, counts: TokenCounts, limits: Limits) -> list[int] | None:
    """Tokens of the images' trees of a bin with one more piece; ``None`` if that is more than a micro-batch may have."""
    if piece.tree in into.trees:
        # They share tokens.
        sizes = counts.sizes([into.members + piece.members])[0]
    else:
        sizes = into.sizes + piece.sizes
    # No layout of the rows has more than a row a tree, as long as the longest.
    may_exceed = into.members and len(sizes) * max(sizes) > limits.tokens
    is_too_much = may_exceed and num_slots(sizes) > limits.tokens
    return None if is_too_much else sizes
