"""`mmedpo run` with models of other architectures: every stage and engine, to the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import build_tiny

from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import read_table

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CONFIG = Path(__file__).parents[2] / "configs" / "phantom.yaml"
REDUCED = [
    "data.phantom.images=12",
    "data.phantom.test_images=4",
    "align.max_steps=2",
    "align.max_length=512",
    "model.engine.max_model_len=512",
    "evaluate.bootstrap=200",
    "evaluate.max_tokens=8",
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3"])
def test_a_run_ends_with_a_report(kind: str, tmp_path: Path) -> None:
    model, folder = build_tiny(kind, tmp_path / "model"), tmp_path / "run"
    subprocess.run(
        [
            *(str(Path(sys.executable).parent / "mmedpo"), "run", "--config", str(CONFIG)),
            *(f"model.path={model}", f"run.folder={folder}", *REDUCED),
        ],
        check=True,
        timeout=880,
    )
    run = RunFolder(str(folder))
    assert Path(run.report).is_file()
    prepared = read_table(run.prepared, schemas.PREPARED, "prepared").to_pylist()
    writer = PromptWriter(load_processor(str(model)))
    assert prepared and all(row["chosen"][-1] == writer.end_token_id for row in prepared)
    assert all(row["ref_chosen_logp"] < 0 for row in prepared)
    answers = read_table(run.evaluate, schemas.ANSWERS, "answers").to_pylist()
    assert {row["model"] for row in answers} == {"base", "aligned", "sft_control"}
    adapter = json.loads((run.model() / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(model)
    base, merged = (load_model(str(path), torch.float32) for path in (model, run.model() / "merged"))
    trained = dict(merged.named_parameters())
    changed = {name for name, value in base.named_parameters() if not torch.equal(value, trained[name])}
    inside = writer.architecture.language_model
    assert changed and all(name.startswith(f"{inside}.layers.") for name in changed)
