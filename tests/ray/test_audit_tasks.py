"""The audit as Ray Data tasks: the numbers are those of one process, also when a worker is killed."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path

import faults
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from mmedpo_ray.audit.extract import extract
from mmedpo_ray.audit.features import Features
from mmedpo_ray.audit.samples import open_samples
from mmedpo_ray.audit.stage import audit_command
from mmedpo_ray.config.load import load
from mmedpo_ray.datasets.pair_table import open_pairs
from mmedpo_ray.errors import UserError

WORDS = (
    "no", "small", "large", "nodule", "effusion", "left", "right", "lung", "heart", "is", "are", "where",
    "what", "how", "yes", "mass", "edema",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: None) -> None:
    pass


def texts(rng: np.random.Generator, rows: int, words: int) -> list[str]:
    return [" ".join(WORDS[index] for index in row) for row in rng.integers(0, len(WORDS), (rows, words))]


def write_pairs(folder: Path, sizes: tuple[int, ...]) -> str:
    """Files of these many rows, in row groups of 700, with repeats, and values that are missing."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        columns = {
            "pair_id": [f"p{rng.integers(0, 10 * sum(sizes))}" for _ in range(size)],
            "sample_id": [f"s{rng.integers(0, 100)}" for _ in range(size)],
            "image_uri": [f"/images/{rng.integers(0, 50)}.png" for _ in range(size)],
            "kind": [("text", "visual")[value] for value in rng.integers(0, 2, size)],
            "question": texts(rng, size, 1),
            "chosen": texts(rng, size, 3),
            "rejected": texts(rng, size, 2),
            "answer_type": [("open", "closed", None)[value] for value in rng.integers(0, 3, size)],
            "weight": [None if value > 0.9 else value for value in rng.random(size)],
        }
        pq.write_table(pa.table(columns), folder / f"part-{number}.parquet", row_group_size=700)
    return str(folder)


def write_samples(folder: Path) -> str:
    rng = np.random.default_rng(1)
    columns = {
        "sample_id": [f"s{number}" for number in range(90)],
        "split": [("train", "test", "validate")[number % 3] for number in range(90)],
        "image_uri": [f"/images/{number % 50}.png" for number in range(90)],
        "question": texts(rng, 90, 1),
        "answer": texts(rng, 90, 3),
    }
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "part-0.parquet")
    return str(folder)


def in_one_process(
    monkeypatch: pytest.MonkeyPatch, table: str, samples: str | None, **options: bool
) -> Features:
    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        return extract(open_pairs(table), open_samples(samples, **options) if samples else None)


def assert_same(one: Features, other: Features) -> None:
    for field in dataclasses.fields(Features):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, theirs, field.name)
            assert mine.dtype == theirs.dtype
        else:
            assert mine == theirs, field.name


@pytest.mark.parametrize("with_ids", [True, False])
def test_tasks_find_what_one_process_finds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_ids: bool
) -> None:
    table, samples = write_pairs(tmp_path / "pairs", (3000, 40, 1999)), write_samples(tmp_path / "samples")
    if not with_ids:
        for path in Path(table).iterdir():
            pq.write_table(pq.read_table(path).drop_columns(["sample_id"]), path, row_group_size=700)
    quiet = in_one_process(monkeypatch, table, samples, with_questions=not with_ids)
    for found in (quiet.sample_row >= 0, quiet.image_in_test, quiet.image_in_validation):
        assert found.any()
    assert len(quiet) == 5039
    assert_same(extract(open_pairs(table), open_samples(samples, with_questions=not with_ids)), quiet)


def test_one_file_and_a_table_without_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = Path(write_pairs(tmp_path / "pairs", (900,)), "part-0.parquet")
    assert_same(extract(open_pairs(str(path)), None), in_one_process(monkeypatch, str(path), None))
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert len(extract(open_pairs(str(path)), None)) == 0


def test_a_killed_worker_costs_nothing_but_its_slice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "pairs", (60_000, 60_000))
    quiet = in_one_process(monkeypatch, table, None)
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.is_set() and not killed:
            for process in faults.workers(os.getpid(), "MapBatches(work)")[:1]:
                process.kill()
                killed.append(process.pid)
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    found = extract(open_pairs(table), None)
    over.set()
    thread.join()
    assert killed, "no worker was met at its task"
    assert_same(found, quiet)


def test_a_value_of_another_type_names_file_and_column(tmp_path: Path) -> None:
    table = write_pairs(tmp_path / "pairs", (100, 100))
    path = Path(table, "part-1.parquet")
    rows = pq.read_table(path)
    at = rows.column_names.index("weight")
    pq.write_table(rows.set_column(at, "weight", pa.array(["heavy"] * 100)), path)
    with pytest.raises(UserError) as raised:
        audit_command(load(None, [f"run.folder={tmp_path}"]), table, None, None, None)
    message = str(raised.value)
    assert str(path) in message
    assert "'weight' is string, expected double" in message
    assert "heavy" not in message
