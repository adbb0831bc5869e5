"""The benchmark over several seeds scores all answers together, failed requests included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.io import storage
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import StageRunner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODELS = ("base", "aligned", "sft_control")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def finished_run(folder: Path) -> Config:
    """Ten closed questions; the base model is right on four, the aligned one on eight and fails on two."""
    config = load(None, [f"run.folder={folder}", "run.max_dropped_share=0.5", "evaluate.bootstrap=100"])
    run = RunFolder(config.run.folder)
    samples, answers = [], []
    for number in range(10):
        about = {"sample_id": f"s{number}", "image_id": f"i{number}", "task": "vqa", "answer_type": "closed"}
        samples.append(
            about
            | {"dataset": "d", "split": "test", "image_uri": "a.png", "image_sha256": "0"}
            | {"question": "Is there a nodule?", "answer": "Yes"}
        )
        for model in MODELS:
            failed = model == "aligned" and number >= 8
            said = "Yes" if number < (4 if model == "base" else 8) else "No"
            answers.append(
                about
                | {"answer_id": f"{model}/s{number}", "model": model, "reference": "Yes", "seconds": 0.1}
                | {
                    "prediction": None if failed else said,
                    schemas.DROP_REASON: "http_400" if failed else None,
                }
            )
    write_table(StageRunner("ingest", run.samples, config), samples, schemas.SAMPLES, "sample_id")
    write_table(StageRunner("evaluate", run.evaluate, config), answers, schemas.ANSWERS, "answer_id")
    summary = {"models": {model: {"closed_accuracy": {"value": 0.5}} for model in MODELS}}
    storage.write_bytes(storage.join(run.evaluate, "summary.json"), json.dumps(summary).encode())
    return config


def write_table(stage: StageRunner, rows: list[dict[str, Any]], schema: pa.Schema, id_column: str) -> None:
    stage.write_rows(lambda _: stage.write_part(rows, schema, id_column), schema=schema, id_column=id_column)


def test_seeds_are_pooled(tmp_path: Path) -> None:
    from three_seeds import markdown, pooled

    folders = {seed: tmp_path / f"seed-{seed}" for seed in (0, 1)}
    for folder in folders.values():
        config = finished_run(folder)
    summary = pooled(config, folders)
    scores = summary["models"]["aligned"]["closed_accuracy"]
    assert (scores["n"], scores["value"], summary["images"]) == (20, pytest.approx(0.8), 20)
    assert summary["counts"]["aligned"]["failed"] == 4
    assert summary["difference"]["closed_accuracy"]["verdict"] == "better"
    table = markdown(summary, config)
    assert "| closed accuracy | 0.400 | 0.800 | 0.800 | +0.400 [" in table
