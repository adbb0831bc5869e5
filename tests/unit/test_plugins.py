"""Registries of parts: built-in names, names that installed packages add, and names that nobody knows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from mmedpo_ray.plugins import Registry

GROUP = "mmedpo_ray.test_parts"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with one part of its own and one of a distribution on the path."""
    (tmp_path / "outside_part.py").write_text("VALUE = 7\n")
    metadata = tmp_path / "outside-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\nseven = outside_part:VALUE\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield Registry("part", GROUP, {"pi": "math:pi"})
    sys.modules.pop("outside_part", None)


def test_own_and_added_parts_are_found_by_name(registry: Registry) -> None:
    assert registry["pi"] == pytest.approx(3.14159, abs=1e-5)
    assert registry["seven"] == 7
    assert list(registry) == ["pi", "seven"] and len(registry) == 2
    assert "seven" in registry and "eight" not in registry


def test_a_part_is_imported_when_it_is_looked_up(registry: Registry) -> None:
    assert registry.check("seven") == "seven" and "outside_part" not in sys.modules
    _ = registry["seven"]
    assert "outside_part" in sys.modules


def test_an_unknown_name_is_told_with_the_known_ones(registry: Registry) -> None:
    with pytest.raises(ValueError, match=r"'sevn'.*pi, seven.*seven"):
        registry.check("sevn")
    with pytest.raises(KeyError):
        _ = registry["eight"]
