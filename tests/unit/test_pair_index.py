"""The prepared table on disk gives the plan that the same pairs in memory give, however its files and row groups are cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from align_world import align_settings, write_scored
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llava import build_tiny_llava

from mmedpo_ray import storage, tables
from mmedpo_ray.align.pair_index import PAIR, Totals, ensure_index, load_index
from mmedpo_ray.align.pair_source import PairsInMemory, StoredPairs
from mmedpo_ray.align.plan import Plan
from mmedpo_ray.align.prepare import COLUMNS, Preparation, prepare_pairs, prepare_rows, with_reversed_pairs
from mmedpo_ray.errors import UserError
from mmedpo_ray.manifest import Manifest
from mmedpo_ray.models.loading import PromptWriter, load_processor

MANIFEST = Manifest(station="prepare", key="test", content="first")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> PromptWriter:
    return PromptWriter(load_processor(str(build_tiny_llava(tmp_path_factory.mktemp("model") / "tiny"))))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return write_scored(tmp_path_factory.mktemp("world"), num_images=7)


ALIGN = align_settings(
    visual_coefficient=0.5, reversed_visual_coefficient=0.25, common_token_weight=0.3, epochs=2
)


def prepared(scored: list[dict], writer: PromptWriter) -> list[dict]:
    rows = [{name: row[name] for name in COLUMNS} for row in scored]
    wrong = {row["sample_id"]: row["rejected"] for row in scored if row["kind"] == "text"}
    found = prepare_rows(with_reversed_pairs(rows, wrong), writer, Preparation.of(ALIGN))
    return sorted(found, key=lambda row: row["tree_key"])


def write(folder: Path, rows: list[dict], rows_per_file: int, rows_per_group: int) -> None:
    for number, start in enumerate(range(0, len(rows), rows_per_file)):
        table = tables.to_table(rows[start : start + rows_per_file], tables.PREPARED)
        storage.write_parquet(folder / f"part-{number:05d}.parquet", table, row_group_size=rows_per_group)


@pytest.mark.parametrize(("rows_per_file", "rows_per_group"), [(100, 100), (8, 3), (1, 1), (11, 2)])
def test_files_and_row_groups_may_cut_trees(
    scored: list[dict], writer: PromptWriter, tmp_path: Path, rows_per_file: int, rows_per_group: int
) -> None:
    write(tmp_path, prepared(scored, writer), rows_per_file, rows_per_group)
    ensure_index(str(tmp_path), MANIFEST)
    pairs, dropped = prepare_pairs(
        tables.to_table(scored, tables.SCORED),
        writer,
        max_length=ALIGN.max_length,
        visual_coefficient=0.5,
        reversed_visual_coefficient=0.25,
        common_token_weight=0.3,
    )
    assert not dropped and len(pairs) == 7 * 5
    # A column of the table has 32 bits, as the tensor that is made of it.
    pairs = [
        replace(
            pair,
            chosen_weights=pair.chosen_weights and np.float32(pair.chosen_weights).tolist(),
            rejected_weights=pair.rejected_weights and np.float32(pair.rejected_weights).tolist(),
        )
        for pair in pairs
    ]
    stored = Plan.of(StoredPairs(str(tmp_path), writer, ALIGN), ALIGN, seed=3)
    memory = Plan.of(PairsInMemory(pairs), ALIGN, seed=3)
    for step in range(stored.total_steps):
        for rank in range(2):
            assert stored.micro_batches(step, rank, 2) == memory.micro_batches(step, rank, 2)
        assert stored.normaliser(step) == memory.normaliser(step)
    ours, theirs = stored.summary(), memory.summary()
    # In memory a reversed pair is a visual one with its weight.
    assert ours.pop("reversed_pairs") == 7 and theirs.pop("reversed_pairs") == 0
    assert ours == theirs


def test_an_image_token_stands_once_in_the_table(scored: list[dict], writer: PromptWriter) -> None:
    for row in prepared(scored, writer):
        assert row["prompt"].count(writer.image_token_id) == 1
        assert len(writer.widen(row["prompt"])) == row["prompt_tokens"] > writer.num_image_tokens
        assert writer.narrow(writer.widen(row["prompt"])) == row["prompt"]


def test_an_index_is_that_of_its_table(scored: list[dict], writer: PromptWriter, tmp_path: Path) -> None:
    rows = prepared(scored, writer)
    write(tmp_path, rows, 100, 100)
    ensure_index(str(tmp_path), MANIFEST)
    write(tmp_path, rows[:10], 100, 100)
    ensure_index(str(tmp_path), MANIFEST)
    assert len(load_index(str(tmp_path)).pairs) == len(rows), "the same content needs no other index"
    ensure_index(str(tmp_path), MANIFEST.model_copy(update={"content": "second"}))
    assert len(load_index(str(tmp_path)).pairs) == 10
    # A build that died leaves no index.json and is repeated.
    (tmp_path / "index" / "index.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_index(str(tmp_path))
    ensure_index(str(tmp_path), MANIFEST.model_copy(update={"content": "second"}))
    assert json.loads((tmp_path / "index" / "index.json").read_text())["totals"]["pairs"] == [6, 2, 2]


def test_training_pairs_need_a_shared_path() -> None:
    with pytest.raises(UserError, match="every node sees"):
        ensure_index("s3://bucket/run/prepared", MANIFEST)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2), st.integers(1, 9), st.booleans()),
        min_size=1,
        max_size=20,
    )
)
def test_sums_are_those_of_the_trees(drawn: list[tuple[int, int, int, int, bool]]) -> None:
    drawn.sort(key=lambda item: item[0])
    pairs = np.array(
        [(0.5, 10 + size, size, 2 * size, one, other, 0, flag) for _, one, other, size, flag in drawn], PAIR
    )
    starts = [row for row, item in enumerate(drawn) if row == 0 or item[0] != drawn[row - 1][0]]
    totals = Totals()
    totals.add(pairs, np.array(starts))
    both: dict[tuple[int, int], int] = {}
    chosen: dict[tuple[int, int], int] = {}
    for tree, one, other, size, flag in drawn:
        for prompts, images in ((both, (one, other)), (chosen, (one,) if flag else ())):
            for image in images:
                prompts[tree, image] = max(prompts.get((tree, image), 0), 10 + size)
    assert totals.packed == sum(both.values()) + sum(3 * item[3] for item in drawn)
    assert totals.packed_chosen == sum(chosen.values()) + sum(item[3] for item in drawn if item[4])
    assert totals.separate == sum(2 * (10 + item[3]) + 3 * item[3] for item in drawn)
    assert totals.pairs == [len(drawn), 0, 0] and totals.weight[0] == 0.5 * len(drawn)
