"""The reference pages are those of the code, links lead somewhere, and no page names what it should not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
