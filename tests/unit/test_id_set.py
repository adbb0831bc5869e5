"""The set of ids that a table already has."""

from __future__ import annotations

import pickle

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.tables.id_set import IdSet


@given(st.lists(st.lists(st.text(max_size=2), max_size=30), max_size=8), st.lists(st.text(max_size=2)))
def test_it_behaves_like_a_set_of_strings(batches: list[list[str]], others: list[str]) -> None:
    ids, seen = IdSet(), set[str]()
    for batch in batches:
        expected = []
        for name in batch:
            expected.append(name in seen)
            seen.add(name)
        assert ids.add(batch) == expected
    found = pickle.loads(pickle.dumps(ids))
    assert len(found) == len(seen) and bool(found) == bool(seen)
    column = pa.chunked_array([pa.array(others, pa.string())])
    assert (
        found.mask(column).to_pylist()
        == [name in seen for name in others]
        == [name in found for name in others]
    )
    left = found.leave_out(pa.table({"id": column}), "id")
    assert left["id"].to_pylist() == [name for name in others if name not in seen]


def test_no_id_of_many_is_forgotten() -> None:
    names = [f"case-{number}" for number in range(5000)]
    ids = IdSet(names[::2])
    assert [name in ids for name in names] == [True, False] * 2500
