"""Tree packing: what sequences have in common is computed once. Plain torch.

All questions about an image, and both answers to each, begin with the same tokens: the image. Sequences that show the same
image are merged into a tree of tokens, in which a token attends to its ancestors only and stands at its depth. Under
causal attention the result for each sequence is exactly that of the sequence alone, while a shared token (nearly all of
them: 64 to 576 per image) passes the model once. Several trees share a row where they fit.

    image ─┬─ question 1 ─┬─ chosen            (text pair)
           │              └─ rejected
           └─ question 2 ──── chosen           (visual pair; its rejected side is in the tree of the noised image)

The tokens of a tree stand in preorder, so that the descendants of token j are those from j to ``subtree_end[j]``: token i
sees token j exactly if j ≤ i < subtree_end[j]. That one number a token is the whole mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mmedpo_ray.align.packing.tree_attention import TreeLayout, lay_out

# Steps between the longest tree's length and twice that, in which the length of rows is tried.
_PARTS = 8


@dataclass(frozen=True)
class TokenSequence:
    """A prompt with its response.

    Attributes:
        prompt: token ids, image ids included.
        response: token ids, end token included; at least one.
        image: index of the image it shows.
        weights: of the response tokens in its log-probability, 0 to 1; ``None``: all 1.
    """

    prompt: list[int]
    response: list[int]
    image: int
    weights: list[float] | None = None


@dataclass(frozen=True)
class Forest:
    """N sequences packed into R rows of T tokens.

    Attributes:
        input_ids: (R, T) int64.
        position_ids: (R, T) int64, depth in the tree.
        subtree_end: (R, T) int64, the position after the last descendant.
        pixel_values: (I, 3, H, W) float32, the distinct images.
        token_image: (R, T) int64, the image of the tree that a token stands in, by its place in ``pixel_values``; of filling
            any. Where the question comes before the image a tree has the image's tokens once a question.
        edge_row, edge_parent, edge_token: (E,) int64: in row ``edge_row`` the token at position ``edge_parent`` predicts
            the response token ``edge_token``.
        term_edge, term_sequence: (S,) int64: the edge belongs to the response of the sequence.
        term_weight: (S,) float32, its weight there.
        num_tokens: (N,) int64, response tokens of each sequence.
        outputs: (R, O) int64, the distinct positions that predict response tokens, row by row, filled up with 0.
        edge_output: (E,) int64, where the position that predicts an edge's token lies among the R·O outputs.
        layout: trunks and branches of the rows, for attention.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    pixel_values: Tensor
    token_image: Tensor
    edge_row: Tensor
    edge_parent: Tensor
    edge_token: Tensor
    term_edge: Tensor
    term_sequence: Tensor
    term_weight: Tensor
    num_tokens: Tensor
    outputs: Tensor
    edge_output: Tensor
    layout: TreeLayout

    def to(self, device: torch.device) -> Forest:
        """The batch on another device."""
        return replace(
            self,
            **{item.name: getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)},
        )

    def dense_mask(self) -> Tensor:
        """(R, 1, T, T) bool, True where the query (third axis) sees the key; for scaled dot-product attention."""
        return self._sees(
            torch.arange(self.input_ids.shape[1], device=self.input_ids.device)[None, :]
        ).unsqueeze(1)

    def output_mask(self) -> Tensor:
        """(R, O, T) bool, the rows of :meth:`dense_mask` at ``outputs``."""
        return self._sees(self.outputs)

    def _sees(self, positions: Tensor) -> Tensor:
        query = positions.unsqueeze(-1)
        key = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (key <= query) & (query < self.subtree_end[:, None, :])

    def block_mask(self) -> Any:
        """The same as FlexAttention's ``BlockMask``: (R, 1, T, T) that is never stored."""
        from torch.nn.attention.flex_attention import create_block_mask

        end = self.subtree_end

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
            return (key <= query) & (query < end[row, key])

        rows, length = self.input_ids.shape
        return create_block_mask(sees, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=str(end.device))


class _Tree:
    """The tokens of one image's sequences, as they are added; node k has its parent before it (-1: none)."""

    def __init__(self, image: int) -> None:
        self.image = image
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}
        self._last: tuple[list[int], list[int]] = ([], [])

    def add(self, tokens: list[int]) -> list[int]:
        """Adds a sequence; returns its nodes."""
        known, path = self._last
        start = common_prefix(known, tokens)
        path = path[:start]
        node = path[-1] if path else -1
        for depth in range(start, len(tokens)):
            key = (node, tokens[depth])
            child = self._children.get(key)
            if child is None:
                child = len(self.tokens)
                self._children[key] = child
                self.tokens.append(tokens[depth])
                self.parents.append(node)
                self.depths.append(depth)
            node = child
            path.append(node)
        self._last = (tokens, path)
        return path

    def preorder(self) -> tuple[list[int], list[int]]:
        """The position of every node when descendants follow their ancestor, and the size of its subtree."""
        size = [1] * len(self.tokens)
        for node in range(len(self.tokens) - 1, 0, -1):
            if self.parents[node] >= 0:
                size[self.parents[node]] += size[node]
        # A child is placed behind its parent and what was placed there before it.
        taken = [1] * len(self.tokens)
        place = [0] * len(self.tokens)
        roots = 0
        for node, parent in enumerate(self.parents):
            if parent < 0:
                place[node] = roots
                roots += size[node]
            else:
                place[node] = place[parent] + taken[parent]
                taken[parent] += size[node]
        return place, size


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
        # The last token is predicted and predicts nothing: it is no input.
        paths.append(tree.add(sequence.prompt + sequence.response[:-1]))
    found = sorted(trees.values(), key=lambda tree: tree.image)
    rows = [[found[number] for number in row] for row in lay_out_rows([len(tree.tokens) for tree in found])]
    length = max(sum(len(tree.tokens) for tree in row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros((len(rows), length), dtype=torch.int64)
    # Filling sees itself: a query that sees nothing would be NaN.
    subtree_end = torch.arange(1, length + 1).repeat(len(rows), 1)
    token_image = torch.zeros((len(rows), length), dtype=torch.int64)
    positions: dict[int, tuple[int, list[int]]] = {}
    for number, row in enumerate(rows):
        start = 0
        for tree in row:
            order, size = tree.preorder()
            place = torch.tensor(order) + start
            input_ids[number, place] = torch.tensor(tree.tokens)
            position_ids[number, place] = torch.tensor(tree.depths)
            subtree_end[number, place] = place + torch.tensor(size)
            token_image[number, start : start + len(tree.tokens)] = tree.image
            positions[tree.image] = (number, place.tolist())
            start += len(tree.tokens)
    edges: dict[tuple[int, int, int], int] = {}
    rows_of, parents, tokens, term_edge, term_sequence = [], [], [], [], []
    term_weight: list[float] = []
    for index, (sequence, path) in enumerate(zip(sequences, paths, strict=True)):
        number, at = positions[sequence.image]
        for parent, token in zip(path[len(sequence.prompt) - 1 :], sequence.response, strict=True):
            key = (sequence.image, parent, token)
            if key not in edges:
                edges[key] = len(edges)
                rows_of.append(number)
                parents.append(at[parent])
                tokens.append(token)
            term_edge.append(edges[key])
            term_sequence.append(index)
        term_weight += sequence.weights or [1.0] * len(sequence.response)
    outputs, edge_output = _outputs(rows_of, parents, len(rows))
    return Forest(
        input_ids=input_ids,
        position_ids=position_ids,
        subtree_end=subtree_end,
        pixel_values=pixel_values,
        token_image=token_image,
        edge_row=torch.tensor(rows_of),
        edge_parent=torch.tensor(parents),
        edge_token=torch.tensor(tokens),
        term_edge=torch.tensor(term_edge),
        term_sequence=torch.tensor(term_sequence),
        term_weight=torch.tensor(term_weight),
        num_tokens=torch.tensor([len(sequence.response) for sequence in sequences]),
        outputs=outputs,
        edge_output=edge_output,
        layout=lay_out(subtree_end, [sum(len(tree.tokens) for tree in row) for row in rows]),
    )


def _outputs(edge_rows: list[int], edge_parents: list[int], num_rows: int) -> tuple[Tensor, Tensor]:
    """``outputs`` and ``edge_output`` of a forest: several edges may leave one position."""
    found: list[dict[int, int]] = [{} for _ in range(num_rows)]
    for row, parent in zip(edge_rows, edge_parents, strict=True):
        found[row].setdefault(parent, len(found[row]))
    width = max(map(len, found))
    outputs = torch.zeros((num_rows, width), dtype=torch.int64)
    for row, positions in enumerate(found):
        outputs[row, : len(positions)] = torch.tensor(list(positions))
    edge_output = [
        row * width + found[row][parent] for row, parent in zip(edge_rows, edge_parents, strict=True)
    ]
    return outputs, torch.tensor(edge_output)


def lay_out_rows(sizes: Sequence[int]) -> list[list[int]]:
    """Trees into rows with little filling, none longer than twice the longest tree.

    Beside the tree of an image those of its noised images are short: rows of the longest tree's length would be half empty.

    Args:
        sizes: tokens of every tree.

    Returns:
        Of each row the numbers of its trees.
    """
    ordered = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    longest = sizes[ordered[0]] if ordered else 0
    ways = (
        _first_fit(ordered, sizes, longest + longest * part // _PARTS)
        for part in range(_PARTS + 1 if longest else 0)
    )

    def cost(rows: list[list[int]]) -> int:
        # Longer rows have more products of queries and keys: filling of a few per cent is no reason for them.
        length = _row_length(rows, sizes)
        return len(rows) * length * (16 * longest + length)

    return min(ways, key=cost, default=[])


def _first_fit(ordered: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Each tree in the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in ordered:
        size = sizes[number]
        for row, free in enumerate(room):
            if size <= free:
                rows[row].append(number)
                room[row] -= size
                break
        else:
            rows.append([number])
            room.append(capacity - size)
    return rows


def _row_length(rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> int:
    return max(sum(sizes[number] for number in row) for row in rows)


def num_slots(sizes: Sequence[int]) -> int:
    """Tokens of a forward pass over trees of these sizes: rows × their length, with what fills them up."""
    rows = lay_out_rows(sizes)
    return len(rows) * _row_length(rows, sizes) if rows else 0


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items two lists (or bytes of two strings) share at the start, by comparing halves: image prefixes are long."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
