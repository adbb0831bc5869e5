"""SLAKE, VQA-RAD and R2Gen in their publishers' layouts, written small; good rows, bad rows, any rows."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmedpo_ray.config.load import load
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest.formats import FORMATS
from mmedpo_ray.ingest.formats.r2gen import side_by_side
from mmedpo_ray.ingest.reader import Reader
from mmedpo_ray.io import storage
from mmedpo_ray.metrics import METRICS, Answer
from mmedpo_ray.tables import schemas

SCHEMA = schemas.with_drop_columns(schemas.SAMPLES)


def reader_of(root: Path, kind: str, *overrides: str) -> Reader:
    given_ = (f"data.format={kind}", f"data.root={root}", f"run.folder={root}/run")
    return FORMATS[kind](load(None, (*given_, *overrides)))


def read(root: Path, kind: str, *overrides: str) -> list[dict[str, Any]]:
    """All rows, checked for what holds of any input: unique ids, a position for each dropped row, whole kept
    rows."""
    reader = reader_of(root, kind, *overrides)
    rows = [row for unit in reader.units() for row in reader.samples(unit)]
    assert len({row["sample_id"] for row in rows}) == len(rows)
    assert sum(unit.rows for unit in reader.units()) == len(rows)
    for row in schemas.to_table(rows, SCHEMA).to_pylist():
        if row["drop_reason"] is None:
            assert all(row[field.name] is not None for field in schemas.SAMPLES if not field.nullable)
        else:
            assert ", row " in row["drop_detail"]
    return rows


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_image(path: Path, size: tuple[int, int] = (8, 6), mode: str = "L", value: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def reasons(rows: list[dict[str, Any]]) -> dict[str, str | None]:
    """Drop reason by the last parts of the id."""
    return {row["sample_id"].split("/", 1)[1]: row.get("drop_reason") for row in rows}


# ---------------------------------------------------------------------- OmniMedVQA


def omni_row(number: int, **more: Any) -> dict[str, Any]:
    row = {
        "dataset": "ACRIMA", "question_id": f"ACRIMA_{number:04}", "question_type": "Modality Recognition",
        "question": "What imaging technique was employed to obtain this picture?",
        "gt_answer": "Fundus imaging",
        "image_path": "Images/ACRIMA/Im553_g_ACRIMA.png", "option_A": "PET scan", "option_B": "CT scan",
        "option_C": "Blood test", "option_D": "Fundus imaging", "modality_type": "Fundus Photography",
    }  # fmt: skip
    return {key: value for key, value in {**row, **more}.items() if value is not None}


@pytest.fixture
def omnimedvqa(tmp_path: Path) -> Path:
    write_image(tmp_path / "Images/ACRIMA/Im553_g_ACRIMA.png")
    folder = tmp_path / "QA_information/Open-access"
    two = {"option_A": "Yes", "option_B": "No", "option_C": None, "option_D": None, "gt_answer": "No"}
    write_json(folder / "ACRIMA.json", [omni_row(0), omni_row(1, question="Is it normal?", **two)])
    bad = [
        omni_row(2, gt_answer="MRI"),
        omni_row(3, option_A="CT scan"),
        omni_row(4, image_path="Images/b.png"),
    ]
    write_json(folder / "BAD.json", bad)
    return tmp_path


def test_omnimedvqa(omnimedvqa: Path) -> None:
    rows = read(omnimedvqa, "omnimedvqa")
    assert reasons(rows) == {
        "test/ACRIMA_0000": None,
        "test/ACRIMA_0001": None,
        "test/ACRIMA_0002": "malformed_options",
        "test/ACRIMA_0003": "malformed_options",
        "test/ACRIMA_0004": "image_missing",
    }
    assert rows[0]["question"].splitlines()[1:] == [
        "A) PET scan", "B) CT scan", "C) Blood test", "D) Fundus imaging"
    ]  # fmt: skip
    assert {row["answer_type"] for row in rows[:2]} == {"closed"}


def test_rotated_options_put_the_right_one_in_every_place(omnimedvqa: Path) -> None:
    reader = reader_of(omnimedvqa, "omnimedvqa", "data.rotate_options=true")
    rows = [row for unit in reader.units() for row in reader.samples(unit) if "drop_reason" not in row]
    assert [row["sample_id"].split("_")[1] for row in rows] == [
        "0000~t0", "0000~t1", "0000~t2", "0000~t3", "0001~t0", "0001~t1"
    ]  # fmt: skip
    metric = METRICS["closed_accuracy"]
    for rows_of, letters in ((rows[:4], "DCBA"), (rows[4:], "BA")):
        for row, letter in zip(rows_of, letters, strict=True):
            said = [*"ABCD"[: len(letters)], row["answer"]]
            right = metric.of([Answer(row["answer"], text, row["question"]) for text in said])[:, 0]
            assert [text for text, hit in zip(said, right, strict=True) if hit] == [letter, row["answer"]]


# ---------------------------------------------------------------------- SLAKE


def slake_row(qid: Any, image: Any = "xmlab1/source.jpg", **more: Any) -> dict[str, Any]:
    row = {
        "img_id": 1, "img_name": image, "question": "Is the lung healthy?", "answer": "No", "q_lang": "en",
        "location": "Lung", "modality": "X-Ray", "answer_type": "CLOSED", "base_type": "vqa",
        "content_type": "Abnormality", "triple": ["vhead", "_", "_"], "qid": qid,
    }  # fmt: skip
    return {**row, **more}


@pytest.fixture
def slake(tmp_path: Path) -> Path:
    for number in (1, 2, 3):
        write_image(tmp_path / f"imgs/xmlab{number}/source.jpg", value=number)
    write_image(tmp_path / "imgs/xmlab1/mask.png")
    chinese = slake_row(2, question="肺部健康吗?", answer="不", q_lang="zh")
    train = [slake_row(0), slake_row(1, answer="Left lung", answer_type="OPEN"), chinese, slake_row(1)]
    write_json(tmp_path / "train.json", train)
    write_json(tmp_path / "validate.json", [slake_row(4, "xmlab2/source.jpg")])
    write_json(tmp_path / "test.json", [slake_row(5, "xmlab3/source.jpg"), slake_row(6, "xmlab9/source.jpg")])
    return tmp_path


def test_slake(slake: Path) -> None:
    rows = read(slake, "slake")
    assert reasons(rows) == {
        "train/0": None,
        "train/1": None,
        "train/2": "other_language",
        "train/1~r3": "duplicate_id",
        "validate/4": None,
        "test/5": None,
        "test/6": "image_missing",
    }
    closed, open_ = rows[0], rows[1]
    assert (closed["answer_type"], open_["answer_type"]) == ("closed", "open"), "as stated, not as inferred"
    assert closed["image_id"] == open_["image_id"] == "slake/xmlab1/source.jpg"
    assert closed["mask_uri"] == str(slake / "imgs/xmlab1/mask.png")
    kept = {row["sample_id"]: row for row in rows if "drop_reason" not in row}
    assert kept["slake/validate/4"]["split"] == "validate"
    assert kept["slake/test/5"]["mask_uri"] is None


def test_a_repeated_id_names_the_row_that_has_it_though_that_row_is_unusable(slake: Path) -> None:
    write_json(slake / "train.json", [slake_row(1, "xmlab9/source.jpg"), slake_row(1)])
    details = {row["sample_id"]: row.get("drop_detail") for row in read(slake, "slake")}
    assert details["slake/train/1"].startswith("train.json, row 0: ")
    assert details["slake/train/1~r1"] == "train.json, row 1: its id is that of an earlier row, slake/train/1"
    (slake / "test.json").unlink()
    held_out = reader_of(slake, "slake", "data.test_share=0.5")
    details = {
        row["sample_id"]: row.get("drop_detail")
        for unit in held_out.units()
        for row in held_out.samples(unit)
    }
    assert details["slake/train/1~r1"].endswith("an earlier row, slake/train/1 or slake/test/1")


def test_slake_in_other_languages(slake: Path) -> None:
    chinese = reasons(read(slake, "slake", "data.language=zh"))
    assert (chinese["train/0"], chinese["train/2"]) == ("other_language", None)
    assert reasons(read(slake, "slake", "data.language=all"))["train/2"] is None
    write_json(slake / "train.json", [{**slake_row(0), "q_lang": language} for language in (" EN", None)])
    assert list(reasons(read(slake, "slake")).values())[:2] == [None, "duplicate_id"]


def test_slake_without_some_files(slake: Path) -> None:
    (slake / "validate.json").unlink()
    assert not any("validate" in key for key in reasons(read(slake, "slake")))
    (slake / "test.json").unlink()
    held_out = reader_of(slake, "slake", "data.test_share=1.0")
    rows = [row for unit in held_out.units() for row in held_out.samples(unit)]
    assert {row.get("split") for row in rows} == {"test", None}, "no test part: images are held out"
    with pytest.raises(UserError, match=r"no annotation file .*mine\.json"):
        read(slake, "slake", "data.test_file=mine.json")
    (slake / "train.json").unlink()
    with pytest.raises(UserError, match=r"no annotation file .*train\.json"):
        reader_of(slake, "slake").fingerprint()


@pytest.mark.parametrize("named", [False, True])
def test_a_mask_that_cannot_be_asked_for_is_no_missing_mask(
    slake: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    exists = storage.exists

    def refuses(uri: str) -> bool:
        if str(uri).endswith("mask.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return exists(uri)

    monkeypatch.setattr(storage, "exists", refuses)
    if named:
        write_json(slake / _RAD_FILE, [rad_row(0, image_name="source.jpg", mask="mask.png")])
    folder = f"data.image_folder={slake / 'imgs' / 'xmlab1'}"
    first = read(slake, "vqa_rad", folder)[0] if named else read(slake, "slake")[0]
    place = f"{_RAD_FILE if named else 'train.json'}, row 0"
    assert first["drop_reason"] == "image_unreadable"
    assert first["image_uri"] == str(slake / "imgs/xmlab1/mask.png")
    assert first["drop_detail"] == f"{place}: {first['image_uri']}: PermissionError"


def test_a_slake_row_may_name_another_mask(slake: Path) -> None:
    write_image(slake / "imgs/xmlab1/lesion.png")
    masks = ("xmlab1/lesion.png", "xmlab1/absent.png")
    write_json(slake / "train.json", [slake_row(number, mask=mask) for number, mask in enumerate(masks)])
    rows = read(slake, "slake")
    assert [Path(row["mask_uri"]).name for row in rows[:2]] == ["lesion.png", "mask.png"]


# ---------------------------------------------------------------------- VQA-RAD

_RAD_FILE = "VQA_RAD Dataset Public.json"


def rad_row(qid: Any, phrase: Any = "freeform", **more: Any) -> dict[str, Any]:
    row = {
        "qid": qid, "phrase_type": phrase, "qid_linked_id": "03f451ca", "image_case_url": "https://medpix",
        "image_name": "synpic1.jpg",
        "image_organ": "HEAD", "evaluation": "not evaluated", "question": "How many lesions are seen?",
        "question_rephrase": "NULL",
        "question_relation": "NULL", "question_frame": "NULL", "question_type": "COUNT", "answer": 2,
        "answer_type": "OPEN ",
    }  # fmt: skip
    return {**row, **more}


@pytest.mark.parametrize("folder", ["VQA_RAD Image Folder", "images"])
def test_vqa_rad(tmp_path: Path, folder: str) -> None:
    write_image(tmp_path / folder / "synpic1.jpg")
    yes = rad_row("2", "test_para", question="Is there a mass?", answer="Yes", answer_type="CLOSED ")
    write_json(
        tmp_path / _RAD_FILE, [rad_row(1), yes, rad_row(3, "test_freeform"), rad_row(2), rad_row(5, "para")]
    )
    rows = read(tmp_path, "vqa_rad")
    assert reasons(rows) == {
        "train/1": None,
        "test/2": None,
        "test/3": None,
        "train/2~r3": "duplicate_id",
        "train/5": None,
    }
    assert (rows[0]["answer"], rows[0]["answer_type"], rows[1]["answer_type"]) == ("2", "open", "closed")
    assert rows[0]["image_uri"] == str(tmp_path / folder / "synpic1.jpg")


def test_vqa_rad_rows_may_name_masks(tmp_path: Path) -> None:
    for name in ("synpic1.jpg", "masks/synpic1.png"):
        write_image(tmp_path / "images" / name)
    named = [rad_row(1, mask="masks/synpic1.png"), rad_row(2, mask="masks/absent.png"), rad_row(3)]
    write_json(tmp_path / _RAD_FILE, named)
    found = [row["mask_uri"] for row in read(tmp_path, "vqa_rad")]
    assert found == [str(tmp_path / "images/masks/synpic1.png"), None, None]


def test_vqa_rad_at_a_uri_and_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no annotation file .*VQA_RAD Dataset Public"):
        read(tmp_path, "vqa_rad")
    write_image(tmp_path / "VQA_RAD Image Folder" / "synpic1.jpg")
    write_json(tmp_path / _RAD_FILE, [rad_row(1)])
    reader = FORMATS["vqa_rad"](load(None, ("data.format=vqa_rad", f"data.root=file://{tmp_path}")))
    [row] = [row for unit in reader.units() for row in reader.samples(unit)]
    assert row["image_uri"] == f"file://{tmp_path}/VQA_RAD%20Image%20Folder/synpic1.jpg"


def test_vqa_rad_split_by_files(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "synpic1.jpg")
    write_json(tmp_path / "train.json", [rad_row(1, "test_para")])
    write_json(tmp_path / "test.json", [rad_row(1)])
    rows = read(tmp_path, "vqa_rad", "data.train_file=train.json", "data.test_file=test.json")
    assert [row["split"] for row in rows] == ["train", "test"]


def test_real_vqa_rad_rows(shared_data: Path, tmp_path: Path) -> None:
    """The released sample rows, put back into the official layout."""
    source = json.loads((shared_data / "vqa_rad_sample" / "rows.json").read_text())
    turns = [[turn["value"] for turn in row["conversations"]] for row in source]
    official = [
        rad_row(row["id"], image_name=row["image"], question=asked.removeprefix("<image>\n"), answer=said)
        for row, (asked, said) in zip(source, turns, strict=True)
    ]
    write_json(tmp_path / _RAD_FILE, official)
    rows = read(tmp_path, "vqa_rad", f"data.image_folder={shared_data / 'vqa_rad_sample' / 'images'}")
    found = list(reasons(rows).values())
    assert (len(found), found.count(None), found.count("leaked_prompt")) == (162, 159, 3)
    assert {row["answer_type"] for row in rows if "drop_reason" not in row} == {"open"}


# ---------------------------------------------------------------------- R2Gen


def study(name: Any, *paths: Any, **more: Any) -> dict[str, Any]:
    return {"id": name, "report": "The heart is normal in size .", "image_path": list(paths), **more}


@pytest.fixture
def iu_xray(tmp_path: Path) -> Path:
    write_image(tmp_path / "images/CXR1/0.png", (10, 20), value=200)
    write_image(tmp_path / "images/CXR1/1.png", (10, 10), value=50)
    write_image(tmp_path / "images/p10/s5/a.png", (5, 5), "RGB")
    annotation = {
        "train": [study("CXR1", "CXR1/0.png", "CXR1/1.png"), study("CXR2", "CXR2/0.png", "CXR2/1.png")],
        "val": [study("CXR1", "CXR1/1.png", report=" ")],
        "test": [study("a", "p10/s5/a.png", study_id=5, subject_id=10, split="test")],
        "comment": "none of ours",
        "extra": [study("x", "CXR1/0.png")],
    }
    write_json(tmp_path / "annotation.json", annotation)
    return tmp_path


def test_r2gen(iu_xray: Path) -> None:
    rows = read(iu_xray, "r2gen", "data.report_instruction=Describe.")
    assert reasons(rows) == {
        "train/CXR1": None,
        "train/CXR2": "image_missing",
        "validate/CXR1": "empty_answer",
        "test/a": None,
        "extra/x": "unknown_split",
    }
    first = rows[0]
    assert (first["task"], first["answer_type"], first["question"]) == ("report", "report", "Describe.")
    assert first["image_uri"] == str(iu_xray / "images/CXR1/0.png")
    assert rows[1]["drop_detail"].startswith("annotation.json, train, row 1: ")
    with pytest.raises(UserError, match=r"data\.test_file has no place"):
        read(iu_xray, "r2gen", "data.test_file=test.json")


def test_r2gen_views_side_by_side(iu_xray: Path) -> None:
    rows = read(iu_xray, "r2gen", "data.views=side_by_side")
    first, missing, single = rows[0], rows[1], rows[3]
    assert Path(first["image_uri"]).is_relative_to(iu_xray / "run" / "raw")
    pixels = np.asarray(Image.open(first["image_uri"]))
    assert pixels.shape == (20, 10 + 20)
    assert (pixels[:, :10] == 200).all()
    assert (pixels[:, 10:] == 50).all()
    assert missing["drop_reason"] == "image_missing"
    assert single["image_uri"] == str(iu_xray / "images/p10/s5/a.png"), "one view needs no composite"
    assert read(iu_xray, "r2gen", "data.views=side_by_side") == rows
    small = read(iu_xray, "r2gen", "data.views=side_by_side", "data.max_pixels=599")
    assert small[0]["drop_reason"] == "image_too_large"


@pytest.mark.parametrize("views", ["first", "side_by_side"])
def test_r2gen_studies_may_name_masks(iu_xray: Path, views: str) -> None:
    write_image(iu_xray / "images/CXR1/0_mask.png", (10, 20))
    masks = ["CXR1/0_mask.png", ["CXR1/0_mask.png", "CXR1/1_mask.png"], "CXR1/absent.png", [], [7]]
    studies = [study(f"s{i}", "CXR1/0.png", "CXR1/1.png", mask=mask) for i, mask in enumerate(masks)]
    write_json(iu_xray / "annotation.json", {"train": studies})
    rows = read(iu_xray, "r2gen", f"data.views={views}")
    assert {row.get("drop_reason") for row in rows} == {None}
    assert [row["mask_uri"] for row in rows] == [str(iu_xray / "images/CXR1/0_mask.png")] * 2 + [None] * 3


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 40),
            st.integers(1, 40),
            st.sampled_from(["1", "L", "I;16", "RGB", "RGBA", "P", "LA"]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_side_by_side_keeps_every_view(views: list[tuple[int, int, str]]) -> None:
    images = [Image.new(mode, (width, height)) for width, height, mode in views]
    result = side_by_side(images, 10**6)
    tallest = max(height for _, height, _ in views)
    assert result.height == tallest
    assert result.width == sum(max(1, round(width * tallest / height)) for width, height, _ in views)
    assert result.mode == ("L" if all(mode in ("1", "L", "I;16") for *_, mode in views) else "RGB")
    with pytest.raises(UnusableError):
        side_by_side(images, result.width * result.height - 1)


# ---------------------------------------------------------------------- any row of any format

_TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["\ud800", "\0", "\u202eabc", "train", "é" * 90, "~", "~$x"]
)
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_IDS = st.sampled_from([0, "0", "a~b", "a%7Eb", "~r1", " ", "\ud800", True]) | _ANY
_NAME = (
    st.sampled_from(
        [
            "good.png",
            "text.png",
            "absent.png",
            ".",
            "../..",
            "x" * 300,
            "a\0b",
            "s3x://b/c",
            "~",
            "~abc.png",
            "~/a",
        ]
    )
    | _ANY
)


def _row_of(keys: dict[str, Any]) -> st.SearchStrategy:
    """A row whose members are right or anything, or missing."""
    return st.fixed_dictionaries({}, optional=keys)


_TALK = {
    "mask": _NAME,
    "question": st.just("Is it?") | _ANY,
    "answer": st.just("Yes") | _ANY,
    "answer_type": st.just("OPEN ") | _ANY,
}
_ROWS = {
    "slake": _row_of({**_TALK, "qid": _IDS, "img_name": _NAME, "q_lang": st.just("en") | _ANY}),
    "vqa_rad": _row_of(
        {**_TALK, "qid": _IDS, "image_name": _NAME, "phrase_type": st.just("test_para") | _ANY}
    ),
    "r2gen": _row_of(
        {"id": _IDS, "report": st.just("Clear.") | _ANY, "image_path": st.lists(_NAME, max_size=3) | _ANY,
         "mask": st.lists(_NAME, max_size=2) | _NAME}
    ),
}  # fmt: skip
_FILES = {
    "max_examples": 50,
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for folder in ("images", "imgs"):
        write_image(tmp_path / folder / "good.png")
        (tmp_path / folder / "text.png").write_text("no image")
    return tmp_path


@pytest.mark.parametrize("kind", ["slake", "vqa_rad"])
def test_any_row_is_kept_or_dropped_once(pictures: Path, kind: str) -> None:
    @settings(**_FILES)
    @given(st.lists(_ROWS[kind] | _ANY, min_size=1, max_size=6), st.booleans())
    def check(source: list, lines: bool) -> None:
        if lines:
            name = "rows.jsonl"
            (pictures / name).write_text("\n".join(map(json.dumps, source)))
        else:
            name = "rows.json"
            write_json(pictures / name, source)
        assert len(read(pictures, kind, f"data.train_file={name}")) == len(source)

    check()


def test_any_study_is_kept_or_dropped_once(pictures: Path) -> None:
    names = st.sampled_from(["train", "val", "test", "other", "", "\ud800"])

    @settings(**_FILES)
    @given(
        st.dictionaries(
            names, st.lists(_ROWS["r2gen"] | _ANY, min_size=1, max_size=4), min_size=1, max_size=3
        ),
        st.sampled_from(["first", "side_by_side"]),
    )
    def check(sections: dict[str, list], views: str) -> None:
        write_json(pictures / "annotation.json", sections)
        rows = read(pictures, "r2gen", f"data.views={views}")
        assert len(rows) == sum(map(len, sections.values()))

    check()
