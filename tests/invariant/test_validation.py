"""Held-out images: never trained on, measured alike however a run is spread, and the best of them decides."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from align_compare import assert_same_training, trained

from mmedpo_ray.align.checkpoint.checkpoint import Checkpoint, checkpoint_folders, load_best_checkpoint
from mmedpo_ray.align.data.batch import ImageLoader, pack_pairs, pair_batch
from mmedpo_ray.align.data.pair_source import StoredPairs
from mmedpo_ray.align.losses import Normaliser, ResponseLogps, preference_objective
from mmedpo_ray.align.metrics import read_metrics
from mmedpo_ray.align.policy import build_policy
from mmedpo_ray.models.loading import load_processor
from mmedpo_ray.models.prompts import PromptWriter

if TYPE_CHECKING:
    from conftest import Runs

pytestmark = pytest.mark.engine


def test_held_out_images_are_not_trained_on(runs: Runs) -> None:
    plan = json.loads((runs.folder / "best/plan.json").read_text())
    assert (plan["images"], plan["validation_images"]) == (4, 2)
    assert plan["pairs"] + plan["validation_pairs"] == plan["rows_in"] == 24
    assert "validation_loss" not in read_metrics(runs.folder / "plain")[-1]


def test_the_figures_are_the_objective_over_all_held_out_pairs_at_once(runs: Runs) -> None:
    """The best checkpoint, loaded into plain torch, has the loss that is written beside it."""
    spec = runs.spec
    align = spec.align
    found = load_best_checkpoint(runs.folder / "best", spec.key)
    assert found is not None
    policy = build_policy(spec)
    policy.load_parameters(found.parameter)
    writer = PromptWriter(load_processor(spec.model))
    _, held_out = StoredPairs(spec.prepared, writer, align).hold_out(0.34, spec.seed)
    assert held_out is not None
    rows, _ = held_out.index.rows(np.arange(held_out.index.num_images))
    apart = held_out.load(rows.tolist())
    batch = pack_pairs(apart, ImageLoader(writer), writer.pad_token_id, both_sides=True)
    total = Normaliser(
        weight=sum(pair.weight for pair in apart),
        nll_tokens=sum(len(pair.chosen) for pair in apart if pair.counts_nll),
        pairs=len(apart),
    )
    with torch.no_grad():
        sides = ResponseLogps(*policy(batch)).sides(len(apart))
        loss, _ = preference_objective(*sides, pair_batch(apart), total, spec.align)
    assert found.validation_loss == pytest.approx(loss.item(), rel=1e-4)


def test_the_best_checkpoint_outlives_the_last_ones_and_is_what_comes_out(runs: Runs) -> None:
    losses = {row["step"]: row["validation_loss"] for row in read_metrics(runs.folder / "best")}
    best = min(losses, key=losses.__getitem__)
    assert best < max(losses), "the last must not be the best, or nothing is told apart"
    folders = checkpoint_folders(runs.folder / "best")
    assert [path.name for path in folders] == [f"step-{best:06d}", "step-000004"]
    kept, last = (Checkpoint(path) for path in folders)
    assert kept.validation_loss == losses[best]
    learnt = trained(runs.folder / "best")
    for name in kept.names:
        stored = learnt[name.replace(".default", "")]
        assert torch.equal(stored, kept.parameter(name))
        assert not torch.equal(stored, last.parameter(name))


def test_a_resumed_run_keeps_the_best(runs: Runs) -> None:
    assert_same_training(runs.folder / "best_resumed", runs.folder / "best", tolerance=1e-6)
    names = [
        [path.name for path in checkpoint_folders(runs.folder / name)] for name in ("best", "best_resumed")
    ]
    assert names[0] == names[1]
