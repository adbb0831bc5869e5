"""Questions, answers and names of images as real files write them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmedpo_ray.cli import main
from mmedpo_ray.config import load
from mmedpo_ray.data.ingest import FORMATS
from mmedpo_ray.data.texts import clean, infer_answer_type
from mmedpo_ray.data.unusable import UnusableError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("\ufeffThe heart is normal.", "The heart is normal."),
        (" \u200b\ufeff left \u2060", "left"),
        (True, "yes"),
        (False, "no"),
        (["left"], "left"),
        (["left", "left"], "left"),
        ([True], "yes"),
        ([], ""),
        (2, "2"),
        (None, ""),
        ({"a": 1}, ""),
        ("<image>\nIs it?", "Is it?"),
    ],
)
def test_values_of_answers(value, expected):
    assert clean(value) == expected


def test_several_different_answers_are_refused():
    with pytest.raises(UnusableError) as error:
        clean(["left", "right"])
    assert error.value.reason == "several_answers"


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Which one? A) MRI B) CT", "A", "closed"),
        ("Is this CT, MRI or X-ray?", "MRI", "closed"),
        ("Is there a mass?", "Not seen", "closed"),
        ("Where is the liver?", "Not seen", "open"),
        ("What lesions are there?", "None", "open"),
        ("图中有肺吗？", "有", "closed"),
        ("这是CT还是MRI？", "CT", "closed"),
        ("哪个器官异常？", "肝脏", "open"),
    ],
)
def test_kinds_of_answers(question, answer, expected):
    assert infer_answer_type(question, answer) == expected


def png(value: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 3), value).save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(tmp_path: Path, rows: list[dict], format_name: str, file: str, *settings: str) -> list[dict]:
    config = load(
        None,
        [
            f"run.folder={tmp_path / 'run'}",
            f"data.root={tmp_path / 'root'}",
            f"data.format={format_name}",
            f"data.train_file={file}",
            *settings,
        ],
    )
    path = tmp_path / "root" / file
    if file.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows))
    reader = FORMATS[format_name](config)
    return [row for unit in reader.units() for row in reader.samples(unit)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "images" / "sub").mkdir(parents=True)
    (folder / "images" / "i1.png").write_bytes(png())
    (folder / "images" / "sub" / "a b.png").write_bytes(png())
    (tmp_path / "outside.png").write_bytes(png())
    return folder


TALK = [{"from": "human", "value": "Is there a mass?"}, {"from": "gpt", "value": "Yes"}]
TEXT = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("i1.png", None),
        (["i1.png"], None),
        ([{"path": "i1.png"}], None),
        (["i1.png", "i1.png"], "several_images"),
        ([], "no_image_name"),
        ("sub\\a b.png", None),
        ("sub\\missing.png", "image_missing"),
        ("sub/../i1.png", None),
        ("../images/i1.png", None),
        ("../../outside.png", "outside_root"),
        ("..\\..\\outside.png", "outside_root"),
        ("sub/../../../outside.png", "outside_root"),
        (f"data:image/png;base64,{TEXT}", None),
        (f"data:image/png;base64,{TEXT[:40]}", "image_undecodable"),
        ("data:image/png;base64,!!", "image_undecodable"),
        (TEXT, None),
        ("x" * 5000, "no_image_name"),
    ],
)
def test_names_of_images(tmp_path, root, image, reason):
    rows = rows_of(tmp_path, [{"id": 1, "image": image, "conversations": TALK}], "llava_json", "rows.json")
    assert [row.get("drop_reason") for row in rows] == [reason]
    told = f"{rows[0].get('drop_detail')} {rows[0].get('image_uri')}"
    assert len(told) < 600
    assert TEXT[:40] not in told


def test_an_absolute_name_is_what_the_user_wrote(tmp_path, root):
    name = str(tmp_path / "outside.png")
    [row] = rows_of(tmp_path, [{"id": 1, "image": name, "conversations": TALK}], "llava_json", "rows.json")
    assert row.get("drop_reason") is None


def test_r2gen_names_that_climb_are_refused(tmp_path, root):
    study = {"id": "s", "report": "Clear lungs.", "image_path": ["../../../outside.png"]}
    rows = rows_of(tmp_path, {"train": [study]}, "r2gen", "annotation.json")  # type: ignore[arg-type]
    assert rows[0]["drop_reason"] == "outside_root"


@pytest.mark.parametrize("text", [TEXT, f"data:image/png;base64,{TEXT}"])
def test_parquet_images_as_text(tmp_path, root, text):
    rows = rows_of(
        tmp_path, [{"image": text, "question": "Is there a mass?", "answer": True}], "hf_parquet", "x.parquet"
    )
    assert rows[0].get("drop_reason") is None
    assert rows[0]["answer"] == "yes"
    assert Path(rows[0]["image_uri"]).read_bytes() == png()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("testing-0", "test"),
        ("eval-0", "test"),
        ("evaluation-00000-of-00001", "test"),
        ("test", "test"),
        ("training-0", "train"),
        ("dev-0", "validate"),
        ("validation-0", "validate"),
    ],
)
def test_splits_of_file_names_are_those_of_the_hub(tmp_path, root, name, split):
    row = {"image": {"bytes": png(), "path": None}, "question": "Is there a mass?", "answer": "Yes"}
    for file in (name, "train-0"):
        pq.write_table(pa.Table.from_pylist([row]), root / f"{file}.parquet")
    config = load(
        None,
        [
            f"run.folder={tmp_path / 'run'}",
            f"data.root={root}",
            "data.format=hf_parquet",
            "data.test_share=0",
        ],
    )
    reader = FORMATS["hf_parquet"](config)
    found = {unit.file: row["split"] for unit in reader.units() for row in reader.samples(unit)}
    assert found[f"{name}.parquet"] == split


@pytest.mark.parametrize("command", [[], ["ingest"], ["evaluate"], ["show"], ["convert-pairs"], ["audit"]])
def test_help_in_a_terminal_that_knows_ascii_alone(command, monkeypatch):
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    stream.flush()
    assert end.value.code == 0
    assert b"usage: mmedpo" in buffer.getvalue()
    stream.detach()
