"""The objective on hand-made log-probabilities."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs_in_memory import plain_side

from mmedpo_ray.align.losses import (
    SUMS,
    Normaliser,
    PairBatch,
    PairLoss,
    preference_objective,
    sft_objective,
    sigmoid,
    summarise,
)
from mmedpo_ray.align.settings import LOSSES, AlignConfig


def pair_batch(weights: list[float], **changes: list) -> PairBatch:
    count = len(weights)
    return PairBatch(
        weight=torch.tensor(weights),
        ref_chosen=torch.tensor(changes.get("ref_chosen", [-5.0] * count)),
        ref_rejected=torch.tensor(changes.get("ref_rejected", [-6.0] * count)),
        is_visual=torch.tensor(changes.get("is_visual", [False] * count)),
        counts_nll=torch.tensor(changes.get("counts_nll", [True] * count)),
    )


def dpo_objective(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    tokens: torch.Tensor,
    pairs: PairBatch,
    total: Normaliser,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return preference_objective(
        plain_side(chosen, tokens), plain_side(rejected, tokens), pairs, total, AlignConfig(**settings)
    )


def test_loss_without_a_preference_is_log_two() -> None:
    zeros = torch.zeros(3)
    assert torch.allclose(sigmoid.function(zeros, AlignConfig()), torch.full((3,), math.log(2)))


def test_a_pair_counts_in_proportion_to_its_weight() -> None:
    chosen, rejected, tokens = torch.tensor([-4.0, -9.0]), torch.tensor([-8.0, -3.0]), torch.tensor([2, 2])
    weights = [0.75, 1.25]
    loss, _ = dpo_objective(chosen, rejected, tokens, pair_batch(weights), Normaliser(2.0, 4), beta=0.5)
    single = [-math.log(1 / (1 + math.exp(-0.5 * margin))) for margin in (1 - (-2), -4 - 3)]
    assert loss.item() == pytest.approx((0.75 * single[0] + 1.25 * single[1]) / 2.0, rel=1e-6)


def test_nll_is_the_mean_over_tokens_of_answers_that_count() -> None:
    chosen, tokens = torch.tensor([-4.0, -9.0, -100.0]), torch.tensor([2, 3, 7])
    pairs = pair_batch([1.0, 1.0, 1.0], counts_nll=[True, True, False])
    total = Normaliser(3.0, 5)
    plain, _ = dpo_objective(chosen, chosen, tokens, pairs, total, beta=0.1)
    anchored, sums = dpo_objective(chosen, chosen, tokens, pairs, total, beta=0.1, nll_coefficient=2.0)
    assert (anchored - plain).item() == pytest.approx(2.0 * 13.0 / 5.0, rel=1e-6)
    assert summarise(sums)["nll"] == pytest.approx(13.0 / 5.0)
    assert sft_objective(plain_side(chosen, tokens), pairs, total)[0].item() == pytest.approx(13.0 / 5.0)


def test_a_weightless_pair_gives_neither_loss_nor_gradient_even_where_it_overflows() -> None:
    chosen = torch.tensor([-4.0, -float("inf")], requires_grad=True)
    rejected = torch.tensor([-8.0, -1.0], requires_grad=True)
    pairs = pair_batch([1.0, 0.0], counts_nll=[True, False])
    loss, sums = dpo_objective(
        chosen, rejected, torch.tensor([2, 2]), pairs, Normaliser(1.0, 2), beta=0.1, nll_coefficient=1.0
    )
    loss.backward()
    assert math.isfinite(loss.item())
    assert chosen.grad is not None and chosen.grad[0] != 0 and chosen.grad[1] == 0
    assert rejected.grad is not None and rejected.grad[1] == 0
    assert sums[SUMS.index("non_finite")] == 0


def test_overflow_of_a_pair_that_counts_is_reported() -> None:
    chosen = torch.tensor([-4.0, float("nan")])
    _, sums = dpo_objective(
        chosen,
        torch.tensor([-8.0, -1.0]),
        torch.tensor([2, 2]),
        pair_batch([1.0, 1.0]),
        Normaliser(2.0, 4),
        beta=0.1,
    )
    assert sums[SUMS.index("non_finite")] == 1


def _minus_log_sigmoid(value: float) -> float:
    return math.log(1.0 + math.exp(-value))


def test_the_anchor_holds_each_right_answer_once_as_in_mdpo() -> None:
    """A text and a visual pair share (x, y); the better side of a reversed pair, a wrong answer, has no
    anchor."""
    beta, margin, weight = 0.5, 0.2, 0.8
    chosen, rejected = torch.tensor([-4.0, -4.0, -7.0]), torch.tensor([-8.0, -6.5, -4.5])
    tokens = torch.tensor([2, 2, 3])
    pairs = pair_batch(
        [weight, weight, 0.5 * weight], is_visual=[False, True, True], counts_nll=[True, False, False]
    )
    settings = {"beta": beta, "anchor_coefficient": 2.0, "anchor_margin": margin}
    loss, _ = dpo_objective(chosen, rejected, tokens, pairs, Normaliser(2.5 * weight, 2, 3), **settings)
    ratios = [(-4 + 5, -8 + 6), (-4 + 5, -6.5 + 6), (-7 + 5, -4.5 + 6)]
    single = [_minus_log_sigmoid(beta * (better - worse)) for better, worse in ratios]
    anchor = _minus_log_sigmoid(beta * ratios[0][0] - margin)
    expected = (single[0] + single[1] + 0.5 * single[2] + 2.0 * anchor) / 2.5
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # mDPO without reversed pairs: three losses of one preference, halved since two pairs share it.
    two = pair_batch([1.0, 1.0], is_visual=[False, True], counts_nll=[True, False])
    settings |= {"anchor_coefficient": 1.0}
    loss, _ = dpo_objective(chosen[:2], rejected[:2], tokens[:2], two, Normaliser(2.0, 2, 2), **settings)
    assert loss.item() == pytest.approx((single[0] + single[1] + anchor) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Log-ratios 1 and -2 of 2 and 4 tokens, β = 0.5.
        ("sigmoid", _minus_log_sigmoid(1.5)),
        ("hinge", 0.0),
        ("ipo", (0.5 + 0.5 - 1.0) ** 2),
        ("cdpo", 0.8 * _minus_log_sigmoid(1.5) + 0.2 * _minus_log_sigmoid(-1.5)),
        ("robust", (0.8 * _minus_log_sigmoid(1.5) - 0.2 * _minus_log_sigmoid(-1.5)) / 0.6),
        # Log-probabilities -4 / 2 and -8 / 4: a margin of 0 falls short of γ.
        ("simpo", _minus_log_sigmoid(-0.7)),
    ],
)
def test_each_loss_is_its_formula(loss: str, expected: float) -> None:
    settings = {"beta": 0.5, "loss": loss, "simpo_margin": 0.7}
    settings |= {"label_smoothing": 0.2} if loss in ("cdpo", "robust") else {}
    value, _ = preference_objective(
        plain_side(torch.tensor([-4.0]), torch.tensor([2])),
        plain_side(torch.tensor([-8.0]), torch.tensor([4])),
        pair_batch([1.0]),
        Normaliser(1.0, 2, 1),
        AlignConfig(**settings),
    )
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_the_mean_is_over_pairs_not_weights() -> None:
    """What the authors' code computes: mean(w · loss), a pair without weight included."""
    chosen, rejected = torch.tensor([-4.0, -9.0, -5.0]), torch.tensor([-8.0, -3.0, -6.0])
    pairs = pair_batch([0.3, 0.9, 0.0])
    loss, _ = dpo_objective(
        chosen, rejected, torch.tensor([2, 2, 2]), pairs, Normaliser(1.2, 6, 3), beta=0.5, reduction="mean"
    )
    single = [_minus_log_sigmoid(0.5 * margin) for margin in (1 - (-2), -4 - 3)]
    assert loss.item() == pytest.approx((0.3 * single[0] + 0.9 * single[1]) / 3, rel=1e-6)


def test_figures_are_told_apart_by_kind() -> None:
    chosen, rejected = torch.tensor([-4.0, -9.0, -4.0]), torch.tensor([-8.0, -3.0, -8.0])
    pairs = pair_batch([1.0, 1.0, 1.0], is_visual=[False, True, True])
    figures = summarise(
        dpo_objective(chosen, rejected, torch.tensor([1, 1, 1]), pairs, Normaliser(3.0, 3), beta=1.0)[1]
    )
    assert figures["reward_accuracy_text"] == 1.0
    assert figures["reward_accuracy_visual"] == 0.5
    assert figures["reward_margin_text"] == pytest.approx(3.0)
    assert figures["reward_margin"] == pytest.approx((3.0 - 7.0 + 3.0) / 3)
    assert figures["reward_chosen"] == pytest.approx((1.0 - 4.0 + 1.0) / 3)


def test_figures_of_absent_pairs_are_none() -> None:
    figures = summarise(
        sft_objective(
            plain_side(torch.tensor([-4.0]), torch.tensor([2])), pair_batch([1.0]), Normaliser(1.0, 2)
        )[1]
    )
    assert figures["reward_margin"] is None
    assert figures["nll"] == pytest.approx(2.0)


def test_another_package_adds_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no loss 'squared'"):
        AlignConfig(loss="squared")
    entry = SimpleNamespace(load=lambda: PairLoss(lambda margins, align: align.beta * margins**2))
    monkeypatch.setitem(vars(LOSSES), "_added", {"squared": entry})
    chosen, rejected, tokens = torch.tensor([-4.0]), torch.tensor([-8.0]), torch.tensor([2])
    loss, _ = dpo_objective(
        chosen, rejected, tokens, pair_batch([1.0]), Normaliser(1.0, 2), loss="squared", beta=2.0
    )
    assert loss.item() == pytest.approx(2.0 * 3.0**2)


@given(
    margins=st.lists(st.floats(-20, 20), min_size=2, max_size=12),
    weights=st.lists(st.floats(0.1, 2.0), min_size=12, max_size=12),
    cut=st.integers(1, 11),
)
def test_shares_of_micro_batches_add_up_to_the_whole(
    margins: list[float], weights: list[float], cut: int
) -> None:
    weights, cut = weights[: len(margins)], min(cut, len(margins) - 1)
    chosen, rejected = torch.tensor(margins), torch.zeros(len(margins))
    tokens = torch.arange(1, len(margins) + 1)
    total = Normaliser(sum(weights), int(tokens.sum()))

    def share(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = pair_batch(weights[part])
        return dpo_objective(
            chosen[part], rejected[part], tokens[part], pairs, total, beta=0.3, nll_coefficient=0.5
        )

    whole = share(slice(None))
    parts = [share(slice(None, cut)), share(slice(cut, None))]
    assert sum(part[0] for part in parts).item() == pytest.approx(whole[0].item(), rel=1e-4, abs=1e-5)
    assert torch.allclose(parts[0][1] + parts[1][1], whole[1], rtol=1e-4, atol=1e-4)
