"""Files by URI and the tables between stages."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.manifest import image_example


def test_write_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a" / "b.txt"
    storage.write_bytes(target, b"first")

    class Torn:
        def __len__(self) -> int:
            return 3

    with pytest.raises(TypeError):
        storage.write_bytes(target, Torn())  # type: ignore[arg-type]
    assert target.read_bytes() == b"first"


def test_uri_and_path_are_the_same_file(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/x", b"1")
    assert storage.read_bytes(tmp_path / "x") == b"1"
    assert storage.exists(f"file://{tmp_path}/x")
    assert not storage.exists(tmp_path / "y")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(tmp_path / "y")


def test_a_file_is_read_as_it_is_and_no_larger_than_asked(tmp_path: Path) -> None:
    packed = gzip.compress(bytes(10**6))
    (tmp_path / "x.dcm.gz").write_bytes(packed)
    assert storage.read_bytes(tmp_path / "x.dcm.gz") == packed
    assert storage.read_bytes(tmp_path / "x.dcm.gz", max_bytes=len(packed)) == packed
    with pytest.raises(storage.FileTooLargeError, match=r"x\.dcm\.gz: .* bytes, limit 999"):
        storage.read_bytes(tmp_path / "x.dcm.gz", max_bytes=999)


def test_only_what_a_user_typed_has_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert storage.absolute("~/runs") == "/home/me/runs"
    assert storage.resolve("~/runs")[1] == "/home/me/runs"
    assert storage.absolute("~/a.png", "/data") == "/data/~/a.png"
    assert storage.absolute("~$scan.png", "/data") == "/data/~$scan.png"
    assert storage.absolute("~nobody-of-that-name/x").endswith("/~nobody-of-that-name/x")
    assert storage.absolute("/a.png", "/data") == "/a.png"
    assert storage.absolute("s3://a/~b", "/data") == "s3://a/~b"


def test_list_move_remove(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet", "c.json"):
        storage.write_bytes(tmp_path / "t" / name, b"")
    assert [Path(name).name for name in storage.list_files(tmp_path / "t", ".parquet")] == [
        "a.parquet",
        "b.parquet",
    ]
    assert storage.list_files(tmp_path / "nowhere") == []
    storage.move(tmp_path / "t", tmp_path / "u")
    assert not (tmp_path / "t").exists()
    storage.remove(tmp_path / "u")
    storage.remove(tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    table = pa.table({"x": [1, 2], "y": ["a", "b"]})
    digest = storage.write_parquet(tmp_path / "t" / "a.parquet", table)
    assert digest == hashlib.sha256((tmp_path / "t" / "a.parquet").read_bytes()).hexdigest()
    (tmp_path / "t" / "a.parquet.0123.tmp").write_bytes(b"half")
    (tmp_path / "t" / "deep").mkdir()
    (tmp_path / "t" / "deep" / "b.png.4567.tmp").write_bytes(b"half")
    storage.remove_temporary(tmp_path / "t")
    storage.remove_temporary(tmp_path / "nowhere")
    assert [path.name for path in (tmp_path / "t").rglob("*") if path.is_file()] == ["a.parquet"]
    assert storage.read_parquet(tmp_path / "t" / "a.parquet", ["y"]).to_pydict() == {"y": ["a", "b"]}
    with pytest.raises(FileNotFoundError):
        storage.read_parquet(tmp_path / "t" / "b.parquet")


def test_of_many_folders_one_is_listed_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(60):
        storage.write_bytes(tmp_path / "t" / f"{number % 10:02}" / f"{number}.png", b"")
        (tmp_path / "t" / f"{number % 10:02}" / f"{number}.png.0123.tmp").touch()
    resolve, listed = storage.resolve, list[int]()

    class Counting:
        def __init__(self, filesystem: Any) -> None:
            self._filesystem = filesystem

        def __getattr__(self, name: str) -> Any:
            return getattr(self._filesystem, name)

        def get_file_info(self, selector: Any) -> Any:
            found = self._filesystem.get_file_info(selector)
            listed.append(len(found))
            return found

    def counted(uri: Any) -> Any:
        filesystem, path = resolve(uri)
        return Counting(filesystem), path

    monkeypatch.setattr(storage, "resolve", counted)
    storage.remove_temporary(tmp_path / "t")
    assert max(listed) == 12
    assert len(list((tmp_path / "t").glob("*/*"))) == 60
    assert not list(tmp_path.rglob("*.tmp"))


def test_unknown_scheme_and_cloud_models_are_refused() -> None:
    with pytest.raises(UserError, match="s3:// or gs://"):
        storage.resolve("carrier-pigeon://x/y")
    with pytest.raises(UserError, match="every node sees"):
        storage.local_folder("s3://bucket/run", "training")


def test_missing_table_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Run the stage"):
        storage.dataset(tmp_path)


def test_every_field_has_a_meaning() -> None:
    for schema in (
        schemas.SAMPLES,
        schemas.CANDIDATES,
        schemas.PAIRS,
        schemas.SCORED,
        schemas.PREPARED,
        schemas.ANSWERS,
    ):
        for field in schema:
            if field.name != "history":
                assert field.metadata[b"meaning"], field.name


def test_check_names_column_and_row() -> None:
    row = dict.fromkeys(schemas.SAMPLES.names, "x")
    good = schemas.to_table([row, row], schemas.SAMPLES)
    assert schemas.check(good, schemas.SAMPLES, "samples").schema == schemas.SAMPLES
    with pytest.raises(UserError, match="lacks column 'answer'"):
        schemas.check(good.drop_columns(["answer"]), schemas.SAMPLES, "samples")
    holed = schemas.to_table([row, {**row, "answer": None}], schemas.with_drop_columns(schemas.SAMPLES))
    with pytest.raises(UserError, match="row 1: answer is null"):
        schemas.check(holed, schemas.SAMPLES, "samples")
    with pytest.raises(UserError, match="does not fit"):
        schemas.to_table([{**row, "answer": 3}], schemas.SAMPLES)
    assert schemas.to_table([], schemas.SAMPLES).num_rows == 0
    assert isinstance(good, pa.Table)


def test_batches_are_the_rows_of_all_files_in_name_order(tmp_path: Path) -> None:
    for number in (1, 0):
        rows = pa.table({"a": [10 * number, 10 * number + 1], "b": ["x", "y"]})
        storage.write_parquet(tmp_path / f"part-{number}.parquet", rows)
    storage.write_parquet(tmp_path / "part-2.parquet", rows.slice(0, 0))
    batches = list(storage.read_batches(tmp_path, ["a"]))
    assert pa.Table.from_batches(batches).to_pydict() == {"a": [0, 1, 10, 11]}
    assert pa.Table.from_batches(storage.read_batches(tmp_path)).column_names == ["a", "b"]
    assert sum(batch.num_rows for batch in storage.read_batches(tmp_path, [])) == 4
    with pytest.raises(UserError, match="no Parquet file"):
        list(storage.read_batches(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], ""),
        ([{"drop_reason": "empty_answer"}], ""),
        ([{"drop_reason": "empty_answer", "image_uri": "/a.png"}], ""),
        ([{"drop_reason": "image_missing", "image_uri": None},
          {"drop_reason": "image_undecodable", "image_uri": "/b.png"}],
         "; image_undecodable: /b.png"),
    ],
)  # fmt: skip
def test_of_dropped_images_one_is_named(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    """Other reasons, rows without an image and tables without that column name none."""
    if rows:
        storage.write_parquet(tmp_path / "dropped" / "part-0.parquet", pa.Table.from_pylist(rows))
    assert image_example(str(tmp_path / "dropped")) == said
