"""Spreads the pairs of one step over ranks and micro-batches, from their token counts alone.

Trees are cut where they exceed a micro-batch, and the pieces go, largest first, to the emptiest bin with room (the longest-
processing-time rule): O(pairs) for the cutting and a scan of the bins in NumPy for every piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Limits:
    """How much a rank runs through the model at once.

    Attributes:
        pairs: most pairs in a micro-batch.
        tokens: most tokens in a micro-batch after packing; a single pair may exceed it.
    """

    pairs: int
    tokens: float = math.inf


class TokenCounts:
    """Token counts of S pairs of one step.

    A packed forward computes each image's longest prompt and all responses: a good estimate of what prefix trees hold.

    Args:
        pairs: (S,) records of :data:`~mmedpo_ray.align.pair_index.PAIR`.
        tree: (S,) number of each pair's tree; the records number images within trees.
        both_sides: whether rejected sides are computed too.
    """

    def __init__(self, pairs: np.ndarray, tree: Sequence[int], *, both_sides: bool) -> None:
        self._prompt: list[int] = pairs["prompt"].tolist()
        chosen, rejected = pairs["chosen"], pairs["rejected"]
        self.responses: list[int] = (chosen + rejected if both_sides else chosen).tolist()
        first = list(zip(tree, pairs["image"].tolist(), strict=True))
        second = list(zip(tree, pairs["rejected_image"].tolist(), strict=True))
        self._images = [
            {one, other} if both_sides else {one} for one, other in zip(first, second, strict=True)
        ]

    def of(self, members: Iterable[int]) -> int:
        """Tokens of a forward pass of these pairs."""
        prompts: dict[tuple[int, int], int] = {}
        return sum(self.add(prompts, member) for member in members)

    def cheapest(self) -> int:
        """The pair with the fewest tokens, the first of equals."""
        return min(range(len(self.responses)), key=lambda member: self.growth({}, member))

    def growth(self, prompts: dict[tuple[int, int], int], member: int) -> int:
        """Tokens that a pair adds to a forward pass with these longest prompts of its images."""
        prompt = self._prompt[member]
        longer = (max(0, prompt - prompts.get(image, 0)) for image in self._images[member])
        return self.responses[member] + sum(longer)

    def add(self, prompts: dict[tuple[int, int], int], member: int) -> int:
        """The same, and notes the pair's prompts."""
        tokens = self.growth(prompts, member)
        for image in self._images[member]:
            prompts[image] = max(prompts.get(image, 0), self._prompt[member])
        return tokens


@dataclass
class _Piece:
    members: list[int]
    tokens: int
    prompts: dict[tuple[int, int], int]


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
    pieces = [piece for tree in trees for piece in _cut(tree, counts, limits)]
    pieces.sort(key=lambda piece: (-piece.tokens, piece.members[0]))
    total = sum(len(piece.members) for piece in pieces)
    rounds = max(1, math.ceil(total / (num_ranks * limits.pairs)))
    while (bins := _fill(pieces, num_ranks * rounds, limits)) is None:
        rounds += 1
    return bins


def _cut(tree: Sequence[int], counts: TokenCounts, limits: Limits) -> list[_Piece]:
    """Pieces of a tree that fit into a micro-batch; each repeats the image's tokens."""
    pieces: list[_Piece] = []
    for member in tree:
        last = pieces[-1] if pieces else None
        if (
            last is None
            or len(last.members) == limits.pairs
            or last.tokens + counts.growth(last.prompts, member) > limits.tokens
        ):
            last = _Piece([], 0, {})
            pieces.append(last)
        last.members.append(member)
        last.tokens += counts.add(last.prompts, member)
    return pieces


def _fill(pieces: Sequence[_Piece], num_bins: int, limits: Limits) -> list[list[int]] | None:
    """Puts each piece into the emptiest bin that has room; ``None`` if one fits nowhere."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens, pairs = np.zeros(num_bins), np.zeros(num_bins, np.int64)
    for piece in pieces:
        is_full = (pairs > 0) & (
            (pairs + len(piece.members) > limits.pairs) | (tokens + piece.tokens > limits.tokens)
        )
        target = int(np.where(is_full, math.inf, tokens).argmin())
        if is_full[target]:
            return None
        bins[target] += piece.members
        tokens[target] += piece.tokens
        pairs[target] += len(piece.members)
    return bins
