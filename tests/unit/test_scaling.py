"""Figures of large runs: the arithmetic against known sizes, and the page against the arithmetic."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mmedpo_ray.align.plan.estimates import Geometry, checkpoint_bytes, step_traffic
from mmedpo_ray.align.settings import AlignConfig

ROOT = Path(__file__).parents[2]
SMALL = Geometry(
    total=1000,
    language=900,
    layers=800,
    head=50,
    tower=100,
    adapter=10,
    num_layers=2,
    hidden=4,
    intermediate=6,
    heads=2,
    key_heads=1,
    head_size=2,
    image_tokens=3,
)


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_what_the_script_computes(script: Any) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    missing = [line for line in script.lines() if line not in page]
    assert not missing, "run python benchmarks/scaling.py and copy its tables"


def test_geometry_counts_the_published_sizes(script: Any) -> None:
    shape = Geometry.of(script.llava_med(), AlignConfig(), 576)
    assert shape.language == 7_241_732_096, "Mistral 7B as published"
    assert shape.adapter == 32 * 128 * (8192 + 5120 + 5120 + 8192 + 3 * 18432)
    assert shape.head == 32000 * 4096
    assert shape.layers == shape.language - 2 * shape.head - (2 * 32 + 1) * 4096
    assert shape.total == shape.language + shape.tower


def test_traffic_counts_every_weight_as_often_as_it_moves() -> None:
    # Two ranks: each receives the half that it does not hold.
    assert step_traffic(SMALL, "lora", "zero3", 2) == (1010 + 1010 - 100) + 10
    assert step_traffic(SMALL, "full", "zero3", 2) == (1000 + 900) + 900
    assert step_traffic(SMALL, "lora", "zero3", 2, micro_batches=3) == 3 * 1930
    assert step_traffic(SMALL, "lora", "zero2", 2, micro_batches=3) == 3 * 10 + 10
    assert step_traffic(SMALL, "lora", "ddp", 2, micro_batches=3) == 10 * 4
    for strategy in ("zero3", "zero2", "ddp"):
        assert step_traffic(SMALL, "full", strategy, 1) == 0, "one rank asks nobody"  # type: ignore[arg-type]


def test_flops_count_passes(script: Any) -> None:
    forward_flops = script.forward_flops
    forward = script.Forward(tokens=10, response_tokens=2, images=1, rows=2)
    layers, attention, head, tower = 2 * 800 * 10, 4 * 5**2 * 2 * 4 * 2, 2 * 50 * 2, 2 * 100 * 4
    plain = 2 * layers + 3 * attention + 2 * head + tower + 3 * 2 * 10 * 10
    assert forward_flops(SMALL, forward, "lora", recompute=False) == plain
    again = forward_flops(SMALL, forward, "lora", recompute=True)
    assert again == plain + layers + attention + 2 * 10 * 10
    assert forward_flops(SMALL, forward, "full", recompute=True) == again - 4 * 200 + layers + head


def test_a_checkpoint_is_the_trained_weights_and_their_moments() -> None:
    assert (checkpoint_bytes(SMALL, "lora"), checkpoint_bytes(SMALL, "full")) == (120, 10_800)
