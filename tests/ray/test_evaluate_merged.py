"""A run whose trained models are whole ones: each has its own engine, and evaluation runs one at a time."""

from __future__ import annotations

import pytest
from test_export import train_randomly
from test_serve_evaluate import make_config, write_samples
from tiny_llava import build_tiny_llava

from mmedpo_ray.evaluate.stage import evaluate
from mmedpo_ray.export.stage import export
from mmedpo_ray.serve.application import engine_groups
from mmedpo_ray.serve.models import run_models, served_models
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import read_table


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_whole_models_are_evaluated_one_after_the_other(tmp_path, ray_cluster):
    base = build_tiny_llava(tmp_path / "base", 0)
    config = make_config(tmp_path, base)
    config.control.enabled = False
    write_samples(config, tmp_path)
    train_randomly(config, base, train="full")
    export(config)
    merged = RunFolder(config.run.folder).model() / "merged"
    groups = [{"base": str(base)}, {"aligned": str(merged)}]
    assert engine_groups(run_models(config)) == groups
    manifest = evaluate(config)
    assert (manifest.rows_in, manifest.rows_out) == (18, 12)
    answers: dict[str, dict[str, str]] = {"base": {}, "aligned": {}}
    for row in read_table(RunFolder(config.run.folder).evaluate, schemas.ANSWERS, "answers").to_pylist():
        answers[row["model"]][row["sample_id"]] = row["prediction"]
    assert answers["base"].keys() == answers["aligned"].keys()
    assert answers["base"] != answers["aligned"]
    config.serve.models = ("aligned",)
    assert list(served_models(config)) == ["aligned"], "a whole model needs no base"
