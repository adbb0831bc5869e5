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
from mmedpo_ray.config.load import load
from mmedpo_ray.datasets.cleaning import clean, infer_answer_type
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.ingest.formats import FORMATS


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("\ufeffThe heart is normal.", "The heart is normal."),
        (" \u200b\ufeff left \u2060", "left"),
        ("\x00\xad\u202aleft\u202c\u2066", "left"),
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
NOISE = Image.effect_noise((40, 40), 50)


def large() -> bytes:
    """A picture whose base64 has many letters, "+" and "/" among them."""
    buffer = io.BytesIO()
    NOISE.save(buffer, "PNG")
    return buffer.getvalue()


LARGE = base64.b64encode(large()).decode()


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
        (f"DATA:image/png;charset=utf-8;base64,{LARGE}", None),
        (f"data:image/png;base64,{LARGE}".replace("+", "%2B"), None),
        (f"data:image/png;base64,{LARGE[:1001]}", "image_undecodable"),
        ({"bytes": LARGE}, None),
        ({"url": f"data:image/png;base64,{TEXT}"}, None),
        (LARGE.rstrip("="), None),
        (LARGE.replace("+", "-").replace("/", "_"), None),
        (LARGE[:1001], "image_undecodable"),
        (LARGE[:1003], "image_undecodable"),
        ("oops" + LARGE, "image_undecodable"),
        (f"b'{LARGE}'", "no_image_name"),
        (f"b'{LARGE[:700]}'", "image_missing"),
        ("C:\\scans\\i1.png", "image_missing"),
        ("data:image/png;base64,!!", "image_undecodable"),
        (TEXT, None),
        ("x" * 5000, "image_undecodable"),
        ("x." * 2500, "no_image_name"),
    ],
)
def test_names_of_images(tmp_path, root, image, reason):
    rows = rows_of(tmp_path, [{"id": 1, "image": image, "conversations": TALK}], "llava_json", "rows.json")
    assert [row.get("drop_reason") for row in rows] == [reason]
    told = f"{rows[0].get('drop_detail')} {rows[0].get('image_uri')}"
    assert len(told.replace(rows[0].get("image_uri") or "", "")) < 600
    assert TEXT[:40] not in told
    assert LARGE[220:300] not in (rows[0].get("drop_detail") or "")


def test_a_path_of_windows_is_called_one(tmp_path, root):
    [row] = rows_of(
        tmp_path, [{"id": 1, "image": "C:\\scans\\i1.png", "conversations": TALK}], "llava_json", "rows.json"
    )
    assert "data.image_folder" in row["drop_detail"]


@pytest.mark.parametrize(
    "mask", [["i1.png"], {"path": "i1.png"}, TEXT, f"data:image/png;base64,{TEXT}", "sub\\a b.png"]
)
def test_masks_are_given_as_images_are(tmp_path, root, mask):
    [row] = rows_of(
        tmp_path,
        [{"id": 1, "image": "i1.png", "mask": mask, "conversations": TALK}],
        "llava_json",
        "rows.json",
    )
    assert Path(row["mask_uri"]).read_bytes() == png()


def test_a_mask_that_climbs_is_refused(tmp_path, root):
    rows = [{"id": 1, "image": "i1.png", "mask": "../../outside.png", "conversations": TALK}]
    assert rows_of(tmp_path, rows, "llava_json", "rows.json")[0]["drop_reason"] == "outside_root"


def test_an_absolute_name_is_what_the_user_wrote(tmp_path, root):
    name = str(tmp_path / "outside.png")
    [row] = rows_of(tmp_path, [{"id": 1, "image": name, "conversations": TALK}], "llava_json", "rows.json")
    assert row.get("drop_reason") is None


def test_r2gen_names_that_climb_are_refused(tmp_path, root):
    study = {"id": "s", "report": "Clear lungs.", "image_path": ["../../../outside.png"]}
    rows = rows_of(tmp_path, {"train": [study]}, "r2gen", "annotation.json")  # type: ignore[arg-type]
    assert rows[0]["drop_reason"] == "outside_root"


@pytest.mark.parametrize("views", ["first", "side_by_side"])
def test_r2gen_images_as_text(tmp_path, root, views):
    study = {
        "id": "s",
        "report": "\ufeffClear lungs.",
        "image_path": [f"data:image/png;base64,{TEXT}", "i1.png"],
    }
    [row] = rows_of(tmp_path, {"train": [study]}, "r2gen", "annotation.json", f"data.views={views}")  # type: ignore[arg-type]
    assert row.get("drop_reason") is None
    assert row["answer"] == "Clear lungs."
    assert Image.open(row["image_uri"]).size == ((3, 3) if views == "first" else (6, 3))


@pytest.mark.parametrize("text", [TEXT, TEXT.encode(), f"data:image/png;base64,{TEXT}"])
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


@pytest.mark.parametrize(
    "form", ["{}.parquet", "{}-0.parquet", "x.{}_a.parquet", "my {} part.parquet", "a{}.parquet"]
)
@pytest.mark.parametrize(
    "word",
    [
        "train",
        "training",
        "test",
        "testing",
        "eval",
        "evaluation",
        "validation",
        "valid",
        "val",
        "dev",
        "contest",
        "tests",
    ],
)
def test_splits_are_those_that_datasets_finds(tmp_path, root, word, form):
    patterns = pytest.importorskip("datasets.data_files")
    name = form.format(word)
    for folder, file in (("root", "train-0.parquet"), ("root", name), ("hub", name)):
        (tmp_path / folder).mkdir(exist_ok=True)
        row = {"image": {"bytes": png(), "path": None}, "question": "Is there a mass?", "answer": "Yes"}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / folder / file)
    [split] = map(str, patterns.get_data_patterns(str(tmp_path / "hub")))
    settings = [
        f"run.folder={tmp_path / 'run'}",
        f"data.root={root}",
        "data.format=hf_parquet",
        "data.test_share=0",
    ]
    reader = FORMATS["hf_parquet"](load(None, settings))
    found = {unit.file: row["split"] for unit in reader.units() for row in reader.samples(unit)}
    assert found[name] == {"validation": "validate"}.get(split, split)


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
