"""What the benchmarks measure is what their pages say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_slake_shaped_tree_has_eleven_questions_of_the_stated_length() -> None:
    from align_vs_trl import SHAPES, draw_rows

    shape = SHAPES["slake"]
    rows = draw_rows(shape, visual=False)
    assert len(rows) == 11 * shape.images
    # Every word is a token; the end token makes 3 and 17.
    assert {len(row["chosen"].split()) for row in rows} == {2}
    assert {len(row["rejected"].split()) for row in rows} == {16}
    both = draw_rows(shape, visual=True)
    assert sum(row["visual"] for row in both) == len(rows)


def test_the_step_on_a_gpu_has_eleven_questions_on_every_image() -> None:
    from gpu_step import IMAGE_TOKENS, draw_packed

    packed_trees, pairs, chosen_tokens = draw_packed(3, torch.device("cpu"))
    assert pairs == 3 * 11
    assert chosen_tokens == 3 * 11 * 3
    assert packed_trees.images["pixel_values"].shape[0] == 3
    own = 11 * (9 + 4 + 2 + 16)
    assert packed_trees.input_ids.numel() == pytest.approx(3 * (4 + IMAGE_TOKENS + own), rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("script", "sizes"),
    [
        ("lesion_noise", ["--sizes", "64", "--count", "1", "--rounds", "1"]),
        ("plan_scale", ["--pairs", "500"]),
        ("score_answers", ["--answers", "400", "--resamples", "100", "--distinct"]),
        ("curation_scale", ["--rows", "300"]),
        ("judge_throughput", ["--rows", "8", "--repetitions", "1", "--kv-cache-gib", "0.25"]),
    ],
)
def test_a_benchmark_runs_and_writes_its_figures(script: str, sizes: list[str], tmp_path: Path) -> None:
    found = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *sizes, "--json", str(found)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(found.read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_step_of_a_gpu_runs_on_a_tiny_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import gpu_step

    monkeypatch.setattr(sys, "argv", ["gpu_step.py", "--tiny", "--images", "1", "--repetitions", "1"])
    assert gpu_step.main() == 0
    tree, sdpa = capsys.readouterr().out.strip().splitlines()
    assert tree.startswith("tree:") and sdpa.startswith("sdpa:")
    assert "pairs/s" in tree
