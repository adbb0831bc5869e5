"""Where slices of a table begin and end."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.tables.slices import _bounds


@given(groups=st.lists(st.integers(1, 3000), max_size=30), about=st.integers(1, 2048))
def test_slices_are_row_groups_or_parts_of_large_ones(groups: list[int], about: int) -> None:
    edges = _bounds(groups, about)
    assert edges[0] == 0 and edges[-1] == sum(groups)
    assert all(start < stop for start, stop in pairwise(edges))
    ends = [0, *accumulate(groups)]
    for edge in edges:
        inside = [size for size, end in zip(groups, ends[1:], strict=True) if end - size < edge < end]
        assert all(size >= 2 * about for size in inside), "only a row group of several slices is cut"
    for start, stop in pairwise(edges[:-1]):
        touched = [
            size for size, end in zip(groups, ends[1:], strict=True) if end - size < stop and end > start
        ]
        assert stop - start < 2 * about + max(touched)
