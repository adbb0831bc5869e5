"""Annotation files cut into runs: the rows are those of the standard library, wherever a read ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmedpo_ray.datasets import json_rows
from mmedpo_ray.errors import UserError

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
_FILES = {
    "max_examples": 80,
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@pytest.fixture
def tiny_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of a few bytes, so that every token is cut somewhere."""
    monkeypatch.setattr(json_rows, "_CHUNK", 3)


def runs_of(path: Path, layout: json_rows.Layout, rows_per_run: int = 2) -> list[json_rows.Run]:
    """The runs of a file, each checked against a reading of its bytes alone."""
    runs = list(json_rows.scan(str(path), layout, rows_per_run))
    for run in runs:
        assert 0 < len(run.rows) <= rows_per_run
        assert json_rows.read_run(str(path), layout, run.start, run.stop) == run.rows
    return runs


@settings(**_FILES)
@given(
    rows=st.lists(_JSON, min_size=1, max_size=7),
    size=st.integers(1, 4),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
def test_a_list(
    tiny_reads: None, tmp_path: Path, rows: list, size: int, indent: int | None, ascii_only: bool, bom: bool
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n"
    path = tmp_path / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" * bom + text.encode())
    runs = runs_of(path, "list", size)
    assert [row for run in runs for row in run.rows] == rows
    assert [run.position for run in runs] == list(range(0, len(rows), size))


@settings(**_FILES)
@given(
    sections=st.dictionaries(st.text(max_size=5), st.lists(_JSON, max_size=4) | _JSON, min_size=1, max_size=4)
)
def test_an_object_of_lists(tiny_reads: None, tmp_path: Path, sections: dict[str, Any]) -> None:
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps(sections))
    wanted = {name: rows for name, rows in sections.items() if isinstance(rows, list) and rows}
    if not wanted:
        with pytest.raises(UserError, match="nothing to read"):
            runs_of(path, "sections")
        return
    found: dict[str | None, list] = {}
    for run in runs_of(path, "sections"):
        found.setdefault(run.section, []).extend(run.rows)
    assert found == wanted


@settings(**_FILES)
@given(rows=st.lists(_JSON, min_size=1, max_size=7), broken=st.sampled_from(["{", "nul", "\ufeff", "1 2"]))
def test_lines(tiny_reads: None, tmp_path: Path, rows: list, broken: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\r\n\n".join([*map(json.dumps, rows), broken]), encoding="utf-8", newline="")
    found = [row for run in runs_of(path, "lines", 3) for row in run.rows]
    assert found[:-1] == rows
    assert found[-1] is json_rows.BROKEN


def test_what_streaming_parsers_refuse(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[NaN, 123456789012345678901234567890, 1e999, "\\ud800"]')
    _, long, large, surrogate = json_rows.read_json_list(str(path))
    assert (long, large, surrogate) == (123456789012345678901234567890, float("inf"), "\ud800")


@pytest.mark.parametrize(
    ("content", "layout", "message"),
    [
        (b"", "list", "not valid JSON"),
        (b"[1, 2", "list", "not valid JSON"),
        (b"[1\n,\n\n2 3]", "list", r"not valid JSON \(line 4\)"),
        (b"[1,]", "list", "not valid JSON"),
        (b"[1] x", "list", "not valid JSON"),
        (b"[1:2]", "list", "not valid JSON"),
        (b"[1}", "list", "not valid JSON"),
        (b'["\xff"]', "list", "not UTF-8"),
        (b"[" + b"9" * 5000 + b"]", "list", "not valid JSON"),
        (b"[" * 100_000, "list", "not valid JSON"),
        (b"[ ]", "list", "empty list"),
        (b'{"a": []}', "list", "a JSON object, not a list"),
        (b"7", "list", "not valid JSON.*Give a JSON list"),
        (b"[1]", "sections", "a JSON list, not an object with"),
        (b"{}", "sections", "empty list"),
        (b'{"train": [1], 5: 6}', "sections", "not valid JSON"),
        (b'{"train": [1] "val": [2]}', "sections", "not valid JSON"),
        (b'{"train" [1]}', "sections", "not valid JSON"),
        (b"\n \n", "lines", "empty list"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, content: bytes, layout: Any, message: str) -> None:
    path = tmp_path / "secret.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(json_rows.scan(str(path), layout, 2))


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 2}]')
    [run] = json_rows.scan(str(path), "list", 2)
    path.write_text('[{"abcdefghijklmnop": 1}, {"a": 2}]')
    with pytest.raises(UserError, match="changed while"):
        json_rows.read_run(str(path), "list", run.start, run.stop)
    path.unlink()
    with pytest.raises(UserError, match="no annotation file"):
        json_rows.read_run(str(path), "list", run.start, run.stop)
