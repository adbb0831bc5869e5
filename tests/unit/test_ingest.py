"""Formats: every row becomes a sample or a dropped row with its reason, whatever the row is."""

from __future__ import annotations

import datetime
import errno
import gzip
import json
import struct
import zlib
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.datasets.cleaning import infer_answer_type
from mmedpo_ray.datasets.row_names import given_name
from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest.formats import FORMATS
from mmedpo_ray.ingest.preference_reader import SortedSamples
from mmedpo_ray.ingest.reader import Reader, draw_split
from mmedpo_ray.io import images, storage
from mmedpo_ray.io.images import load_image, load_rgb
from mmedpo_ray.phantom import world
from mmedpo_ray.tables import schemas

SCHEMA = schemas.with_drop_columns(schemas.SAMPLES)
TWO_FRAMES = {"save_all": True, "append_images": [Image.new("L", (4, 4), 9)]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of three good images, a truncated one, and one that is no image."""
    images = tmp_path / "images"
    images.mkdir()
    for index, mode in enumerate(("L", "RGB", "RGBA")):
        Image.new(mode, (8, 6), 40 * index).save(images / f"{index}.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(images / "cut.png")
    data = (images / "cut.png").read_bytes()
    (images / "cut.png").write_bytes(data[: len(data) // 2])
    (images / "text.png").write_text("no image")
    return tmp_path


def row(
    image: Any = "0.png", question: Any = "<image>\nWhich side?", answer: Any = " Left", **more: Any
) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": 0, "image": image, "conversations": turns, **more}


def config_of(root: Path, source: Any, kind: str, *overrides: str) -> Config:
    (root / "rows.json").write_text(json.dumps(source))
    settings_ = (
        f"data.format={kind}",
        f"data.root={root}",
        "data.train_file=rows.json",
        f"run.folder={root}/run",
    )
    return load(None, (*settings_, *overrides))


def samples_of(reader: Reader) -> list[dict[str, Any]]:
    rows = [sample for unit in reader.units() for sample in reader.samples(unit)]
    if reader.counts_rows:
        assert sum(unit.rows for unit in reader.units()) == len(rows)
    return rows


def read(root: Path, source: Any, kind: str = "llava_json", *overrides: str) -> list[dict[str, Any]]:
    reader = FORMATS[kind](config_of(root, source, kind, *overrides))
    table = schemas.to_table(samples_of(reader), SCHEMA)
    ids = table["sample_id"].to_pylist()
    assert len(ids) == len(set(ids)), "ids must be unique, of kept and dropped rows alike"
    kept = [item for item in table.to_pylist() if item["drop_reason"] is None]
    for item in table.to_pylist():
        assert item["drop_reason"] is None or item["drop_detail"].startswith("rows.json, row ")
    for item in kept:
        assert all(item[field.name] is not None for field in schemas.SAMPLES if not field.nullable)
    return table.to_pylist()


def test_rows_that_are_done_cost_no_decoding(root: Path) -> None:
    turns = row()["conversations"] * 2
    source = [row(), {**row(image="1.png"), "id": 1, "conversations": turns}, {**row(image="2.png"), "id": 2}]
    reader = FORMATS["llava_json"](config_of(root, source, "llava_json"))
    ids = [sample["sample_id"] for sample in samples_of(reader)]
    for image in ("0.png", "1.png", "2.png"):
        (root / "images" / image).unlink()
    [unit] = reader.units()
    assert list(reader.samples(unit, done=set(ids))) == []
    left = list(reader.samples(unit, done=set(ids[:2])))
    assert [item["drop_reason"] for item in left] == ["image_missing", "image_missing"]


def test_json_lines(root: Path) -> None:
    lines = [json.dumps(row()), "", "{broken", json.dumps({**row(), "id": 4})]
    (root / "rows.jsonl").write_text("\n".join(lines))
    config = config_of(root, [], "llava_json", "data.train_file=rows.jsonl")
    kept, broken, last = samples_of(FORMATS["llava_json"](config))
    assert (kept["sample_id"][-2:], last["sample_id"][-2:]) == ("/0", "/4")
    assert (broken["drop_reason"], broken["drop_detail"]) == ("invalid_json", "rows.jsonl, row 1")


def test_a_root_that_is_a_uri(root: Path) -> None:
    name = "a b%é#?.png"
    (root / "images" / "0.png").rename(root / "images" / name)
    config_of(root, [row(image=name), {**row(image="a\0b.png"), "id": 1}], "llava_json")
    config = load(
        None,
        ("data.format=llava_json", f"data.root=file://{root}", "data.train_file=rows.json",
         f"run.folder={root}/r"),
    )  # fmt: skip
    kept, missing = samples_of(FORMATS["llava_json"](config))
    assert load_image(kept["image_uri"]).size == (8, 6)
    assert kept["image_id"] == f"llava_json/{name}"
    assert missing["drop_reason"] == "image_missing"


def test_a_row_becomes_a_sample(root: Path) -> None:
    [sample] = read(root, [row()], "llava_json", "data.test_share=0")
    assert sample["sample_id"] == "llava_json/train/0"
    assert (sample["question"], sample["answer"]) == ("Which side?", "Left")
    assert (sample["split"], sample["task"], sample["answer_type"]) == ("train", "vqa", "open")
    assert sample["image_uri"] == str(root / "images" / "0.png")
    assert sample["image_id"] == "llava_json/0.png"
    assert len(sample["image_sha256"]) == 64


@pytest.mark.parametrize("kind", ["llava_json", "mmedpo_json"])
def test_a_row_may_name_a_lesion_mask(root: Path, kind: str) -> None:
    (root / "images" / "masks").mkdir()
    Image.new("L", (8, 6), 255).save(root / "images" / "masks" / "0.png")
    Image.new("L", (8, 6), 255).save(root / "elsewhere.png")
    names = [
        "masks/0.png",
        " masks/0.png ",
        str(root / "elsewhere.png"),
        "masks/absent.png",
        "",
        None,
        7,
        ["a"],
        "~/0",
    ]
    rows = [{**row(mask=name), "id": number} for number, name in enumerate(names)]
    samples = read(root, [*rows, {**row(), "id": "none"}], kind)
    assert {sample["drop_reason"] for sample in samples} == {None}, "a mask that is missing drops nothing"
    beside = str(root / "images" / "masks" / "0.png")
    assert [sample["mask_uri"] for sample in samples[:3]] == [beside, beside, str(root / "elsewhere.png")]
    assert {sample["mask_uri"] for sample in samples[3:]} == {None}


def test_every_turn_has_the_mask_of_its_row(root: Path) -> None:
    turns = row()["conversations"] + row(question="Is it large?", answer="No")["conversations"]
    source = [{"id": "a", "image": "1.png", "mask": "0.png", "conversations": turns}]
    assert [s["mask_uri"] for s in read(root, source)] == [str(root / "images" / "0.png")] * 2


def test_every_turn_is_a_sample(root: Path) -> None:
    turns = row()["conversations"] + row(question="Is it large?", answer="No")["conversations"]
    samples = read(
        root, [{"id": "a/b", "image": "1.png", "conversations": turns}], "llava_json", "data.name=mine"
    )
    assert [s["answer"] for s in samples] == ["Left", "No"]
    assert [s["answer_type"] for s in samples] == ["open", "closed"]
    assert len({s["image_id"] for s in samples}) == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("just text", "not_an_object"),
        (None, "not_an_object"),
        ({"id": 1}, "malformed_conversation"),
        (row(image="absent.png"), "image_missing"),
        (row(image=""), "no_image_name"),
        (row(image=7), "no_image_name"),
        (row(image="cut.png"), "image_undecodable"),
        (row(image="text.png"), "image_undecodable"),
        (row(image="../images"), "image_missing"),
        (row(image="~abc.png"), "image_missing"),
        (row(image="~$scan.png"), "image_missing"),
        (row(image="~/0.png"), "image_missing"),
        (row(question="<image>\n "), "empty_question"),
        (row(answer="  "), "empty_answer"),
        (row(answer=None), "empty_answer"),
        (row(answer=10**400), None),
        (row(answer=float("inf")), "empty_answer"),
        (row(image="http://host/x.png"), "image_missing"),
        (row(answer="Question: which side?\n left"), "leaked_prompt"),
        (row(answer="Human: which side? GPT: left"), "leaked_prompt"),
        (row(answer="The prior images are not available for comparison."), None),
        (row(answer="The image is not provided."), None),
        (row(answer="QUESTION: pneumonia? FINDINGS: No pneumonia."), None),
        (row(answer="I cannot identify a fracture."), None),
        (row(answer="GPT: 45"), None),
        ({**row(), "conversations": row()["conversations"][:1]}, "malformed_conversation"),
        ({**row(), "conversations": row()["conversations"][::-1]}, "malformed_conversation"),
        ({**row(), "conversations": ["a", "b"]}, "malformed_conversation"),
    ],
)
def test_a_bad_row_beside_a_good_one(root: Path, bad: Any, reason: str) -> None:
    source = [row(), {**bad, "id": 1} if isinstance(bad, dict) else bad]
    good, dropped = read(root, source)
    assert good["drop_reason"] is None
    assert dropped["drop_reason"] == reason
    if reason is not None:
        assert "row 1" in dropped["drop_detail"]
        assert "Which side" not in dropped["drop_detail"]


def test_a_large_image_is_dropped_undecoded(root: Path) -> None:
    [sample] = read(root, [row()], "llava_json", "data.max_pixels=47")
    assert sample["drop_reason"] == "image_too_large"
    [sample] = read(root, [row()], "llava_json", "data.max_image_bytes=20")
    assert sample["drop_reason"] == "image_too_large"
    assert sample["drop_detail"].endswith("bytes, limit 20")
    assert sample["image_uri"] == str(root / "images" / "0.png"), "what to repair"


def test_storage_that_fails_is_no_missing_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files are waited for, then those that fail get one try each; what can be read is kept."""
    for number in range(8):
        Image.new("L", (8, 6), number).save(root / "images" / f"n{number}.png")
    asked: Counter[str] = Counter()
    whole = storage.read_bytes

    def failing(uri: str, max_bytes: int | None = None) -> bytes:
        asked[Path(uri).name] += 1
        if Path(uri).name in ("n1.png", "n7.png"):
            return whole(uri, max_bytes)
        if Path(uri).name == "n0.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        raise OSError("AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate.")

    monkeypatch.setattr(storage, "read_bytes", failing)
    monkeypatch.setattr(images, "WAITS", (0.0, 0.0))
    samples = read(root, [{**row(image=f"n{number}.png"), "id": number} for number in range(8)])
    dropped = {int(s["sample_id"][-1]): s for s in samples if s["drop_reason"] is not None}
    assert sorted(dropped) == [0, 2, 3, 4, 5, 6]
    assert {s["drop_reason"] for s in dropped.values()} == {"image_unreadable"}
    assert dropped[0]["drop_detail"] == f"rows.json, row 0: {root}/images/n0.png: PermissionError"
    assert dropped[2]["drop_detail"] == f"rows.json, row 2: {root}/images/n2.png: OSError", (
        "no words of the store"
    )
    assert dict(asked) == {f"n{number}.png": 3 if number in (2, 3) else 1 for number in range(8)}


def test_names_of_images_are_not_expanded_but_typed_paths_are(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "images" / "0.png").rename(root / "images" / "~0.png")
    [sample] = read(root, [row(image="~0.png")])
    assert sample["image_uri"] == str(root / "images" / "~0.png")
    monkeypatch.setenv("HOME", str(root))
    [sample] = read(root, [row(image="~0.png")], "llava_json", "data.image_folder=~/images", "data.root=~/.")
    assert sample["image_uri"] == str(root / "images" / "~0.png")


def deep_rgb_png() -> bytes:
    """A PNG of 16 bits a colour, which Pillow reads but does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header, rows = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0), (b"\0" + bytes(12)) * 2
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("image", "suffix", "options", "reason"),
    [
        (Image.new("CMYK", (4, 4)), "jpg", {}, None),
        (Image.fromarray(np.arange(16, dtype=np.int32).reshape(4, 4)), "tif", {}, None),
        (Image.fromarray(np.arange(16, dtype=np.float32).reshape(4, 4)), "tif", {}, None),
        (deep_rgb_png(), "png", {}, None),
        (Image.new("LAB", (4, 4)), "tif", {}, "image_undecodable"),
        (Image.new("L", (4, 4)), "tif", TWO_FRAMES, "image_multi_frame"),
        (Image.new("L", (4, 4)), "gif", TWO_FRAMES, "image_multi_frame"),
        (gzip.compress(deep_rgb_png(), mtime=0), "png.gz", {}, "image_undecodable"),
    ],
)  # fmt: skip
def test_kinds_of_images(
    root: Path, image: Any, suffix: str, options: dict[str, Any], reason: str | None
) -> None:
    path = root / "images" / f"a.{suffix}"
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **options)
    [sample] = read(root, [row(image=path.name)])
    assert sample["drop_reason"] == reason
    if reason is None:
        assert load_rgb(sample["image_uri"]).mode == "RGB"


def test_llava_meds_own_key_and_system_prompts(root: Path) -> None:
    """The published LLaVA-Med files spell the key so."""
    turns = [{"from": "system", "value": "You are a radiologist."}, *row()["conversations"]]
    misspelt = {"id": "a", "image": "0.png", "domain": {"mri": True}, "conversatons": turns}
    rows = [misspelt, {"id": "b", "image": "0.png", "conversations": turns}]
    assert [sample["answer"] for sample in read(root, rows)] == ["Left", "Left"]
    for bad in ([turns[0]], [*turns, turns[0]], [turns[1], turns[0], turns[2]], [turns[0], *turns]):
        [sample] = read(root, [{**misspelt, "conversatons": bad}])
        assert sample["drop_reason"] == "malformed_conversation"


def test_a_repeated_id_is_dropped_and_ids_may_be_text_or_number(root: Path) -> None:
    rows = [{**row(), "id": name} for name in (5, "5", "x~1", None, "", True, 2.5, "5~r1", 5.0, 17.0)]
    samples = read(root, rows, "llava_json", "data.test_share=0")
    reasons = [sample["drop_reason"] for sample in samples]
    assert reasons == [None, "duplicate_id", None, None, None, None, None, None, "duplicate_id", None]
    assert samples[-1]["sample_id"] == "llava_json/train/17"


@pytest.mark.parametrize(
    ("given_", "name"),
    [
        (17, "17"),
        (17.0, "17"),
        (-3.0, "-3"),
        (2.5, "2.5"),
        (1e300, "1e+300"),
        (Decimal("17.00"), "17"),
        (Decimal("1.70"), "1.7"),
        (Decimal(10**30), "1" + "0" * 30),
        (b"ab/c", "ab/c"),
        (b"a~b", "a%7Eb"),
        (b"\xff\x00", "ff00"),
        (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (" x ", "x"),
    ],
)
def test_ids_of_any_type(given_: Any, name: str) -> None:
    assert given_name(given_) == name


@pytest.mark.parametrize(
    "given_",
    [
        None,
        True,
        "",
        " ",
        b"",
        float("nan"),
        float("inf"),
        Decimal("NaN"),
        [1],
        {"a": 1},
        datetime.date(2020, 1, 1),
    ],
)
def test_what_is_no_id(given_: Any) -> None:
    assert given_name(given_) is None


def test_one_image_is_in_one_split_only(root: Path) -> None:
    for copy in range(40):
        Image.new("L", (8, 8), copy * 5).save(root / "images" / f"c{copy}.png")
        Image.new("L", (8, 8), copy * 5).save(root / "images" / f"d{copy}.png")
    rows = [
        {**row(image=f"{prefix}{copy}.png"), "id": f"{prefix}{copy}"} for copy in range(40) for prefix in "cd"
    ]
    samples = read(root, rows, "llava_json", "data.test_share=0.4")
    by_content: dict[str, set[str]] = {}
    for sample in samples:
        by_content.setdefault(sample["image_sha256"], set()).add(sample["split"])
    assert all(len(splits) == 1 for splits in by_content.values())
    assert {split for splits in by_content.values() for split in splits} == {"train", "test"}


def test_the_share_of_test_images_is_as_asked() -> None:
    drawn = [draw_split(1, f"{number}", 0.2) for number in range(5000)]
    assert drawn.count("test") / 5000 == pytest.approx(0.2, abs=0.03)
    assert {draw_split(0, "x", 0.0), draw_split(0, "x", 1.0)} == {"train", "test"}


def test_a_test_file_gives_the_test_split(root: Path) -> None:
    (root / "test.json").write_text(json.dumps([row(image="1.png")]))
    reader = FORMATS["llava_json"](config_of(root, [row()], "llava_json", "data.test_file=test.json"))
    assert [(s["split"], s["sample_id"]) for s in samples_of(reader)] == [
        ("train", "llava_json/train/0"),
        ("test", "llava_json/test/0"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[not json", "not valid JSON"),
        ('{"a": 1}', "not a list"),
        ("[]", "empty list"),
        ("\xff", "not valid JSON"),
    ],
)
def test_a_wrong_file_is_the_users_error(root: Path, content: str, message: str) -> None:
    config = config_of(root, [], "llava_json")
    (root / "rows.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        list(FORMATS["llava_json"](config).units())
    (root / "rows.json").unlink()
    with pytest.raises(UserError, match="no annotation file"):
        list(FORMATS["llava_json"](config).units())
    with pytest.raises(UserError, match="no annotation file"):
        FORMATS["llava_json"](config).fingerprint()


@pytest.mark.parametrize(
    ("rejected", "score", "reason"),
    [
        (" Right", 0, None),
        (" Right", 0.4, None),
        (" Right", None, None),
        (" Right", "high", "bad_score"),
        (" Right", 1.5, "bad_score"),
        (" Right", float("nan"), "bad_score"),
        (" ", 0.4, "no_rejected_answer"),
        (None, 0.4, "no_rejected_answer"),
    ],
)
def test_released_pairs(root: Path, rejected: Any, score: Any, reason: str | None) -> None:
    turns = row(answer=rejected)["conversations"]
    source = [row(rejected_conversations=turns, weighted_score=score)]
    reader: Any = FORMATS["mmedpo_json"](config_of(root, source, "mmedpo_json"))
    [unit] = reader.units()
    [sample] = reader.samples(unit)
    [pair] = reader.pairs(unit, {sample["sample_id"]: sample})
    assert pair.get("drop_reason") == reason
    if reason is None:
        assert (pair["chosen"], pair["rejected"], pair["source_score"]) == ("Left", "Right", score)
        assert pair["pair_id"] == f"{sample['sample_id']}:text"
        assert pair["image_uri"] == pair["rejected_image_uri"] == sample["image_uri"]
    [orphan] = reader.pairs(unit, {})
    assert orphan["drop_reason"] == "sample_dropped"


def test_a_released_row_of_several_turns_is_malformed(root: Path) -> None:
    turns = row()["conversations"] * 2
    [sample] = read(root, [{**row(), "conversations": turns}], "mmedpo_json")
    assert sample["drop_reason"] == "malformed_conversation"


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Is there a nodule?", "No, there is none.", "closed"),
        ("is the lesion benign", "yes", "closed"),
        ("Is this a CT or an MRI?", "MRI", "closed"),
        ("Where is the mass?", "Left lung", "open"),
        ("What is seen?", "No abnormality in the lung fields", "open"),
        ("Write a short report for this radiograph.", "Clear.", "report"),
        ("Describe the image.", "A normal chest.", "report"),
        ("Please describe this chest X-ray in detail", "A normal chest.", "report"),
        ("Can you describe the following image for me?", "A normal chest.", "report"),
        ("Give a brief description of the given image.", "A normal chest.", "report"),
        ("Interpret the frontal chest radiograph", "A normal chest.", "report"),
        ("Describe the lesion in the image.", "Round.", "open"),
        ("Describe the image quality.", "Poor.", "open"),
        ("Describe the mass.", "Spiculated.", "open"),
        ("What do you see?", "word " * 30, "report"),
        ("Is the liver normal or not?", "It has a mass", "open"),
    ],
)
def test_kind_of_answer(question: str, answer: str, expected: str) -> None:
    assert infer_answer_type(question, answer) == expected


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "image", "conversations", "from", "value", "weighted_score", "rejected_conversations"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
_TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | _JSON, "value": _JSON})
_ROW = st.fixed_dictionaries(
    {
        "id": _JSON,
        "image": st.sampled_from(["0.png", "cut.png", "a\0b", "x" * 300, "\ud800", "~", "~a.png", "~/a"])
        | _JSON,
        "conversations": st.lists(_TURN, max_size=4) | _JSON,
        "rejected_conversations": st.lists(_TURN, max_size=2) | _JSON,
        "weighted_score": _JSON,
    }
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_ROW | _JSON, min_size=1, max_size=5), st.sampled_from(["llava_json", "mmedpo_json"]))
def test_no_row_breaks_a_reader(root: Path, source: list, kind: str) -> None:
    rows = read(root, source, kind)
    assert len(rows) >= len(source)
    reader = FORMATS[kind](
        load(None, (f"data.format={kind}", f"data.root={root}", "data.train_file=rows.json"))
    )
    if kind == "mmedpo_json":
        by_id = {item["sample_id"]: item for item in rows if item["drop_reason"] is None}
        pairs = [pair for unit in reader.units() for pair in reader.pairs(unit, by_id)]
        assert len(schemas.to_table(pairs, schemas.with_drop_columns(schemas.PAIRS))) == len(source)
        assert len({pair["pair_id"] for pair in pairs}) == len(source)
        in_a_table = SortedSamples(schemas.to_table(by_id.values(), SCHEMA).sort_by("sample_id"))
        assert [pair for unit in reader.units() for pair in reader.pairs(unit, in_a_table)] == pairs, (
            "a table is looked up as a dictionary is"
        )


def test_phantoms_are_those_of_the_generator(tmp_path: Path) -> None:
    config = load(
        None, (f"run.folder={tmp_path}", "data.phantom.images=3", "data.phantom.test_images=2", "run.seed=4")
    )
    reader = FORMATS["phantom"](config)
    samples = samples_of(reader)
    expected = [*world.generate("align", 3, 4, "uniform"), *world.generate("test", 2, 4, "uniform")]
    assert [s["answer"] for s in samples] == [q.answer for case in expected for q in case.questions]
    first_bytes = {s["image_uri"]: Path(s["image_uri"]).read_bytes() for s in samples}
    for uri, case in zip(first_bytes, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(uri)), case.image)
    masks = dict.fromkeys(s["mask_uri"] for s in samples)
    for uri, case in zip(masks, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(uri)) > 0, case.mask)
    assert len({s["sample_id"] for s in samples}) == len(samples)
    assert samples_of(reader) == samples
    assert {uri: Path(uri).read_bytes() for uri in first_bytes} == first_bytes
