"""Hugging Face style Parquet: images in a column become files, once each; any row is kept or dropped once."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmedpo_ray.config.load import load
from mmedpo_ray.datasets import parquet_rows
from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest import annotations
from mmedpo_ray.ingest.formats import FORMATS
from mmedpo_ray.ingest.reader import Reader, Unit
from mmedpo_ray.io.images import load_image
from mmedpo_ray.tables import schemas

SCHEMA = schemas.with_drop_columns(schemas.SAMPLES)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (6, 4), value).save(buffer, format="PNG")
    return buffer.getvalue()


def reader_of(root: Path | str, *overrides: str, run: Path | str | None = None) -> Reader:
    return FORMATS["hf_parquet"](
        load(
            None, ("data.format=hf_parquet", f"data.root={root}", f"run.folder={run or root}/run", *overrides)
        )
    )


def read(root: Path | str, *overrides: str, run: Path | str | None = None) -> list[dict[str, Any]]:
    reader = reader_of(root, *overrides, run=run)
    rows = [row for unit in reader.units() for row in reader.samples(unit)]
    assert len({row["sample_id"] for row in rows}) == len(rows)
    assert sum(unit.rows for unit in reader.units()) == len(rows)
    for row in schemas.to_table(rows, SCHEMA).to_pylist():
        if row["drop_reason"] is None:
            assert all(row[field.name] is not None for field in schemas.SAMPLES if not field.nullable)
        else:
            assert ".parquet, row " in row["drop_detail"]
    return rows


def write(
    path: Path, rows: list[dict[str, Any]], row_group_size: int = 2, image: pa.DataType = IMAGE
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    images = pa.array([row["image"] for row in rows], image)
    table = table.set_column(table.column_names.index("image"), "image", images)
    pq.write_table(table, path, row_group_size=row_group_size)


def row(value: int = 1, question: Any = "Is it?", answer: Any = "Yes", **more: Any) -> dict[str, Any]:
    return {"image": {"bytes": png(value), "path": None}, "question": question, "answer": answer, **more}


@pytest.mark.parametrize("folder", ["", "data"])
def test_files_give_the_split_and_images_are_written_once(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder / "train-00000-of-00002.parquet", [row(1), row(1), row(2), row(1, answer="")])
    write(tmp_path / folder / "train-00001-of-00002.parquet", [row(2)])
    write(tmp_path / folder / "validation-00000-of-00001.parquet", [row(3)])
    write(tmp_path / folder / "test-00000-of-00001.parquet", [row(4)])
    rows = read(tmp_path)
    assert [item.get("split") for item in rows] == [
        "test",
        "train",
        "train",
        "train",
        None,
        "train",
        "validate",
    ]
    dropped = rows[4]
    prefix = f"{folder}/" if folder else ""
    assert dropped["drop_reason"] == "empty_answer"
    assert dropped["drop_detail"] == f"{prefix}train-00000-of-00002.parquet, row 3"
    assert rows[1]["image_uri"] == rows[2]["image_uri"] != rows[3]["image_uri"] == rows[5]["image_uri"]
    written = [path for path in (tmp_path / "run" / "raw").rglob("*") if path.is_file()]
    assert sorted(path.read_bytes() for path in written) == sorted(map(png, (1, 2, 3, 4)))
    assert load_image(rows[0]["image_uri"]).getpixel((0, 0)) == 4
    assert read(tmp_path) == rows


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_an_image_column_of_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    source = [{**row(), "image": png(7)}, {**row(), "image": b"no image"}, {**row(), "image": None}]
    write(tmp_path / "a.parquet", source, image=kind)
    rows = read(tmp_path, "data.test_share=0")
    assert [item.get("drop_reason") for item in rows] == [None, "image_undecodable", "no_image_name"]
    assert rows[0]["split"] == "train"
    assert read(tmp_path, "data.max_pixels=23")[0]["drop_reason"] == "image_too_large"
    assert read(tmp_path, "data.max_image_bytes=20")[0]["drop_reason"] == "image_too_large"


def test_an_image_column_of_paths(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png(7))
    write(
        tmp_path / "x.parquet", [{**row(), "image": "a.png"}, {**row(), "image": "b.png"}], image=pa.string()
    )
    kept, missing = read(tmp_path, "data.image_folder=pictures")
    assert kept["image_uri"] == str(tmp_path / "pictures" / "a.png")
    assert missing["drop_reason"] == "image_missing"
    write(tmp_path / "x.parquet", [{**row(), "image": {"bytes": None, "path": "pictures/a.png"}}])
    assert read(tmp_path)[0]["image_uri"] == kept["image_uri"]


_MASKED = "data.columns.mask=lesion"


def write_masks(path: Path, masks: list[Any], kind: pa.DataType) -> None:
    table = pa.Table.from_pylist([row(number) for number in range(len(masks))])
    pq.write_table(table.append_column("lesion", pa.array(masks, kind)), path)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), IMAGE])
def test_a_mask_column_of_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    masks = [png(255), png(254), png(255), b"no image", b"", None]
    structs = [None if mask is None else {"bytes": mask, "path": "m.png"} for mask in masks]
    write_masks(tmp_path / "a.parquet", structs if kind == IMAGE else masks, kind)
    rows = read(tmp_path, _MASKED)
    assert {item.get("drop_reason") for item in rows} == {None}
    first, second, third, broken, empty, absent = (item["mask_uri"] for item in rows)
    assert first == third != second
    assert Path(first).is_relative_to(tmp_path / "run" / "raw")
    assert [load_image(uri).getpixel((0, 0)) for uri in (first, second)] == [255, 254]
    assert Path(broken).read_bytes() == b"no image", "what is wrong with a mask is said where it is used"
    assert empty is absent is None
    assert {item["mask_uri"] for item in read(tmp_path)} == {None}, "no column is named"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), IMAGE])
def test_a_mask_column_of_paths(tmp_path: Path, kind: pa.DataType) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "m.png").write_bytes(png(255))
    names = ["m.png", " m.png", "absent.png", " ", None, "../../../nothing"]
    structs = [None if name is None else {"bytes": None, "path": name} for name in names]
    write_masks(tmp_path / "a.parquet", structs if kind == IMAGE else names, kind)
    rows = read(tmp_path, _MASKED, "data.image_folder=pictures")
    *kept, outside = rows
    assert {item.get("drop_reason") for item in kept} == {None}
    assert outside["drop_reason"] == "outside_root"
    expected = str(tmp_path / "pictures" / "m.png")
    assert [item["mask_uri"] for item in kept] == [expected, expected, None, None, None]


@pytest.mark.parametrize("kind", [pa.int64(), pa.list_(pa.string()), pa.bool_()])
def test_a_mask_column_of_another_type(tmp_path: Path, kind: pa.DataType) -> None:
    write_masks(tmp_path / "a.parquet", [None, None], kind)
    assert {item["mask_uri"] for item in read(tmp_path, _MASKED)} == {None}
    value = {pa.int64(): 7, pa.bool_(): True}.get(kind, ["m.png"])
    write_masks(tmp_path / "a.parquet", [value, None], kind)
    assert {item["mask_uri"] for item in read(tmp_path, _MASKED)} == {None}


def test_a_mask_column_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [row()])
    with pytest.raises(UserError, match=r"no column 'lesion' \(data\.columns\.mask\)"):
        read(tmp_path, _MASKED)


def test_columns_by_name_and_repeated_ids(tmp_path: Path) -> None:
    def named(key: Any, **more: Any) -> dict[str, Any]:
        item = row(more.pop("value", 1), key=key, kind="OPEN", patient="p1", **more)
        return {"query": item.pop("question"), **item}

    write(tmp_path / "train-0.parquet", [named(5), named(6), named(None), named(5)])
    write(tmp_path / "train-1.parquet", [named(6), named(7)])
    write(tmp_path / "test-0.parquet", [named(5)])
    columns = ["question=query", "sample_id=key", "image_id=patient", "answer_type=kind"]
    rows = read(tmp_path, *(f"data.columns.{item}" for item in columns))
    assert {item["sample_id"].removeprefix("hf_parquet/"): item.get("drop_reason") for item in rows} == {
        "test/5": None,
        "train/5": None,
        "train/6": None,
        "train/~train-0/2": None,
        "train/5~r3": "duplicate_id",
        "train/6~r0": "duplicate_id",
        "train/7": None,
    }
    details = {item["sample_id"]: item.get("drop_detail") for item in rows}
    assert details["hf_parquet/train/6~r0"] == (
        "train-1.parquet, row 0: its id is that of an earlier row, hf_parquet/train/6"
    )
    assert {item.get("answer_type") for item in rows} == {"open", None}
    assert {item["image_id"] for item in rows if "image_id" in item} == {"hf_parquet/p1"}
    with pytest.raises(UserError, match=r"no column 'question' \(data\.columns\.question\); it has query"):
        read(tmp_path)


def test_one_image_is_in_one_split_only(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row(number % 50) for number in range(200)], row_group_size=30)
    splits: dict[str, set[str]] = {}
    for item in read(tmp_path, "data.test_share=0.4"):
        splits.setdefault(item["image_id"], set()).add(item["split"])
    assert len(splits) == 50
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "test"}


def test_units_are_row_groups_and_nothing_done_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotations, "ROWS_PER_UNIT", 4)
    write(tmp_path / "train.parquet", [row(number) for number in range(11)], row_group_size=2)
    reader = reader_of(tmp_path)
    units = list(reader.units())
    assert [(unit.start, unit.stop, unit.position, unit.rows) for unit in units] == [
        (0, 2, 0, 4),
        (2, 4, 4, 4),
        (4, 6, 8, 3),
    ]
    ids = {item["sample_id"] for item in read(tmp_path)}
    assert list(reader.samples(units[1], done=ids)) == []


def test_a_large_row_group_is_shared_and_read_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the sizes, every row is in one unit, and the units hold the same samples as the whole
    would."""
    source = [row(number % 7, question=f"Is it {number}?", key=number % 90) for number in range(100)]
    write(tmp_path / "train.parquet", source, row_group_size=60)
    keyed = "data.columns.sample_id=key"
    monkeypatch.setattr(annotations, "ROWS_PER_UNIT", 10)
    whole = read(tmp_path, keyed)
    assert len(list(reader_of(tmp_path, keyed).units())) == 2
    assert sum(item.get("drop_reason") == "duplicate_id" for item in whole) == 10
    for least, most, units in ((20, 8, [20, 20, 20, 20, 20]), (1, 3, [20, 20, 20, 13, 13, 14])):
        monkeypatch.setattr(parquet_rows, "_ROWS_OF_A_SHARE", least)
        monkeypatch.setattr(parquet_rows, "_MOST_SHARES", most)
        reader = reader_of(tmp_path, keyed)
        found = list(reader.units())
        assert [unit.rows for unit in found] == units
        assert [item for unit in found for item in reader.samples(unit)] == whole


def test_many_repeated_ids_are_looked_up_at_once() -> None:
    many = Unit("a.parquet", None, "train", 0, 1, 0, 200_000, list(range(1, 200_000)))
    started = time.process_time()
    assert sum(position in many.again for position in range(200_000)) == 199_999
    assert time.process_time() - started < 2


def test_a_damaged_row_group_drops_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    write(path, [row(number, question=f"Is it {number}?") for number in range(6)])
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    reader = reader_of(tmp_path)
    [unit] = reader.units()
    found = [item.get("drop_reason") for item in reader.samples(unit)]
    assert len(found) == 6
    assert found[-1] == "unreadable_row_group"
    assert read(tmp_path)[-1]["drop_detail"].startswith("train.parquet, row 5: row groups 0 to 2")


@pytest.mark.parametrize("ids", [False, True])
def test_storage_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: bool) -> None:
    write(tmp_path / "train.parquet", [row(number, key=number) for number in range(40)], row_group_size=40)
    reader = reader_of(tmp_path, *(["data.columns.sample_id=key"] if ids else []))
    units = None if ids else list(reader.units())
    total = (tmp_path / "train.parquet").stat().st_size

    class Failing(io.BytesIO):
        """Its footer can be read, then the connection is lost."""

        def read(self, size: int | None = -1) -> bytes:
            if self.tell() + (size or 0) < total:
                raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")
            return super().read(size)

    @contextmanager
    def opened(uri: str) -> Iterator[Any]:
        yield pa.PythonFile(Failing(Path(uri).read_bytes()), mode="r")

    monkeypatch.setattr(parquet_rows, "open_file", opened)
    with pytest.raises(UserError, match=r"storage failed\. Run again"):
        [list(reader.samples(unit)) for unit in units or reader.units()]


def test_no_parquet_and_changed_parquet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Parquet file in"):
        reader_of(tmp_path).fingerprint()
    (tmp_path / "train.parquet").write_text("no Parquet")
    with pytest.raises(UserError, match="is no Parquet file"):
        reader_of(tmp_path).fingerprint()
    with pytest.raises(UserError, match="is no Parquet file"):
        list(reader_of(tmp_path).units())
    write(tmp_path / "train.parquet", [row(1)])
    before = reader_of(tmp_path).fingerprint()
    write(tmp_path / "train.parquet", [row(1, answer="No")])
    assert reader_of(tmp_path).fingerprint() != before
    pq.write_table(pq.read_table(tmp_path / "train.parquet").slice(0, 0), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="have no row"):
        list(reader_of(tmp_path).units())
    with pytest.raises(UserError, match=r"cannot read .*mine\.parquet"):
        reader_of(tmp_path, "data.train_file=mine.parquet").fingerprint()


def test_a_root_and_a_run_that_are_uris(tmp_path: Path) -> None:
    write(
        tmp_path / "data" / "train.parquet", [row(1), {**row(), "image": {"bytes": None, "path": "a b.png"}}]
    )
    (tmp_path / "a b.png").write_bytes(png(2))
    rows = read(f"file://{tmp_path}", run=f"file://{tmp_path}")
    assert rows[0]["image_uri"].startswith(f"file://{tmp_path}/run/raw/hf_parquet/")
    assert [load_image(item["image_uri"]).getpixel((0, 0)) for item in rows] == [1, 2]


@pytest.mark.parametrize("folder", ["", "data"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_of_any_name_under_a_path_or_an_address(tmp_path: Path, scheme: str, folder: str) -> None:
    names = ["test-50% off.parquet", "train (1).parquet", "train a%20b#1?.parquet", "train-größe+1.parquet"]
    for number, name in enumerate(names):
        write(tmp_path / folder / name, [row(number)])
    root = f"{scheme}{tmp_path}"
    assert len(reader_of(root).fingerprint()) == 4
    found = read(root, run=root)
    inside = f"{folder}/" if folder else ""
    assert sorted(unit.file for unit in reader_of(root).units()) == [f"{inside}{name}" for name in names]
    assert sorted(item["sample_id"] for item in found) == [
        f"hf_parquet/{split}/~{Path(name).stem}/0"
        for name, split in zip(names, ["test", "train", "train", "train"], strict=True)
    ]


_TEXTS = st.none() | st.text(st.characters(codec="utf-8"), max_size=6)
_BYTES = st.none() | st.sampled_from([png(1), png(2), png(3)[:40], b""]) | st.binary(max_size=8)
_ROW = st.fixed_dictionaries(
    {
        "image": st.none() | st.fixed_dictionaries({"bytes": _BYTES, "path": _TEXTS}),
        "question": st.just("Is it?") | _TEXTS,
        "answer": st.just("Yes") | _TEXTS,
        "key": st.sampled_from(["1", "a~b", "a%7Eb", " ", "~x"]) | _TEXTS,
        "kind": st.just("closed") | _TEXTS,
        "mask": st.none() | st.fixed_dictionaries({"bytes": _BYTES, "path": _TEXTS}),
    }
)


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (pa.array([17.0, None, 18.0, 17.0]), ["17", "~train/1", "18", "17~r3"]),
        (pa.array([b"a", b"\xff", b"b", b"a"]), ["a", "ff", "b", "a~r3"]),
        (
            pa.array([Decimal("1.50"), Decimal("2.00"), None, Decimal("1.50")]),
            ["1.5", "2", "~train/2", "1.5~r3"],
        ),
        (pa.array([1, 2, 3, 1], pa.uint64()), ["1", "2", "3", "1~r3"]),
        (pa.array(["x", "y", "z", "x"]).dictionary_encode(), ["x", "y", "z", "x~r3"]),
        (pa.array([0, 1, 2, 3], pa.date32()), ["~train/0", "~train/1", "~train/2", "~train/3"]),
        (pa.array([0, 1, 2**62, 3], pa.timestamp("ms")), ["~train/0", "~train/1", "~train/2", "~train/3"]),
    ],
)  # fmt: skip
def test_ids_of_any_column_type(tmp_path: Path, column: pa.Array, names: list[str]) -> None:
    table = pa.Table.from_pylist([row(number) for number in range(4)])
    pq.write_table(table.append_column("key", column), tmp_path / "train.parquet")
    rows = read(tmp_path, "data.test_share=0", "data.columns.sample_id=key")
    assert [item["sample_id"].removeprefix("hf_parquet/train/") for item in rows] == names
    assert {item.get("drop_reason") for item in rows} <= {None, "duplicate_id"}


def test_a_text_that_is_no_text_is_empty(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row(number) for number in range(3)])
    broken = pa.array([b"Is it?", b"\xff\xfe", b"Is it?"]).view(pa.string())
    pq.write_table(table.set_column(1, "question", broken), tmp_path / "train.parquet")
    assert [item.get("drop_reason") for item in read(tmp_path)] == [None, "empty_question", None]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_ROW, min_size=1, max_size=7), st.integers(1, 4), st.booleans())
def test_any_row_is_kept_or_dropped_once(tmp_path: Path, source: list, size: int, with_ids: bool) -> None:
    table = pa.Table.from_pylist(
        source, pa.schema([("image", IMAGE), ("mask", IMAGE), *((key, pa.string()) for key in _STRINGS)])
    )
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=size)
    columns = ("sample_id=key", "answer_type=kind", "mask=mask") if with_ids else ()
    named = [f"data.columns.{column}" for column in columns]
    assert len(read(tmp_path, *named)) == len(source)


_STRINGS = ("question", "answer", "key", "kind")


@pytest.mark.parametrize(
    "column",
    [pa.array([3, None]), pa.array([2.5, float("nan")]), pa.array([["a"], []]), pa.array([{"x": 1}, None])],
)
def test_columns_of_other_types(tmp_path: Path, column: pa.Array) -> None:
    for name in ("image", "question", "answer"):
        table = pa.Table.from_pylist([row(), row()])
        table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, tmp_path / "train.parquet")
        rows = read(tmp_path)
        assert len(rows) == 2
        assert all(item.get("drop_reason") or name == "answer" or name == "question" for item in rows)


def test_a_unit_names_its_rows() -> None:
    assert Unit("a.parquet", None, None, 0, 1, 0, 4).place(3) == "a.parquet, row 3"
    assert Unit("a.json", "val", "validate", 0, 9, 0, 4).place(3) == "a.json, val, row 3"
