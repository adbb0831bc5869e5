"""Tree packing: every sequence keeps its own tokens, positions and context; shared ones are there once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.align.packing.trees import PackedTrees, TokenSequence, num_slots, pack, pack_rows

PAD = 0


def read_back(packed_trees: PackedTrees, index: int) -> list[tuple[list[int], int]]:
    """(visible context in order of position, predicted token) of each response token of a sequence."""
    found = []
    for edge in packed_trees.term_edge[packed_trees.term_sequence == index].tolist():
        row, parent = packed_trees.edge_row[edge], packed_trees.edge_parent[edge]
        seen = packed_trees.dense_mask()[row, 0, parent].nonzero().flatten()
        output = packed_trees.edge_output[edge]
        assert (
            packed_trees.outputs.flatten()[output] == parent
            and output // packed_trees.outputs.shape[1] == row
        )
        order = packed_trees.position_ids[row, seen].argsort()
        assert packed_trees.position_ids[row, seen].sort().values.tolist() == list(range(len(seen)))
        found.append((packed_trees.input_ids[row, seen[order]].tolist(), int(packed_trees.edge_token[edge])))
    return found


tokens = st.lists(st.integers(1, 4), min_size=1, max_size=6)


@given(st.lists(st.tuples(tokens, tokens, st.integers(0, 2)), min_size=1, max_size=9))
def test_every_response_token_sees_exactly_what_precedes_it(
    items: list[tuple[list[int], list[int], int]],
) -> None:
    images = sorted({image for _, _, image in items})
    sequences = [TokenSequence(prompt, response, images.index(image)) for prompt, response, image in items]
    packed_trees = pack(sequences, {"pixel_values": torch.zeros(len(images), 3, 2, 2)}, PAD)
    for index, sequence in enumerate(sequences):
        whole = sequence.prompt + sequence.response
        expected = [(whole[:end], whole[end]) for end in range(len(sequence.prompt), len(whole))]
        assert read_back(packed_trees, index) == expected
    assert packed_trees.num_tokens.tolist() == [len(sequence.response) for sequence in sequences]
    is_filling = torch.arange(packed_trees.input_ids.numel())[:, None] == packed_trees.layout.padding
    shown = packed_trees.token_image.flatten()[~is_filling.any(-1)]
    assert sorted(set(shown.tolist())) == list(range(len(images)))


def test_a_shared_prefix_and_a_shared_answer_are_computed_once() -> None:
    prompt = [7] * 20
    sequences = [TokenSequence([*prompt, 1], [5, 2], 0), TokenSequence([*prompt, 1], [6, 2], 0)]
    sequences += [TokenSequence([*prompt, 3], [5, 2], 0), TokenSequence([*prompt, 1], [5, 2], 0)]
    packed_trees = pack(sequences, {"pixel_values": torch.zeros(1, 3, 2, 2)}, PAD)
    assert packed_trees.input_ids.shape == (1, 20 + (1 + 1 + 1) + (1 + 1)), (
        "an end token is predicted and never read"
    )
    assert len(packed_trees.edge_token) == 6, "the last sequence repeats the first"


def test_trees_of_different_images_do_not_merge_or_see_each_other() -> None:
    sequences = [TokenSequence([1, 2, 3, 4], [5, 8], 0), TokenSequence([1], [5, 8], 1)]
    sequences += [TokenSequence([1], [6, 8], 2)]
    packed_trees = pack(sequences, {"pixel_values": torch.zeros(3, 3, 2, 2)}, PAD)
    assert packed_trees.input_ids.tolist() == [[1, 2, 3, 4, 5, 1, 5, 1, 6]]
    assert packed_trees.token_image.tolist() == [[0] * 5 + [1, 1, 2, 2]]
    assert read_back(packed_trees, 2) == [([1], 6), ([1, 6], 8)]


def test_short_trees_beside_a_long_one_fill_their_rows() -> None:
    """An image of 1,030 tokens with eleven noised ones of 610: two to a row, not one."""
    sizes = [1030, *[610] * 11]
    rows = pack_rows(sizes)
    assert sorted(map(len, rows)) == [1, 1, 2, 2, 2, 2, 2] and num_slots(sizes) == 7 * 1220
    assert pack_rows([1000, 990]) == [[0], [1]], "a row of both would have 1 % less"
    assert pack_rows([]) == [] and num_slots([]) == 0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_every_tree_has_a_row(sizes: list[int]) -> None:
    rows = pack_rows(sizes)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    length = max(sum(sizes[number] for number in row) for row in rows)
    assert length <= 2 * max(sizes)
    assert num_slots(sizes) == len(rows) * length <= len(sizes) * max(sizes)
    assert num_slots(sizes) <= 2 * sum(sizes)
