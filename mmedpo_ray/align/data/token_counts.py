"""Counts the tokens of packed pairs without packing them.

Two numbers per sequence are enough: its place in sorted order, and how many tokens it shares with the one
before.

Sequences that begin alike are neighbours when sorted, and two of them share at their start the least that any
neighbours between them share. So a prefix tree over any subset has Σ length − Σ shared tokens, each sequence
compared with the one before it in the subset: exactly what :func:`~mmedpo_ray.align.packing.trees.pack`
makes, without reading a token again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mmedpo_ray.align.packing.trees import common_prefix

TOKEN_BYTES = 4


def order_sequences(images: Sequence[int], sequences: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """Sorts the sequences of a tree.

    Args:
        images: number of the image that each shows; sequences of different images share nothing.
        sequences: token ids, four bytes each.

    Returns:
        The place of each in sorted order, from 0 (equal sequences have the same), and the tokens it shares
        with the place before.
    """
    keys = list(zip(images, sequences, strict=True))
    ordered = sorted(set(keys))
    shared = [0]
    for (image, sequence), (next_image, next_sequence) in itertools.pairwise(ordered):
        prefix = common_prefix(sequence, next_sequence) if image == next_image else 0
        shared.append(prefix // TOKEN_BYTES)
    place = {key: number for number, key in enumerate(ordered)}
    order = [place[key] for key in keys]
    return order, [shared[number] for number in order]


class TokenCounts:
    """Token counts of S pairs of whole trees.

    A sequence enters a forward pass without its last token, which is predicted and predicts nothing.

    Args:
        pairs: (S,) records of :data:`~mmedpo_ray.align.data.pair_index.PAIR`; all pairs of their trees.
        tree: (S,) number of each pair's tree; the records number images and sequences within trees.
        both_sides: whether rejected sides are computed too.

    Attributes:
        responses: (S,) int64, response tokens of each pair.
    """

    def __init__(self, pairs: np.ndarray, tree: Sequence[int] | np.ndarray, *, both_sides: bool) -> None:
        trees = np.tile(np.asarray(tree, np.int64), 2)
        orders, shared, responses, images = (
            np.concatenate([pairs[name].astype(np.int64) for name in names])
            for names in (
                ("chosen_order", "rejected_order"),
                ("chosen_shared", "rejected_shared"),
                ("chosen", "rejected"),
                ("image", "rejected_image"),
            )
        )
        _, first, places = np.unique((trees << 32) | orders, return_index=True, return_inverse=True)
        self._length = (np.tile(pairs["prompt"].astype(np.int64), 2) + responses - 1)[first]
        # One more, for ranges that end behind the last.
        self._shared = np.append(shared[first], 0)
        self._tree = trees[first]
        is_new = (np.diff(self._tree) != 0) | (np.diff(images[first]) != 0)
        self._image = np.cumsum(np.append(0, is_new)) if len(first) else first
        sides = places.reshape(2, -1)
        self._places = sides.T if both_sides else sides[:1].T
        chosen, rejected = responses.reshape(2, -1)
        self.responses = chosen + rejected if both_sides else chosen

    def sizes(self, groups: Sequence[Sequence[int] | np.ndarray]) -> list[list[int]]:
        """Tokens of each image's tree if every group of pairs is packed alone; an empty group has none."""
        found: list[list[int]] = [[] for _ in groups]
        members = np.fromiter(itertools.chain.from_iterable(groups), np.int64)
        if not len(members):
            return found
        number = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        group, place = np.divmod(
            np.unique(number[:, None] * len(self._length) + self._places[members]), len(self._length)
        )
        new = self._length[place]
        new[1:] -= self._common(group, place)
        is_new = (np.diff(group) != 0) | (np.diff(self._image[place]) != 0)
        starts = np.append(0, np.flatnonzero(is_new) + 1)
        for index, tokens in zip(group[starts].tolist(), np.add.reduceat(new, starts).tolist(), strict=True):
            found[index].append(tokens)
        return found

    def _common(self, group: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The tokens that each sequence but the first shares with the one before it in its group."""
        is_near = (group[1:] == group[:-1]) & (self._tree[place[1:]] == self._tree[place[:-1]])
        common = np.zeros(len(is_near), np.int64)
        if is_near.any():
            ranges = np.stack([place[:-1][is_near] + 1, place[1:][is_near] + 1], axis=1)
            common[is_near] = np.minimum.reduceat(self._shared, ranges.ravel())[::2]
        return common

    def total(self, members: Sequence[int] | np.ndarray) -> int:
        """Tokens of the trees of these pairs."""
        return sum(self.sizes([members])[0])

    def cheapest(self) -> int:
        """The pair with the fewest tokens, the first of equals."""
        tokens = [sum(sizes) for sizes in self.sizes([[member] for member in range(len(self.responses))])]
        return tokens.index(min(tokens))
