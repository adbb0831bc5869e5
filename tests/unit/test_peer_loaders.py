"""What `mmedpo convert-pairs` writes, read by the loaders of LLaMA-Factory and ms-swift, where these are
installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from align_world import write_scored

from mmedpo_ray.convert.preference_pairs import convert_pairs
from mmedpo_ray.tables import schemas


@pytest.fixture
def scored(tmp_path: Path) -> list[dict[str, Any]]:
    rows = write_scored(tmp_path / "world", num_images=2)
    pq.write_table(schemas.to_table(rows, schemas.SCORED), tmp_path / "scored.parquet")
    return rows


def test_llama_factory_reads_every_pair(tmp_path, scored):
    converter = pytest.importorskip("llamafactory.data.converter", exc_type=ImportError)
    parser = pytest.importorskip("llamafactory.data.parser", exc_type=ImportError)
    import datasets

    convert_pairs(str(tmp_path / "scored.parquet"), "llama-factory", tmp_path / "mine.json")
    [named] = parser.get_dataset_list(["mine"], str(tmp_path))
    rows = datasets.load_dataset(
        "json",
        data_files=str(tmp_path / named.dataset_name),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    settings = SimpleNamespace(
        media_dir="", streaming=False, preprocessing_num_workers=1, overwrite_cache=True
    )
    found = converter.align_dataset(rows, named, settings, SimpleNamespace(local_process_index=0))
    text = [row for row in scored if row["kind"] == "text"]
    assert [row["_prompt"][0]["content"] for row in found] == [f"<image>{row['question']}" for row in text]
    answers = [[answer["content"] for answer in row["_response"]] for row in found]
    assert answers == [[row["chosen"], row["rejected"]] for row in text]
    assert [row["_images"] for row in found] == [[row["image_uri"]] for row in text]


@pytest.mark.parametrize("kinds", [("text",), ("visual",), ("text", "visual")])
def test_ms_swift_reads_every_pair_with_both_images(tmp_path, scored, kinds, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    swift = pytest.importorskip("swift.dataset", exc_type=ImportError)
    inputs = pytest.importorskip("swift.template.template_inputs", exc_type=ImportError)
    wanted = [row for row in scored if row["kind"] in kinds]
    pq.write_table(schemas.to_table(wanted, schemas.SCORED), tmp_path / "some.parquet")
    convert_pairs(str(tmp_path / "some.parquet"), "swift", tmp_path / "mine.jsonl")
    rows, _ = swift.load_dataset([str(tmp_path / "mine.jsonl")], num_proc=1, shuffle=False)
    assert len(rows) == len(wanted)
    for row, pair in zip(rows, wanted, strict=True):
        both = inputs.TemplateInputs.from_dict(row)
        for side, answer, image in (
            (both.chosen, "chosen", "image_uri"),
            (both.rejected, "rejected", "rejected_image_uri"),
        ):
            assert side.messages[-1]["content"] == pair[answer]
            assert [each["path"] for each in side.images] == [pair[image]]
