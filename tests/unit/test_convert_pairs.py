"""Pairs written for other projects, and read back; TRL's trainer takes its file as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from align_world import write_scored
from PIL import Image

from mmedpo_ray.cli import main
from mmedpo_ray.config.load import load
from mmedpo_ray.convert.preference_pairs import convert_pairs
from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest.formats import FORMATS
from mmedpo_ray.io import images
from mmedpo_ray.tables import schemas

TARGETS = {"trl": "trl", "llama-factory": "llama_factory", "swift": "swift"}


@pytest.fixture
def scored(tmp_path: Path) -> list[dict[str, Any]]:
    """Scored pairs of both kinds; one image is deeper than other decoders read."""
    rows = write_scored(tmp_path / "world", num_images=2)
    deep = tmp_path / "world" / "deep.png"
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900).save(deep)
    for row in rows:
        if row["image_uri"] == rows[0]["image_uri"] and row["kind"] == "text":
            row |= {"image_uri": str(deep), "rejected_image_uri": str(deep)}
    pq.write_table(schemas.to_table(rows, schemas.SCORED), tmp_path / "scored.parquet")
    return rows


def read_back(folder: Path, file: str, format_name: str) -> tuple[list[dict], list[dict]]:
    config = load(
        None,
        [
            f"run.folder={folder / 'run'}",
            f"data.root={folder}",
            f"data.format={format_name}",
            f"data.train_file={file}",
            "data.test_share=0",
        ],
    )
    reader = FORMATS[format_name](config)
    units = list(reader.units())
    samples = [row for unit in units for row in reader.samples(unit)]
    by_id = {row["sample_id"]: row for row in samples if not row.get("drop_reason")}
    return samples, [pair for unit in units for pair in reader.pairs(unit, by_id)]


@pytest.mark.parametrize(
    ("target", "file"),
    [
        ("trl", "out.jsonl"),
        ("trl", "out.json"),
        ("trl", "out.parquet"),
        ("llama-factory", "out.json"),
        ("llama-factory", "out.jsonl"),
        ("swift", "out.jsonl"),
    ],
)
def test_what_is_written_is_read_back(tmp_path, scored, target, file):
    counts = convert_pairs(str(tmp_path / "scored.parquet"), target, tmp_path / file)
    written = [row for row in scored if row["kind"] == "text" or target == "swift"]
    assert counts["written"] == len(written)
    assert counts.get("visual_pair", 0) == len(scored) - len(written)
    samples, pairs = read_back(tmp_path, file, TARGETS[target])
    assert not [row for row in [*samples, *pairs] if row.get("drop_reason")]
    for row, pair in zip(written, pairs, strict=True):
        assert pair["sample_id"].endswith(row["pair_id"])
        assert {key: pair[key] for key in ("kind", "question", "chosen", "rejected")} == {
            key: row[key] for key in ("kind", "question", "chosen", "rejected")
        }
        assert pair["source_score"] == pytest.approx(row["score"])
        for side in ("image_uri", "rejected_image_uri"):
            ours, theirs = (np.asarray(images.load_rgb(each[side])) for each in (row, pair))
            assert (ours == theirs).all()


@pytest.mark.parametrize("file", ["out.jsonl", "out.parquet"])
def test_trl_trains_on_the_file_unchanged(tmp_path, scored, file):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from tiny_llava import build_tiny_llava
    from transformers import AutoModelForImageTextToText

    from mmedpo_ray.models.loading import load_processor

    convert_pairs(str(tmp_path / "scored.parquet"), "trl", tmp_path / file)
    kind = "json" if file.endswith("jsonl") else "parquet"
    rows = datasets.load_dataset(
        kind, data_files=str(tmp_path / file), split="train", cache_dir=str(tmp_path / "cache")
    )
    folder = build_tiny_llava(tmp_path / "model")
    trainer = trl.DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(folder),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trained"),
            per_device_train_batch_size=2,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=None,
        ),
        train_dataset=rows,
        processing_class=load_processor(str(folder)),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    pictures = [images.load_rgb(row["image_uri"]) for row in scored if row["kind"] == "text"]
    wanted = {
        pixels.numpy().tobytes()
        for pixels in trainer.processing_class.image_processor(pictures, return_tensors="pt").pixel_values
    }
    assert {pixels.numpy().tobytes() for pixels in batch["pixel_values"].cpu()} <= wanted
    result = trainer.train()
    assert result.training_loss == pytest.approx(np.log(2), abs=1e-4)


def test_every_row_for_swift_has_the_same_members(tmp_path, scored):
    """It deletes rows without a member that others have."""
    convert_pairs(str(tmp_path / "scored.parquet"), "swift", tmp_path / "both.jsonl")
    text = [row for row in scored if row["kind"] == "text"]
    pq.write_table(schemas.to_table(text, schemas.SCORED), tmp_path / "text.parquet")
    convert_pairs(str(tmp_path / "text.parquet"), "swift", tmp_path / "text.jsonl")
    for name, member in (("both", "rejected_images"), ("text", "rejected_response")):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len({frozenset(row) for row in rows}) == 1
        assert member in rows[0]


def test_llama_factory_finds_the_file_by_its_name(tmp_path, scored):
    (tmp_path / "dataset_info.json").write_text('{"other": {"file_name": "other.json"}}')
    assert (
        main(
            [
                "convert-pairs",
                str(tmp_path / "scored.parquet"),
                "--to",
                "llama-factory",
                "--out",
                str(tmp_path / "mine.json"),
            ]
        )
        == 0
    )
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert info.keys() == {"other", "mine"}
    assert info["mine"]["ranking"] is True
    assert json.loads((tmp_path / "mine.json").read_text())[0].keys() >= set(info["mine"]["columns"].values())


def test_what_cannot_be_written_is_counted_and_refused(tmp_path, scored):
    table = str(tmp_path / "scored.parquet")
    with pytest.raises(UserError):
        convert_pairs(table, "swift", tmp_path / "out.parquet")
    with pytest.raises(UserError):
        convert_pairs(str(tmp_path), "trl", tmp_path / "out.txt")
    for row in scored:
        row["image_uri"] = str(tmp_path / "gone.png")
    pq.write_table(schemas.to_table(scored, schemas.SCORED), table)
    with pytest.raises(UserError):
        convert_pairs(table, "trl", tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("*out.jsonl*"))
    pq.write_table(pa.table({"x": [1]}), table)
    with pytest.raises(UserError):
        convert_pairs(table, "trl", tmp_path / "out.jsonl")


ROW = {"id": "a", "images": ["a.png"]}
TALK = [{"role": "user", "content": "Is there a mass?"}]
YES, NO = [{"role": "assistant", "content": "Yes"}], [{"role": "assistant", "content": "No"}]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a mass?"}]}]


@pytest.mark.parametrize(
    ("format_name", "row"),
    [
        ("trl", {"prompt": TALK, "chosen": YES, "rejected": NO}),
        ("trl", {"prompt": PARTS, "chosen": YES, "rejected": NO}),
        ("trl", {"prompt": "Is there a mass?", "chosen": "Yes", "rejected": "No"}),
        ("trl", {"chosen": TALK + YES, "rejected": TALK + NO}),
        (
            "trl",
            {"prompt": [{"role": "system", "content": "Be brief."}, *TALK], "chosen": YES, "rejected": NO},
        ),
        (
            "llama_factory",
            {
                "conversations": [{"from": "human", "value": "<image>Is there a mass?"}],
                "chosen": {"from": "gpt", "value": "Yes"},
                "rejected": {"from": "gpt", "value": "No"},
            },
        ),
        ("llama_factory", {"messages": TALK, "chosen": YES[0], "rejected": NO[0]}),
        (
            "llama_factory",
            {"instruction": "<image>Is there a mass?", "input": "", "chosen": "Yes", "rejected": "No"},
        ),
        ("swift", {"messages": TALK + YES, "rejected_response": "No"}),
        ("swift", {"messages": TALK + YES, "rejected_messages": TALK + NO}),
        ("swift", {"messages": TALK + YES, "rejected_response": "No", "rejected_images": []}),
        ("swift", {"query": "<image>Is there a mass?", "response": "Yes", "rejected_response": "No"}),
        (
            "trl",
            {
                "prompt": PARTS,
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}],
                "rejected": NO,
            },
        ),
        ("trl", {"prompt": TALK[0], "chosen": YES[0], "rejected": NO[0]}),
        ("trl", {"prompt": "Is there a mass?", "chosen": ["Yes"], "rejected": ["No"]}),
        # As TRL cuts them apart: where they differ, without the space before it.
        ("trl", {"chosen": "Is there a mass? Yes", "rejected": "Is there a mass? No"}),
        ("llama_factory", {"prompt": "Is there a mass?", "chosen": "Yes", "rejected": "No"}),
        (
            "llama_factory",
            {"conversations": None, "messages": TALK, "chosen": YES, "rejected": NO[0], "history": None},
        ),
    ],
)
@pytest.mark.parametrize(
    "image", [["a.png"], "a.png", [{"path": "a.png", "bytes": None}], ["images/a.png"], ["images\\a.png"]]
)
def test_layouts_of_peers(tmp_path, format_name, row, image):
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images" / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", **row, "images": image}) + "\n")
    samples, pairs = read_back(tmp_path, "rows.jsonl", format_name)
    assert (samples[0]["question"], samples[0]["answer"]) == ("Is there a mass?", "Yes")
    assert pairs[0]["rejected"] == "No"
    assert pairs[0]["kind"] == "text"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
    ],
)
@pytest.mark.parametrize("format_name", ["trl", "swift"])
def test_an_image_may_be_a_part_of_the_question(tmp_path, format_name, part):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    asked = {"role": "user", "content": [part, {"type": "text", "text": "Is there a mass?"}]}
    rows = {
        "trl": {"prompt": [asked], "chosen": YES, "rejected": NO, "images": None},
        "swift": {"messages": [asked, *YES], "rejected_response": "No"},
    }
    (tmp_path / "rows.json").write_text(json.dumps([rows[format_name]]))
    samples, pairs = read_back(tmp_path, "rows.json", format_name)
    assert samples[0]["question"] == "Is there a mass?"
    assert Path(samples[0]["image_uri"]) == tmp_path / "a.png"
    assert pairs[0]["rejected"] == "No"


def test_true_and_false_of_peers_are_answers(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    row = {"prompt": "\ufeffIs there a mass?", "chosen": True, "rejected": False}
    (tmp_path / "rows.json").write_text(json.dumps([ROW | row]))
    samples, pairs = read_back(tmp_path, "rows.json", "trl")
    assert (samples[0]["question"], samples[0]["answer"]) == ("Is there a mass?", "yes")
    assert pairs[0]["rejected"] == "no"


@pytest.mark.parametrize(
    ("format_name", "row", "reason"),
    [
        ("trl", {"prompt": TALK + YES + TALK, "chosen": YES, "rejected": NO}, "several_turns"),
        ("trl", {"chosen": TALK + YES, "rejected": YES}, "malformed_conversation"),
        ("trl", {"prompt": TALK, "rejected": NO}, "malformed_conversation"),
        ("trl", {"prompt": TALK, "chosen": YES, "rejected": None}, "no_rejected_answer"),
        ("trl", {"prompt": TALK, "chosen": ["Yes", "No"], "rejected": NO}, "several_answers"),
        ("llama_factory", {"chosen": 1, "rejected": 2}, "empty_question"),
        ("swift", {"messages": TALK + YES}, "no_rejected_answer"),
        (
            "swift",
            {"messages": TALK + YES, "rejected_messages": [{"role": "user", "content": "Where?"}, *NO]},
            "malformed_conversation",
        ),
        (
            "swift",
            {"messages": TALK + YES, "rejected_response": "No", "images": ["a.png", "b.png"]},
            "several_images",
        ),
    ],
)
def test_rows_of_peers_that_are_no_use(tmp_path, format_name, row, reason):
    (tmp_path / "rows.json").write_text(json.dumps([ROW | row]))
    samples, _ = read_back(tmp_path, "rows.json", format_name)
    assert samples[0]["drop_reason"] == reason


@pytest.mark.parametrize(
    ("target", "file"),
    [("trl", "out.jsonl"), ("trl", "out.parquet"), ("llama-factory", "out.json"), ("swift", "out.jsonl")],
)
def test_the_audit_reads_and_cleans_files_of_peers(tmp_path, scored, target, file):
    """One pair has a space before its chosen answer, one is the same on both sides."""
    text = [row for row in scored if row["kind"] == "text"]
    text[0]["chosen"] = f" {text[0]['chosen']}"
    text[1]["rejected"] = text[1]["chosen"]
    pq.write_table(schemas.to_table(scored, schemas.SCORED), tmp_path / "scored.parquet")
    counts = convert_pairs(str(tmp_path / "scored.parquet"), target, tmp_path / file)
    out = tmp_path / "audit.json"
    command = [
        "audit",
        str(tmp_path / file),
        "--out",
        str(out),
        "--fix",
        str(tmp_path / "fixed"),
        "--fail-on",
        "never",
    ]
    assert main(command) == 0
    result = json.loads(out.read_text())
    found = {finding["check"]: finding for finding in result["findings"]}
    assert found["equal_sides"]["count"] == 1
    assert found["untrimmed_text"]["count"] == 1
    (tmp_path / "fixed" / "images").mkdir()
    samples, pairs = read_back(tmp_path / "fixed", file, TARGETS[target])
    assert len(samples) == counts["written"] - 1
    assert not [row for row in pairs if row.get("drop_reason")]
