"""`mmedpo audit --fix`: the cleaned table, the log of changes, and what it never overwrites."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from audit_tables import found, leak, pair, released, run, samples, write

from mmedpo_ray import cli
from mmedpo_ray.audit.stage import audit_command
from mmedpo_ray.commands.options import settings_of
from mmedpo_ray.config.load import dump, load
from mmedpo_ray.datasets.pair_table import open_pairs
from mmedpo_ray.errors import UserError
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.manifest import read_manifest


def test_released_data_fixed_is_free_of_what_was_fixed(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "released" / "slake_dpo_weighted.json"
    config = load(None, [f"run.folder={tmp_path}"])
    audit_command(config, str(source), None, str(tmp_path / "a.json"), str(tmp_path / "fixed"))
    before, after = json.loads(source.read_text()), json.loads((tmp_path / "fixed" / source.name).read_text())
    changes = [json.loads(line) for line in (tmp_path / "fixed" / "changes.jsonl").read_text().splitlines()]
    removed = {item["pair_id"] for item in changes if item["action"] == "removed"}
    assert {str(row["id"]) for row in before} - {str(row["id"]) for row in after} == removed
    assert len(before) == len(after) + len(removed)
    assert before[0].keys() == after[0].keys()
    again = run(tmp_path, str(tmp_path / "fixed" / source.name))
    assert not any(item["fixable"] for item in again["findings"])


def test_json_lines_are_audited_and_fixed_as_lines(tmp_path: Path) -> None:
    rows = [released(i, f"{i}.jpg", "Where is it?", f"Left {i}", f" Right {i}") for i in range(5)]
    rows[3]["conversations"][1]["value"] = "\ud800 Left"
    rows[4]["rejected_conversations"][1]["value"] = rows[4]["conversations"][1]["value"]
    source = tmp_path / "pairs.JSONL"
    lines = [json.dumps(row) for row in rows]
    source.write_text("\n".join([*lines[:2], "{broken", *lines[2:]]) + "\n")
    config = load(None, [f"run.folder={tmp_path}"])
    audit_command(config, str(source), None, None, str(tmp_path / "fixed"))
    result = json.loads((tmp_path / "pairs.JSONL.audit.json").read_text())
    assert result["rows"] == 5
    assert {item["check"]: item["count"] for item in result["findings"]}["malformed_row"] == 1
    fixed = [json.loads(line) for line in (tmp_path / "fixed" / source.name).read_text().splitlines()]
    assert [row["id"] for row in fixed] == [0, 1, 2, 3]
    assert fixed[0]["rejected_conversations"][1]["value"] == "Right 0"
    again = run(tmp_path, str(tmp_path / "fixed" / source.name))
    assert not any(item["fixable"] for item in again["findings"])


def test_fix_logs_every_change_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(20)]
    rows[1] |= {"chosen": " padded "}
    rows[2] |= {"rejected": rows[2]["chosen"]}
    rows[7] = leak(rows[7])
    rows.append(rows[5] | {"pair_id": "copy"})
    table = write(tmp_path / "scored", rows, files=2)
    (tmp_path / "scored" / "manifest.json").write_text(json.dumps({"stage": "score", "key": "k1"}))
    config = load(None, [f"run.folder={tmp_path}"])
    before = time.monotonic()
    for _ in range(2):  # an earlier fixed table may be replaced
        assert audit_command(config, table, None, None, str(tmp_path / "fixed")) == 0
    log = [json.loads(line) for line in (tmp_path / "fixed" / "changes.jsonl").read_text().splitlines()]
    assert [(item["row"], item["pair_id"], item["action"], item["rule"]) for item in log] == [
        (1, "p1", "trimmed", "untrimmed_text"),
        (2, "p2", "removed", "equal_sides"),
        (7, "p7", "removed", "leaked_prompt"),
        (20, "copy", "removed", "duplicate_pair"),
    ]
    manifest = json.loads((tmp_path / "fixed" / "manifest.json").read_text())
    assert manifest["rows_in"] == manifest["rows_out"] + sum(manifest["dropped"].values()) == 21
    assert manifest["key"] != "k1"
    assert 0 < manifest["seconds"] <= time.monotonic() - before
    assert abs(datetime.now(UTC) - datetime.fromisoformat(manifest["finished_at"])) < timedelta(minutes=1)
    assert manifest["versions"]["mmedpo-ray"]
    expected = [row for row in rows if row["pair_id"] not in ("p2", "p7", "copy")]
    expected[1]["chosen"] = "padded"
    written = schemas.check(pq.read_table(tmp_path / "fixed" / "part-00000.parquet"), schemas.SCORED, "fixed")
    assert written.equals(schemas.to_table(expected, schemas.SCORED))
    assert (tmp_path / "audit.json").is_file()


def test_fix_keeps_what_a_radiologist_says(tmp_path: Path) -> None:
    said = (
        "The prior images are not available for comparison.",
        "Note: The endotracheal tube has been replaced.",
        "I cannot identify a fracture.",
        "QUESTION: pneumonia? FINDINGS: No pneumonia.",
        "GPT: 45",
    )
    rows = [pair(i, chosen=said[i % len(said)]) for i in range(20)]
    config = load(None, [f"run.folder={tmp_path}"])
    audit_command(config, write(tmp_path / "t", rows), None, None, str(tmp_path / "fixed"))
    assert pq.read_table(tmp_path / "fixed" / "part-00000.parquet").num_rows == len(rows)


_TEXT_TYPES = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.string()),
)


def _typed(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Texts as another type, in chunks of 100, so that each has a dictionary of its own."""
    texts = [
        pa.array(column.slice(start, 100).to_pylist(), pa.string()) for start in range(0, len(column), 100)
    ]
    return pa.chunked_array([chunk.cast(kind) for chunk in texts], kind)


@pytest.mark.parametrize("kind", _TEXT_TYPES, ids=str)
def test_texts_of_any_type_are_audited_and_fixed(tmp_path: Path, kind: pa.DataType) -> None:
    """The result is that of a table of strings, and the copy has the input's types."""
    rows = [pair(i) for i in range(300)]
    rows[1] |= {"chosen": " padded "}
    rows[2] |= {"rejected": rows[2]["chosen"]}
    rows[3] |= {"rejected": None}
    rows[4] |= {"pair_id": "p5"}
    names = [
        "pair_id",
        "sample_id",
        "kind",
        "image_uri",
        "question",
        "chosen",
        "rejected",
        "answer_type",
        "weight",
    ]
    plain = pa.Table.from_pylist(rows).select(names)
    plain = plain.append_column("comment", pa.array([f"note {i}" for i in range(300)]))
    columns = [
        column if name == "weight" else _typed(column, kind)
        for name, column in zip(plain.column_names, plain.columns, strict=True)
    ]
    known = samples(
        tmp_path / "samples", [{"sample_id": f"s{i}", "answer": f"Nodule {i}"} for i in range(300)]
    )
    truth = pq.read_table(f"{known}/part-0.parquet").select(["sample_id", "answer", "split", "image_uri"])
    pq.write_table(
        pa.table([_typed(column, kind) for column in truth.columns], truth.column_names),
        tmp_path / "s.parquet",
        row_group_size=100,
    )
    config, results = load(None, [f"run.folder={tmp_path}"]), []
    for name, table in (("plain", plain), ("typed", pa.table(columns, plain.column_names))):
        path, out = tmp_path / f"{name}.parquet", tmp_path / f"{name}.json"
        pq.write_table(table, path, row_group_size=100)
        audit_command(
            config, str(path), str(tmp_path / "s.parquet"), str(out), str(tmp_path / f"{name}-fixed")
        )
        results.append(json.loads(out.read_text()) | {"key": None, "table": None})
    assert results[0] == results[1]
    assert {"duplicate_id", "equal_sides", "empty_side", "untrimmed_text"} <= found(results[1]).keys()
    fixed = [tmp_path / f"{name}-fixed" for name in ("plain", "typed")]
    assert len({(folder / "changes.jsonl").read_text() for folder in fixed}) == 1
    expected, written = (pads.dataset(folder / "part-00000.parquet").to_table() for folder in fixed)
    assert [_text_of(item) for item in written.to_pylist()] == expected.to_pylist()
    # Dictionaries of all chunks together may need a wider index.
    is_narrow = kind == pa.dictionary(pa.int8(), pa.string())
    assert set(written.schema.types) == {
        pa.dictionary(pa.int32(), pa.string()) if is_narrow else kind,
        pa.float64(),
    }
    assert written.schema.names == expected.schema.names


def test_fix_copies_columns_of_nested_types(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(20)]
    rows[2] |= {"rejected": rows[2]["chosen"]}
    extra: dict[str, tuple[pa.DataType, Callable[[int], Any]]] = {
        "views": (pa.list_(pa.string_view()), lambda i: [f"a{i}", None]),
        "struct": (pa.struct([("a", pa.int64())]), lambda i: {"a": i} if i % 3 else None),
        "map": (pa.map_(pa.string(), pa.int64()), lambda i: [("c", i)]),
    }
    table = schemas.to_table(rows, schemas.SCORED)
    for name, (kind, value) in extra.items():
        table = table.append_column(name, pa.array([value(i) for i in range(20)], kind))
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    audit_command(
        load(None, [f"run.folder={tmp_path}"]),
        str(tmp_path / "t.parquet"),
        None,
        None,
        str(tmp_path / "fixed"),
    )
    source = pads.dataset(tmp_path / "t.parquet").to_table()
    expected = [row for row in source.to_pylist() if row["pair_id"] != "p2"]
    written = pads.dataset(tmp_path / "fixed" / "part-00000.parquet").to_table()
    assert written.to_pylist() == expected
    assert written.schema == source.schema


def _text_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}


def test_fix_never_overwrites_anything_else(tmp_path: Path) -> None:
    table = write(tmp_path / "t", [pair(i) for i in range(10)])
    config = load(None, [f"run.folder={tmp_path}"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    for folder, message in (
        (table, "audited table"),
        (str(tmp_path / "mine"), "not empty"),
        (table + "/part-0.parquet", "folder"),
    ):
        with pytest.raises(UserError, match=message):
            audit_command(config, table, None, None, folder)
    assert (tmp_path / "mine" / "note.txt").read_text() == "keep"
    assert open_pairs(table).num_rows == 10


def test_a_fix_that_was_killed_is_repeated_by_the_same_command(tmp_path: Path) -> None:
    table = write(tmp_path / "scored", [pair(i) for i in range(20)])
    killed = """
import os, signal, sys
from mmedpo_ray.config.load import load
from mmedpo_ray.audit import fix, stage as stage
fix._write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
stage.audit_command(load(None, [f"run.folder={sys.argv[1]}"]), sys.argv[2], None, None, sys.argv[3])
"""
    target = str(tmp_path / "fixed")
    arguments = [sys.executable, "-c", killed, str(tmp_path), table, target]
    assert subprocess.run(arguments, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "fixed" / "part-00000.parquet").exists()
    config = load(None, [f"run.folder={tmp_path}"])
    assert audit_command(config, table, None, None, target) == 0
    assert audit_command(config, table, None, None, str(tmp_path / "quiet")) == 0
    names = {path.name for path in (tmp_path / "fixed").iterdir()}
    assert names == {"part-00000.parquet", "changes.jsonl", "manifest.json"}
    for name in names - {"manifest.json"}:
        assert (tmp_path / "fixed" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()
    again, quiet = (read_manifest(str(tmp_path / name)) for name in ("fixed", "quiet"))
    assert again is not None
    assert quiet is not None
    when = {"seconds": 0.0, "finished_at": ""}
    assert again.model_copy(update=when) == quiet.model_copy(update=when)


def test_json_rows_that_are_no_pairs_are_counted_and_left_out(tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        turns = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": f" Answer {number} \ud83d"},
        ]
        other = [turns[0], {"from": "gpt", "value": f"Other {number}"}]
        return {
            "id": number,
            "image": f"{number}.png",
            "conversations": turns,
            "rejected_conversations": other,
            "extra": [1],
        }

    source = tmp_path / "data.json"
    source.write_text(json.dumps([row(0), 3, row(1) | {"conversations": []}, row(4)]))
    config = load(None, [f"run.folder={tmp_path}"])
    audit_command(config, str(source), None, None, str(tmp_path / "fixed"))
    result = json.loads((tmp_path / "data.json.audit.json").read_text())
    assert found(result)["malformed_row"]["count"] == 2
    assert "1, 2" in found(result)["malformed_row"]["says"]
    after = json.loads((tmp_path / "fixed" / "data.json").read_text())
    assert [item["id"] for item in after] == [0, 4]
    assert after[0]["conversations"][1]["value"] == "Answer 0 \ud83d"
    assert after[0]["extra"] == [1]
    log = [json.loads(line) for line in (tmp_path / "fixed" / "changes.jsonl").read_text().splitlines()]
    assert [(item["row"], item["rule"]) for item in log if item["action"] == "removed"] == [
        (1, "malformed_row"),
        (2, "malformed_row"),
    ]


def test_a_fixed_table_of_a_run_goes_on_with_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, new = tmp_path / "mine", tmp_path / "new"
    table = write(mine / "scored", [pair(i) for i in range(10)])
    config = load(None, [f"run.folder={mine}", "align.beta=0.7"])

    def said(fix: Path) -> str:
        assert audit_command(config, table, None, None, str(fix)) == 0
        return capsys.readouterr().err

    assert "mmedpo align" not in said(tmp_path / "of_no_run" / "scored")
    (mine / "config.yaml").write_text(dump(config))
    assert "--fix NEW/scored" in said(tmp_path / "clean")
    command = f"mmedpo align --config {mine}/config.yaml run.folder={new}"
    assert command in said(new / "scored")
    settings_of_new = settings_of(cli._parse(command.split()[1:]))
    assert settings_of_new.align.beta == 0.7
    assert settings_of_new.run.folder == str(new)
    # What `align` asks of the table that it reads.
    manifest = read_manifest(str(new / "scored"))
    assert manifest is not None
    assert manifest.rows_out == 10
