"""Candidate answers of a batch, with an engine that only remembers what it was asked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tiny_llava import build_tiny_llava

from mmedpo_ray.config.load import load
from mmedpo_ray.curate.text import candidates
from mmedpo_ray.curate.text.candidates import COLUMNS, CandidateSampler, plan
from mmedpo_ray.models.loading import load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.models.vllm_engine import engine_settings
from mmedpo_ray.tables import schemas


class Engine:
    """Answers every request with its prompt's length."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    def generate(self, requests: list[dict[str, Any]], parameters: list[Any], **_: Any) -> list[Any]:
        assert len(requests) == len(parameters)
        self.requests += requests
        texts = [str(len(request["prompt_token_ids"])) for request in requests]
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=[1])]) for text in texts]


@pytest.fixture
def sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CandidateSampler:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    monkeypatch.setattr(candidates, "start_engine", lambda *_: Engine())
    model = build_tiny_llava(tmp_path / "model")
    config = load(None, (f"run.folder={tmp_path}/run", f"model.path={model}"))
    return CandidateSampler(config, engine_settings(config.model.engine, has_gpu=False, model=str(model)))


def test_prompts_are_those_of_training_and_few_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(candidates, "_CACHED_PROMPTS", 3)
    sampler = request.getfixturevalue("sampler")
    Image.new("RGB", (30, 20), (9, 90, 200)).save(tmp_path / "a.png")
    questions = ["Is it?", "Where?", "What <image> is it?", *(f"Is it {number}?" for number in range(8))]
    samples = [
        {"sample_id": str(i), "image_id": "a", "image_uri": f"{tmp_path}/a.png", "question": question}
        for i, question in enumerate(questions)
    ]
    planned = plan(schemas.to_table(samples, schemas.SAMPLES).select(COLUMNS), 2)
    rows = [row for start in range(0, 22, 5) for row in sampler(planned.slice(start, 5)).to_pylist()]
    assert sampler._prompt.cache_info().currsize == 3
    writer = PromptWriter(load_processor(f"{tmp_path}/model"))
    asked = [question for question in questions if writer.prompt(question) is not None for _ in range(2)]
    assert len(asked) == 20
    assert [request["prompt_token_ids"] for request in sampler._engine.requests] == [
        writer.narrow_prompt(question) for question in asked
    ]
    assert {row["sample_id"] for row in rows if row[schemas.DROP_REASON]} == {"2"}
    kept = {row["sample_id"]: row["prompt_sha256"] for row in rows if not row[schemas.DROP_REASON]}
    assert len(set(kept.values())) == 10
