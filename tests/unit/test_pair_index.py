"""The prepared table gives the plan of the same pairs in memory, for any files and row groups."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from align_world import align_settings, write_scored
from pairs_in_memory import PairsInMemory, prepare_pairs
from tiny_llava import build_tiny_llava, put_the_image_last

from mmedpo_ray.align.data.batch import Pair
from mmedpo_ray.align.data.pair_index import ensure_index, load_index
from mmedpo_ray.align.data.pair_source import StoredPairs, TablePairs
from mmedpo_ray.align.data.tokenise import COLUMNS, prepare_rows, with_reversed_pairs
from mmedpo_ray.align.packing.trees import TokenSequence, pack
from mmedpo_ray.align.plan.plan import Plan
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.models.loading import load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.manifest import Manifest

MANIFEST = Manifest(stage="prepare", key="test", content="first")


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
    found = prepare_rows(with_reversed_pairs(rows, wrong), writer, ALIGN)
    return sorted(found, key=lambda row: row["tree_key"])


def write(folder: Path, rows: list[dict], rows_per_file: int, rows_per_group: int) -> None:
    for number, start in enumerate(range(0, len(rows), rows_per_file)):
        table = schemas.to_table(rows[start : start + rows_per_file], schemas.PREPARED)
        storage.write_parquet(folder / f"part-{number:05d}.parquet", table, row_group_size=rows_per_group)


@pytest.mark.parametrize(("rows_per_file", "rows_per_group"), [(100, 100), (8, 3), (1, 1), (11, 2)])
def test_files_and_row_groups_may_cut_trees(
    scored: list[dict], writer: PromptWriter, tmp_path: Path, rows_per_file: int, rows_per_group: int
) -> None:
    write(tmp_path, prepared(scored, writer), rows_per_file, rows_per_group)
    ensure_index(str(tmp_path), MANIFEST)
    pairs, dropped = prepare_pairs(
        schemas.to_table(scored, schemas.SCORED),
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
    stored = Plan(StoredPairs(str(tmp_path), writer, ALIGN), ALIGN, seed=3)
    memory = Plan(PairsInMemory(pairs), ALIGN, seed=3)
    table = schemas.to_table(prepared(scored, writer), schemas.PREPARED)
    unwritten = Plan(TablePairs(table, writer, ALIGN), ALIGN, seed=3)
    for step in range(stored.total_steps):
        for rank in range(2):
            batches = stored.micro_batches(step, rank, 2)
            assert batches == memory.micro_batches(step, rank, 2) == unwritten.micro_batches(step, rank, 2)
        assert stored.normaliser(step) == memory.normaliser(step)
    ours, theirs = stored.summary(stored.forwards(1)), memory.summary(memory.forwards(1))
    assert ours == unwritten.summary(unwritten.forwards(1))
    # In memory a reversed pair is a visual one with its weight.
    assert ours.pop("reversed_pairs") == 7 and theirs.pop("reversed_pairs") == 0
    assert ours == theirs


def test_an_image_token_stands_once_in_the_table(scored: list[dict], writer: PromptWriter) -> None:
    for row in prepared(scored, writer):
        assert row["prompt"].count(writer.image_token_id) == 1
        count = writer.num_image_tokens
        assert count is not None and len(writer.widen(row["prompt"], count)) == row["prompt_tokens"] > count


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
    assert json.loads((tmp_path / "index" / "index.json").read_text())["sums"]["pairs"] == [6, 2, 2]


def test_training_pairs_need_a_shared_path() -> None:
    with pytest.raises(UserError, match="every node sees"):
        ensure_index("s3://bucket/run/prepared", MANIFEST)


@pytest.mark.parametrize("is_image_first", [True, False])
def test_sums_are_those_of_the_packed_trees(scored: list[dict], tmp_path: Path, is_image_first: bool) -> None:
    """The table's prompts have one image token, the model's have all; also if the question comes first."""
    folder = build_tiny_llava(tmp_path / "tiny")
    if not is_image_first:
        put_the_image_last(folder)
    writer = PromptWriter(load_processor(str(folder)))
    rows = prepared(scored, writer)
    position = rows[0]["image_position"]
    assert rows[0]["prompt"][position] == writer.image_token_id and (position > 8) != is_image_first
    write(tmp_path, rows, 8, 3)
    ensure_index(str(tmp_path), MANIFEST)
    source = StoredPairs(str(tmp_path), writer, ALIGN)
    packed = packed_chosen = separate = 0
    for start, stop in pairwise(source.index.trees.tolist()):
        pairs = source.load(range(start, stop))
        packed += num_tokens(pairs, both_sides=True)
        packed_chosen += num_tokens([pair for pair in pairs if pair.counts_nll], both_sides=False)
        separate += sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) - 2 for pair in pairs)
    sums = source.index.sums
    assert [*sums["packed"], sums["separate"][0]] == [packed, packed_chosen, separate]
    assert sums["pairs"].tolist() == [21, 7, 7]
    assert sums["weight"][0] == pytest.approx(sum(row["weight"] for row in rows if row["kind"] == "text"))


def num_tokens(pairs: list[Pair], *, both_sides: bool) -> int:
    """Tokens of the packed trees of some pairs, without padding."""
    sides = [(pair.prompt, pair.chosen, pair.image_uri) for pair in pairs]
    if both_sides:
        sides += [(pair.prompt, pair.rejected, pair.rejected_image_uri) for pair in pairs]
    uris = list(dict.fromkeys(uri for _, _, uri in sides))
    sequences = [TokenSequence(prompt, response, uris.index(uri)) for prompt, response, uri in sides]
    packed_trees = pack(sequences, {"pixel_values": torch.zeros(len(uris), 3, 1, 1)}, pad_token_id=0)
    return packed_trees.input_ids.numel() - len(packed_trees.layout.padding)
