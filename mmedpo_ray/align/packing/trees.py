"""Tree packing: tokens that sequences have in common are computed once. Plain torch.

All questions about an image, and both answers to each, begin with the same tokens: the image. Sequences that
show the same image are merged into a tree of tokens. A token attends to its ancestors only, and its position
is its depth. Under causal attention the result for each sequence is exactly that of the sequence alone, while
a shared token (nearly all of them: 64 to 576 per image) passes the model once. Several trees share a row if
they fit.

    image ─┬─ question 1 ─┬─ chosen            (text pair)
           │              └─ rejected
           └─ question 2 ──── chosen           (visual pair; its rejected side is in the tree of the noised
           image)

The tokens of a tree are in preorder, so the descendants of token j are those from j to ``subtree_end[j]``:
token i sees token j exactly if j ≤ i < subtree_end[j]. This one number per token is the whole mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mmedpo_ray.align.packing.tree_attention import TreeLayout, lay_out

# Row lengths that are tried: this many steps from the length of the longest tree to twice that.
_LENGTH_STEPS = 8


@dataclass(frozen=True)
class TokenSequence:
    """A prompt with its response.

    Attributes:
        prompt: token ids, image ids included.
        response: token ids with the end token; at least one.
        image: index of the image it shows.
        weights: of the response tokens in its log-probability, 0 to 1; ``None``: all 1.
    """

    prompt: list[int]
    response: list[int]
    image: int
    weights: list[float] | None = None


@dataclass(frozen=True)
class PackedTrees:
    """N sequences packed into R rows of T tokens.

    Attributes:
        input_ids: (R, T) int64.
        position_ids: (R, T) int64, depth in the tree.
        subtree_end: (R, T) int64, the position after the last descendant.
        images: what the vision tower takes of the I distinct images, by the keyword of its forward.
        token_image: (R, T) int64, number of the image of a token's tree; arbitrary for
            padding. If the question comes before the image, a tree has the image's tokens once per question.
        edge_row, edge_parent, edge_token: (E,) int64: in row ``edge_row`` the token at position
            ``edge_parent`` predicts the response token ``edge_token``.
        term_edge, term_sequence: (S,) int64: the edge belongs to the response of the sequence.
        term_weight: (S,) float32, its weight there.
        num_tokens: (N,) int64, response tokens of each sequence.
        outputs: (R, O) int64, the distinct positions that predict response tokens, row by row, padded with 0.
        edge_output: (E,) int64, index of an edge's ``edge_parent`` among the R·O outputs.
        layout: trunks and branches of the rows, for attention.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    images: dict[str, Tensor]
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

    def to(self, device: torch.device) -> PackedTrees:
        """The batch on another device."""
        moved: dict[str, Any] = {
            item.name: getattr(self, item.name).to(device, non_blocking=True)
            for item in fields(self)
            if item.name != "images"
        }
        images = {name: value.to(device, non_blocking=True) for name, value in self.images.items()}
        return replace(self, images=images, **moved)

    def dense_mask(self) -> Tensor:
        """(R, 1, T, T) bool for scaled dot-product attention, True if the query (third axis) sees the key."""
        return self._sees(torch.arange(self.input_ids.shape[1], device=self.input_ids.device)[None])[:, None]

    def output_mask(self) -> Tensor:
        """(R, O, T) bool, the rows of :meth:`dense_mask` at ``outputs``."""
        return self._sees(self.outputs)

    def _sees(self, positions: Tensor) -> Tensor:
        query = positions.unsqueeze(-1)
        key = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return (key <= query) & (query < self.subtree_end[:, None, :])

    def block_mask(self) -> Any:
        """The dense mask as FlexAttention's ``BlockMask``, which is never stored whole."""
        from torch.nn.attention.flex_attention import create_block_mask

        end = self.subtree_end

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
            return (key <= query) & (query < end[row, key])

        rows, length = self.input_ids.shape
        return create_block_mask(sees, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=str(end.device))


class _Tree:
    """The tokens of one image's sequences, in the order they are added (parent -1: a root)."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self._parents: list[int] = []
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
            if key not in self._children:
                self._children[key] = len(self.tokens)
                self.tokens.append(tokens[depth])
                self._parents.append(node)
                self.depths.append(depth)
            node = self._children[key]
            path.append(node)
        self._last = (tokens, path)
        return path

    def preorder(self) -> tuple[Tensor, Tensor]:
        """The position of every node if descendants follow their ancestor, and the size of its subtree."""
        size = [1] * len(self.tokens)
        for node in range(len(self.tokens) - 1, 0, -1):
            if self._parents[node] >= 0:
                size[self._parents[node]] += size[node]
        # The next free position below every node; the last entry (index -1) is that of the roots.
        free = [0] * (len(self.tokens) + 1)
        place = []
        for node, parent in enumerate(self._parents):
            place.append(free[parent])
            free[parent] += size[node]
            free[node] = place[node] + 1
        return torch.tensor(place), torch.tensor(size)


def pack(sequences: Sequence[TokenSequence], images: dict[str, Tensor], pad_token_id: int) -> PackedTrees:
    """Merges sequences of the same image into trees and packs the trees into rows.

    Args:
        sequences: N ≥ 1 of them; log-probabilities computed from the packed trees are in their order.
        images: what the vision tower takes of the images they name.
        pad_token_id: pads rows; no other token sees the padding.
    """
    trees: dict[int, _Tree] = {}
    # The last token is predicted and predicts nothing: it is no input.
    paths = [
        trees.setdefault(sequence.image, _Tree()).add(sequence.prompt + sequence.response[:-1])
        for sequence in sequences
    ]
    numbers = sorted(trees)
    sizes = [len(trees[image].tokens) for image in numbers]
    rows = pack_rows(sizes)
    length = _row_length(rows, sizes)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros((len(rows), length), dtype=torch.int64)
    # Padding sees itself: a query that sees nothing would be NaN.
    subtree_end = torch.arange(1, length + 1).repeat(len(rows), 1)
    token_image = torch.zeros((len(rows), length), dtype=torch.int64)
    positions: dict[int, tuple[int, list[int]]] = {}
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            tree, image = trees[numbers[index]], numbers[index]
            order, subtree = tree.preorder()
            place = order + start
            input_ids[number, place] = torch.tensor(tree.tokens)
            position_ids[number, place] = torch.tensor(tree.depths)
            subtree_end[number, place] = place + subtree
            token_image[number, start : start + sizes[index]] = image
            positions[image] = (number, place.tolist())
            start += sizes[index]
    # (row, position, token) → number of the edge; (row, position) → index among the row's outputs.
    edges: dict[tuple[int, int, int], int] = {}
    outputs: list[dict[int, int]] = [{} for _ in rows]
    term_edge, term_sequence = [], []
    term_weight: list[float] = []
    for index, (sequence, path) in enumerate(zip(sequences, paths, strict=True)):
        number, at = positions[sequence.image]
        for parent, token in zip(path[len(sequence.prompt) - 1 :], sequence.response, strict=True):
            term_edge.append(edges.setdefault((number, at[parent], token), len(edges)))
            term_sequence.append(index)
            outputs[number].setdefault(at[parent], len(outputs[number]))
        term_weight += sequence.weights or [1.0] * len(sequence.response)
    width = max(map(len, outputs))
    edge_row, edge_parent, edge_token = torch.tensor(list(edges)).t().contiguous()
    return PackedTrees(
        input_ids=input_ids,
        position_ids=position_ids,
        subtree_end=subtree_end,
        images=images,
        token_image=token_image,
        edge_row=edge_row,
        edge_parent=edge_parent,
        edge_token=edge_token,
        term_edge=torch.tensor(term_edge),
        term_sequence=torch.tensor(term_sequence),
        term_weight=torch.tensor(term_weight),
        num_tokens=torch.tensor([len(sequence.response) for sequence in sequences]),
        outputs=torch.tensor([[*found, *[0] * (width - len(found))] for found in outputs]),
        edge_output=torch.tensor([row * width + outputs[row][parent] for row, parent, _ in edges]),
        layout=lay_out(subtree_end, [sum(sizes[index] for index in row) for row in rows]),
    )


def pack_rows(sizes: Sequence[int]) -> list[list[int]]:
    """Distributes trees over rows with little padding, none longer than twice the longest tree.

    The trees of noised images are short beside the tree of an image: rows of the longest tree's length would
    be half empty.

    Args:
        sizes: tokens of every tree.

    Returns:
        The numbers of the trees of each row.
    """
    ordered = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    longest = sizes[ordered[0]] if ordered else 0
    if not longest:
        return []

    def cost(rows: list[list[int]]) -> int:
        # Longer rows have more products of queries and keys: saving a few per cent of padding does not pay
        # for them.
        length = _row_length(rows, sizes)
        return len(rows) * length * (16 * longest + length)

    capacities = (longest + longest * step // _LENGTH_STEPS for step in range(_LENGTH_STEPS + 1))
    return min((_first_fit(ordered, sizes, capacity) for capacity in capacities), key=cost)


def _first_fit(ordered: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts each tree into the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in ordered:
        row = next((row for row, free in enumerate(room) if sizes[number] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(number)
        room[row] -= sizes[number]
    return rows


def _row_length(rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> int:
    return max((sum(sizes[number] for number in row) for row in rows), default=0)


def num_slots(sizes: Sequence[int]) -> int:
    """Tokens of a forward pass over trees of these sizes: rows × their length, padding included."""
    rows = pack_rows(sizes)
    return len(rows) * _row_length(rows, sizes)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items two lists (or byte strings) share at the start, by bisection."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
