"""The reference pages are those of the code, links lead somewhere, and no page names what it should not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_reference_is_current() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "docs/make_reference.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configs_and_jobs_named_in_pages_exist(page: Path) -> None:
    for target in re.findall(
        r"\b(?:configs|jobs|benchmarks)/[\w./-]+\.(?:yaml|py)\b", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / target).is_file(), f"{page.name} names {target}"


def test_the_tutorial_shows_samples_that_are_in_use_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs/phantom/samples"
    (folder / "dropped").mkdir(parents=True)
    row = {"split": "train", "answer_type": "closed", "question": "Is it?", "answer": "kept"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "part-00000.parquet")
    pq.write_table(
        pa.Table.from_pylist([row | {"answer": "left out"}]), folder / "dropped" / "part-00000.parquet"
    )
    (folder / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    snippet = next(code for code in re.findall(r"```python\n(.+?)```", page, re.DOTALL) if "samples" in code)
    exec(snippet, {})
    shown = capsys.readouterr().out
    assert "kept" in shown and "left out" not in shown


def test_the_page_on_judges_shows_a_kind_that_judges() -> None:
    from mmedpo_ray.judge.agents.base import Case, Judgement

    page = (ROOT / "docs/how-to/own-judge.md").read_text(encoding="utf-8")
    section = page.split("## Write your own kind")[1]
    kind: dict[str, Any] = {}
    code = next(iter(re.findall(r"```python\n(.+?)```", section, re.DOTALL)))
    exec(compile(code, "own-judge.md", "exec", dont_inherit=True), kind)
    agent_class = kind["LengthAgent"]
    settings = agent_class.settings_class(name="words")
    agent = agent_class(settings)
    [first] = agent.judge([Case("What is seen?", "Mass", "No mass at all", (), 1)])
    assert first == Judgement("words", 1, 0.15, "+3 words")
    before = Judgement("other", 1, 0.1, "")
    [agrees] = agent.judge([Case("What is seen?", "Mass", "No mass at all", (before,), 1)])
    assert agrees.score == before.score
    assert agent_class.holds_model is False
    assert agent_class.key(settings)
    assert "num_cpus" in agent_class.map_options(settings, data_cpus=1.0, has_gpu=False)


def test_every_command_is_in_the_table() -> None:
    from mmedpo_ray.commands.parser import build_parser

    page = (ROOT / "README.md").read_text(encoding="utf-8")
    [commands] = [action for action in build_parser()._actions if action.dest == "command"]
    for command in set(commands.choices or ()) - {"config"}:
        assert f"| `mmedpo {command}" in page, command


def test_tests_named_on_the_page_on_security_exist() -> None:
    defined = set()
    for file in (ROOT / "tests").rglob("*.py"):
        defined |= set(
            re.findall(r"^(?:def )?(test_\w+)(?:\(| = )", file.read_text(encoding="utf-8"), re.MULTILINE)
        )
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/security.md").read_text(encoding="utf-8")))
    assert len(named) > 20
    assert named <= defined
