"""The same updates in every way: plain torch, ZeRO-3 on one rank, on two, in small micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from align_compare import adapter, assert_same_training, trained
from align_world import with_settings

from mmedpo_ray.align.checkpoint.checkpoint import checkpoint_folders, load_last_checkpoint
from mmedpo_ray.align.data.batch import ImageLoader, pack_pairs, pair_batch
from mmedpo_ray.align.data.pair_source import StoredPairs
from mmedpo_ray.align.losses import ResponseLogps, preference_objective
from mmedpo_ray.align.metrics import read_metrics
from mmedpo_ray.align.plan.plan import Plan
from mmedpo_ray.align.policy import build_policy, learning_rate_factor
from mmedpo_ray.align.stage import _raise_user_error
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter

if TYPE_CHECKING:
    from conftest import Runs

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "name",
    [
        "accumulated",
        "token_budget",
        "two_ranks",
        "two_ranks_accumulated",
        "zero_two",
        "released",
        "checkpointing",
        "ddp",
        "ddp_two_ranks",
    ],
)
def test_the_way_of_computing_does_not_matter(runs: Runs, name: str) -> None:
    assert_same_training(runs.folder / name, runs.folder / "plain")


def test_every_term_at_once_is_the_same_on_two_sharded_ranks(runs: Runs) -> None:
    """ZeRO-3 switches the adapter off inside its forward; one rank holds everything."""
    assert_same_training(runs.folder / "all_terms_two_ranks", runs.folder / "all_terms")
    assert_same_training(runs.folder / "all_terms_released", runs.folder / "all_terms")
    rows = read_metrics(runs.folder / "all_terms")
    assert rows[0]["reward_margin"] == pytest.approx(0.0, abs=1e-6), "policy and reference begin as one model"
    assert rows[-1]["kl"] > 0
    assert rows[0]["pairs"] == 15, "three images with three text pairs, a visual and a reversed pair each"


@pytest.mark.parametrize("name", ["full_two_ranks", "full_moved"])
def test_all_weights_train_the_same_on_sharded_ranks(runs: Runs, name: str) -> None:
    assert_same_training(runs.folder / name, runs.folder / "full")


def test_bf16_computes_the_same_training_up_to_its_rounding(runs: Runs) -> None:
    """Weights and activations have eight bits; updates are exact all the same, whatever the strategy."""
    ways = ("plain", "bf16", "bf16_ddp", "bf16_zero_two", "bf16_accumulated")
    exact, *rounded = (runs.folder / name for name in ways)
    for folder in rounded:
        for row, other in zip(read_metrics(folder), read_metrics(exact), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=0.05), row["step"]
        found, expected = trained(folder), trained(exact)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.dtype is torch.float32
            # Four updates of 2e-3 at most; Adam's first ones have the sign of the gradient.
            close = (value - expected[name]).abs() < 1e-3
            assert close.float().mean() > 0.9, name


def test_full_training_leaves_the_tower_alone_and_moves_the_rest(runs: Runs) -> None:
    base = load_model(runs.spec.model, torch.float32)
    found = trained(runs.folder / "full")
    expected = {name for name, _ in base.named_parameters() if "vision_tower" not in name}
    assert found.keys() == expected
    for name, value in found.items():
        assert not torch.equal(value, base.get_parameter(name)), f"{name} did not move"
    assert not (runs.folder / "full/adapter").exists()


def test_a_projector_beside_lora_is_the_same_on_sharded_ranks(runs: Runs) -> None:
    """With the adapter off the original projector is at work: policy and reference begin as one."""
    assert_same_training(runs.folder / "projector_two_ranks", runs.folder / "projector")
    rows = read_metrics(runs.folder / "projector")
    assert rows[0]["reward_margin"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["kl"] > 0
    base = load_model(runs.spec.model, torch.float32)
    found = trained(runs.folder / "projector")
    whole = [name for name in found if ".lora_" not in name]
    assert whole and all("multi_modal_projector" in name for name in whole)
    for name in whole:
        before = base.get_parameter(name.removeprefix("base_model.model."))
        assert not torch.equal(found[name], before), f"{name} did not move"


def test_deepspeed_does_what_plain_torch_does(runs: Runs) -> None:
    """The objective over each whole step, torch's AdamW and clipping, without DeepSpeed or micro-batches."""
    spec = runs.spec
    align = spec.align
    writer = PromptWriter(load_processor(spec.model))
    plan = Plan(StoredPairs(spec.prepared, writer, align), align, spec.seed)
    policy = build_policy(spec)
    parameters = policy.trained_parameters()
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=align.learning_rate, weight_decay=align.weight_decay
    )
    images = ImageLoader(writer)
    assert align.max_steps is not None
    for step, row in enumerate(read_metrics(runs.folder / "plain")):
        chosen_pairs = plan.step_pairs(step)
        batch = pack_pairs(chosen_pairs, images, writer.pad_token_id, both_sides=True)
        out = ResponseLogps(*policy(batch))
        count = len(chosen_pairs)
        loss, _ = preference_objective(
            *out.sides(count), pair_batch(chosen_pairs), plan.normaliser(step), spec.align
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), align.max_grad_norm)
        factor = learning_rate_factor(align.scheduler, step, align.max_steps, align.warmup_ratio)
        optimizer.param_groups[0]["lr"] = align.learning_rate * factor
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert norm > align.max_grad_norm, "clipping must be at work, or it is not compared"
    learnt = adapter(runs.folder / "plain")
    for name, value in parameters.items():
        stored = learnt[name.replace(".default", "")]
        assert torch.allclose(value.detach(), stored, rtol=0, atol=2e-5), name


def test_the_control_takes_as_many_updates_on_the_same_images(runs: Runs) -> None:
    control, aligned = (read_metrics(runs.folder / name) for name in ("sft", "plain"))
    assert [row["epoch"] for row in control] == [row["epoch"] for row in aligned]
    assert control[0]["nll"] == pytest.approx(aligned[0]["nll"], rel=1e-4), (
        "the same answers of the same images"
    )
    assert control[0]["loss"] == pytest.approx(control[0]["nll"], rel=1e-5)
    assert control[-1]["reward_margin"] is None
    assert control[0]["tokens"] < aligned[0]["tokens"], "rejected sides are not computed"


def test_a_loss_that_is_no_number_stops_all_ranks_and_names_the_pairs(runs: Runs) -> None:
    spec = with_settings(runs.spec, runs.folder / "overflow")
    with pytest.raises(UserError, match=r"step \d is not finite.*pairs s00\d"):
        _raise_user_error(spec)
    assert not (spec.folder / "adapter").exists()


def test_the_last_good_checkpoint_outlives_a_loss_that_is_no_number(runs: Runs) -> None:
    folder = runs.folder / "broken"
    with pytest.raises(UserError, match=r"step 3 is not finite.*reference overflow for pairs s00\d"):
        _raise_user_error(with_settings(runs.spec, folder))
    assert [path.name for path in checkpoint_folders(folder)] == ["step-000002"]
    kept = load_last_checkpoint(folder, runs.spec.key)
    assert kept is not None
    assert kept.names
    for name in kept.names:
        values = (kept.parameter(name), kept.moment("exp_avg", name), kept.moment("exp_avg_sq", name))
        assert all(torch.isfinite(value).all() for value in values), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other_reference", r"differ from those of .* nats per token"),
        ("stale_reference", r"made under other settings \(key test, now now\)"),
    ],
)
def test_a_reference_of_another_model_is_refused(runs: Runs, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _raise_user_error(with_settings(runs.spec, runs.folder / name))
    assert not (runs.folder / name / "adapter").exists()
