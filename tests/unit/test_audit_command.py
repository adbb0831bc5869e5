"""The command and the stage `audit`: exit status, files, output, and messages for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audit_tables import found, leak, pair, samples, write

from mmedpo_ray import cli
from mmedpo_ray.audit.stage import audit, audit_command
from mmedpo_ray.config.load import load
from mmedpo_ray.errors import UserError


def test_fail_on_decides_the_exit_status(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(30)]
    rows[0] = leak(rows[0])  # high: 1 of 30
    table = write(tmp_path / "t", rows)
    arguments = ["audit", table, "--out", str(tmp_path / "a.json"), f"run.folder={tmp_path}"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--fail-on", "high"]) == 1
    clean = write(tmp_path / "clean", [pair(i) for i in range(30)])
    assert (
        cli.main(
            ["audit", clean, "--out", str(tmp_path / "b.json"), "--fail-on", "low", f"run.folder={tmp_path}"]
        )
        == 0
    )
    assert cli.main(["audit", str(tmp_path / "nowhere")]) == 2


def test_the_step_of_a_run_writes_skips_and_fails(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(30)]
    write(tmp_path / "scored", rows)
    samples(tmp_path / "samples", [{"sample_id": row["sample_id"], "answer": row["chosen"]} for row in rows])
    config = load(None, [f"run.folder={tmp_path}"])
    result = audit(config)
    assert result["findings"] == []
    assert result["samples"] == str(tmp_path / "samples")
    written = (tmp_path / "audit.json").stat().st_mtime_ns
    assert audit(config) == result
    assert (tmp_path / "audit.json").stat().st_mtime_ns == written
    rows[0] = leak(rows[0])
    write(tmp_path / "scored", rows)
    assert "leaked_prompt_chosen" in found(audit(config))
    with pytest.raises(UserError, match="high"):
        audit(load(None, [f"run.folder={tmp_path}", "audit.fail_on=high"]))


def test_no_text_of_the_data_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "Johnsonville"
    rows = [
        pair(i, chosen=f"{secret} {i}", rejected=f"{secret} {i}", question=f"{secret}?") for i in range(30)
    ]
    rows += [
        pair(31),
        pair(32, chosen=f" {secret}"),
        pair(40, question=secret, chosen=f"Question: {secret}", weight=float("nan")),
    ]
    table = write(tmp_path / "t", rows)
    config = load(None, [f"run.folder={tmp_path}"])
    fixed = tmp_path / "fixed"
    assert audit_command(config, table, None, str(tmp_path / "a.json"), str(fixed)) == 0
    shown = capsys.readouterr()
    assert "equal_sides" in shown.err
    written = [tmp_path / "a.json", fixed / "changes.jsonl", fixed / "manifest.json"]
    for text in (shown.err, shown.out, *(path.read_text() for path in written)):
        assert secret.lower() not in text.lower()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b"no parquet"), "Parquet"),
        (lambda p: pq.write_table(pa.table({"question": ["a"]}), p), "chosen"),
        (
            lambda p: pq.write_table(pa.table({"question": [[1]], "chosen": [[1]], "rejected": [[1]]}), p),
            "expected string",
        ),
    ],
)
def test_unusable_tables_are_named(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "t.parquet"
    make(path)
    with pytest.raises(UserError, match=message):
        audit_command(load(None, [f"run.folder={tmp_path}"]), str(path), None, None, None)


def test_each_table_has_a_result_of_its_own(tmp_path: Path) -> None:
    """The report reads ``audit.json``, which stays that of the scored pairs."""
    rows = [pair(i) for i in range(30)]
    config = load(None, [f"run.folder={tmp_path}"])
    for name in ("scored", "pairs", "visual"):
        write(tmp_path / name, rows)
    audit(config)
    scored = (tmp_path / "audit.json").read_bytes()
    for name in ("pairs", "visual/", "pairs/part-0.parquet"):
        assert audit_command(config, str(tmp_path / name), None, None, None) == 0
    assert (tmp_path / "audit.json").read_bytes() == scored
    for name in ("pairs", "visual", "pairs/part-0.parquet"):
        assert json.loads((tmp_path / f"{name}.audit.json").read_text())["table"] == str(tmp_path / name)
    assert audit_command(config, str(tmp_path / "scored"), None, None, None) == 0
    assert json.loads((tmp_path / "audit.json").read_text())["table"] == str(tmp_path / "scored")


_ELSEWHERE = [
    ("nowhere", "there is no nowhere"),
    ("no.json", "there is no no.json. Give a folder"),
    ("note.txt", "note.txt is neither a Parquet nor a JSON file"),
    ("run", "run is the folder of a run, not a table. Give run/pairs"),
    ("run/scored", "`mmedpo score run.folder=[^ ]*/run` writes it"),
    ("new", "`mmedpo score run.folder=new` writes it"),
    ("run/samples", "table of samples, not of pairs"),
    ("empty", "empty is an empty folder"),
    ("other", "no Parquet file directly in it"),
    ("half", "unfinished table"),
    ("columns.parquet", "it has a; needed are question, chosen and rejected"),
    ("object.json", "not a list of rows .* released layout"),
]


@pytest.mark.parametrize(("path", "message"), _ELSEWHERE)
def test_a_path_to_no_table_of_pairs_is_told_with_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "new", "empty", "other", "half/.parts"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("note.txt", "run/config.yaml", "new/config.yaml", "other/Johnsonville.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "object.json").write_text('{"a": 1}')
    pq.write_table(pa.table({"a": [1]}), "columns.parquet")
    samples(tmp_path / "run" / "samples", [{"sample_id": "s0", "answer": "x"}])
    write(tmp_path / "run" / "pairs", [pair(0)])
    with pytest.raises(UserError, match=message) as raised:
        audit_command(load(None), path, None, None, None)
    assert "data.train_file" not in str(raised.value)
    assert "Johnsonville" not in str(raised.value)
