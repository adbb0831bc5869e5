"""Storage on servers that speak S3 and GCS: files appear whole, folders move, nothing that a killed writer
left is read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest
from object_store import running

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    with running("lake", request.param) as address:
        yield address


@pytest.fixture
def folder(bucket: str, request: pytest.FixtureRequest) -> str:
    """A prefix of its own for each test."""
    return storage.join(bucket, request.node.name.split("[")[0])


def test_files_are_written_listed_read_and_removed(folder: str) -> None:
    name = storage.join(folder, "a/b.txt")
    assert not storage.exists(name)
    assert storage.list_files(storage.join(folder, "a")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(name)
    storage.write_bytes(name, b"one")
    storage.write_bytes(name, b"two")
    assert storage.read_bytes(name) == b"two"
    assert storage.list_files(storage.join(folder, "a")) == [name]
    assert storage.list_files(folder) == []
    storage.remove(name)
    storage.remove(name)
    assert not storage.exists(name)


@pytest.mark.parametrize("name", ["plain.txt", "a%20b%C3%A9.txt", "100%25.txt"])
def test_what_a_listing_names_can_be_read(folder: str, name: str) -> None:
    storage.write_bytes(storage.join(folder, name), b"x")
    assert storage.join(folder, name) in storage.list_files(folder)
    for address in storage.list_files(folder):
        assert storage.read_bytes(address) == b"x"


def test_tables_are_written_and_read_as_a_data_set(folder: str) -> None:
    for number in range(3):
        storage.write_parquet(storage.join(folder, f"part-{number}.parquet"), pa.table({"a": [number]}))
    assert storage.dataset(folder).to_table()["a"].to_pylist() == [0, 1, 2]
    assert storage.read_parquet(storage.join(folder, "part-1.parquet"))["a"].to_pylist() == [1]
    with pytest.raises(UserError, match="no Parquet file"):
        storage.dataset(storage.join(folder, "none"))


def test_files_and_folders_move_and_replace_what_was_there(folder: str) -> None:
    source, target = storage.join(folder, "source"), storage.join(folder, "target")
    storage.write_bytes(storage.join(source, "x"), b"new")
    storage.write_bytes(storage.join(source, "deep/y"), b"new")
    storage.write_bytes(storage.join(target, "old"), b"old")
    storage.write_bytes(storage.join(folder, "file"), b"old")
    storage.move(source, target)
    assert not storage.exists(source)
    assert not storage.exists(storage.join(target, "old"))
    assert storage.read_bytes(storage.join(target, "deep/y")) == b"new"
    storage.move(storage.join(target, "x"), storage.join(folder, "file"))
    assert storage.read_bytes(storage.join(folder, "file")) == b"new"
    assert not storage.exists(storage.join(target, "x"))
    storage.remove(target)
    assert not storage.exists(target)


def settled(name: str) -> bytes:
    """What the file is once the server has finished with what it had received whole."""
    found = None
    for _ in range(20):
        before, found = found, storage.read_bytes(name)
        if found == before:
            return found
        time.sleep(0.2)
    pytest.fail(f"{name} keeps changing")


def test_a_killed_writer_leaves_nothing_that_is_read(folder: str) -> None:
    """Killed again and again while it replaces a file of several parts: the file is one or the other,
    whole."""
    name = storage.join(folder, "big")
    size = 12 * 2**20
    storage.write_bytes(name, b"a" * size)
    program = (
        "import sys; from mmedpo_ray.io import storage\n"
        "print('ready', flush=True)\n"
        f"while True: storage.write_bytes(sys.argv[1], bytes([98]) * {size})\n"
    )
    for delay in (0.0, 0.05, 0.2):
        writer = subprocess.Popen(
            [sys.executable, "-c", program, name], stdout=subprocess.PIPE, env=os.environ.copy()
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.kill()
        writer.wait()
        writer.stdout.close()
        assert settled(name) in (b"a" * size, b"b" * size)
        assert storage.list_files(folder) == [name]


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    with pytest.raises((UserError, OSError), match="lake-none"):
        storage.read_bytes(storage.join(f"{bucket}-none", "a"))
