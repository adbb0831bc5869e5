"""Tree packing: what sequences have in common is computed once. Plain torch.

All questions about an image, and both answers to each, begin with the same tokens: the image. Sequences that show the same
image are merged into a tree of tokens, in which a token attends to its ancestors only and stands at its depth. Under
causal attention the result for each sequence is exactly that of the sequence alone, while a shared token (nearly all of
them: 64 to 576 per image) passes the model once. Several trees share a row where they fit.

    image ─┬─ question 1 ─┬─ chosen            (text pair)
           │              └─ rejected
           └─ question 2 ──── chosen           (visual pair; its rejected side is in the tree of the noised image)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSequence:
    """A prompt with its response.

    Attributes:
        prompt: token ids, image ids included.
        response: token ids, end token included; at least one.
        image: index of the image it shows.
    """

    prompt: list[int]
    response: list[int]
    image: int


@dataclass(frozen=True)
class Forest:
    """N sequences packed into R rows of T tokens.

    Attributes:
        input_ids: (R, T) int64.
        position_ids: (R, T) int64, depth in the tree.
        attention_mask: (R, 1, T, T) bool, True where the query (third axis) sees the key.
        pixel_values: (I, 3, H, W) float32, the distinct images.
        tree_image: (G,) int64, the image of each tree, row by row in the order of its tokens.
        edge_row, edge_parent, edge_token: (E,) int64: in row ``edge_row`` the token at position ``edge_parent`` predicts
            the response token ``edge_token``.
        term_edge, term_sequence: (S,) int64: the edge belongs to the response of the sequence.
        num_tokens: (N,) int64, response tokens of each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    tree_image: Tensor
    edge_row: Tensor
    edge_parent: Tensor
    edge_token: Tensor
    term_edge: Tensor
    term_sequence: Tensor
    num_tokens: Tensor

    def to(self, device: torch.device) -> Forest:
        """The batch on another device."""
        return replace(
            self,
            **{item.name: getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)},
        )


class _Tree:
    """The tokens of one image's sequences; node k has its parent before it (-1: none)."""

    def __init__(self, image: int) -> None:
        self.image = image
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, tokens: list[int]) -> list[int]:
        """Adds a sequence; returns its nodes."""
        node, path = -1, []
        for depth, token in enumerate(tokens):
            key = (node, token)
            child = self._children.get(key)
            if child is None:
                child = len(self.tokens)
                self._children[key] = child
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = child
            path.append(node)
        return path

    def ancestors(self) -> Tensor:
        """(T, T) bool: row i is True at the ancestors of node i and at i."""
        seen = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        rows = seen.numpy()
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                rows[node, : parent + 1] = rows[parent, : parent + 1]
            rows[node, node] = True
        return seen


def pack(sequences: Sequence[TokenSequence], pixel_values: Tensor, pad_token_id: int) -> Forest:
    """Merges sequences of the same image and lays the trees into rows.

    Args:
        sequences: N ≥ 1 of them; their order is that of the log-probabilities computed from the forest.
        pixel_values: (I, 3, H, W), the images they name.
        pad_token_id: fills rows; no other token sees the filling.
    """
    trees: dict[int, _Tree] = {}
    paths = []
    for sequence in sequences:
        tree = trees.setdefault(sequence.image, _Tree(sequence.image))
        paths.append(tree.add(sequence.prompt + sequence.response))
    rows = _lay_out(list(trees.values()))
    length = max(sum(len(tree.tokens) for tree in row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros((len(rows), length), dtype=torch.int64)
    # Filling sees itself: a query that sees nothing would be NaN.
    mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    place: dict[int, tuple[int, int]] = {}
    for number, row in enumerate(rows):
        start = 0
        for tree in row:
            end = start + len(tree.tokens)
            input_ids[number, start:end] = torch.tensor(tree.tokens)
            position_ids[number, start:end] = torch.tensor(tree.depths)
            mask[number, start:end, start:end] = tree.ancestors()
            place[tree.image] = (number, start)
            start = end
    edges: dict[tuple[int, int], int] = {}
    rows_of, parents, tokens, term_edge, term_sequence = [], [], [], [], []
    for index, (sequence, path) in enumerate(zip(sequences, paths, strict=True)):
        tree = trees[sequence.image]
        number, start = place[sequence.image]
        for node in path[len(sequence.prompt) :]:
            key = (sequence.image, node)
            if key not in edges:
                edges[key] = len(edges)
                rows_of.append(number)
                parents.append(start + tree.parents[node])
                tokens.append(tree.tokens[node])
            term_edge.append(edges[key])
            term_sequence.append(index)
    return Forest(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask.unsqueeze(1),
        pixel_values=pixel_values,
        tree_image=torch.tensor([tree.image for row in rows for tree in row]),
        edge_row=torch.tensor(rows_of),
        edge_parent=torch.tensor(parents),
        edge_token=torch.tensor(tokens),
        term_edge=torch.tensor(term_edge),
        term_sequence=torch.tensor(term_sequence),
        num_tokens=torch.tensor([len(sequence.response) for sequence in sequences]),
    )


def _lay_out(trees: list[_Tree]) -> list[list[_Tree]]:
    """Trees into rows no longer than the longest tree: each into the first row with room, longest first."""
    ordered = sorted(trees, key=lambda tree: (-len(tree.tokens), tree.image))
    capacity = len(ordered[0].tokens)
    rows: list[list[_Tree]] = []
    room: list[int] = []
    for tree in ordered:
        size = len(tree.tokens)
        for number, free in enumerate(room):
            if size <= free:
                rows[number].append(tree)
                room[number] -= size
                break
        else:
            rows.append([tree])
            room.append(capacity - size)
    return rows
