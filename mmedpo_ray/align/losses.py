"""The objective: weighted DPO over text and visual pairs, with an anchor on the chosen answers. Plain torch.

With Δ_w = log π(y_w|x) − log π_ref(y_w|x), Δ_l = log π(y_l|x*) − log π_ref(y_l|x*) (sums over response tokens, nats), the
MMedPO loss of a pair is ℓ = −log σ(β·(Δ_w − Δ_l)), its weight s' (arXiv 2412.06141, equation 5), and a step minimises

    L = Σ u·ℓ / Σ u  +  c_nll · Σ −log π(y_w|x) / Σ |y_w|,      u = s' (text pairs), s'·c_visual (visual pairs)

Both denominators run over *all* pairs of the step, on every rank and in every micro-batch, so they are arguments: the
sum of what the micro-batches return is L, whatever the number of ranks and accumulation steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedpo_ray.errors import UserError

PairLoss = Callable[[Tensor, Tensor, float], Tensor]
"""(Δ_w (N,), Δ_l (N,), β) → loss of each pair (N,)."""


def sigmoid_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7): −log σ(β·(Δ_w − Δ_l))."""
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))


LOSSES: Mapping[str, PairLoss] = {"sigmoid": sigmoid_loss}

# What a micro-batch reports: plain sums, so that adding them over micro-batches and ranks is the whole step.
SUMS = (
    "loss",
    "text_pairs",
    "visual_pairs",
    "text_correct",
    "visual_correct",
    "text_margin",
    "visual_margin",
    "chosen_reward",
    "rejected_reward",
    "nll",
    "nll_tokens",
    "non_finite",
)


@dataclass(frozen=True)
class Normaliser:
    """Denominators of one optimizer step, over all its pairs on all ranks.

    Attributes:
        weight: Σ u, the effective weights of the pairs.
        nll_tokens: Σ |y_w| in tokens, over the answers whose likelihood counts.
    """

    weight: float
    nll_tokens: int

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise UserError(
                "the weights of one optimizer step add up to 0, so nothing could be learnt. Check the column `weight` of "
                "the scored table and score.weights."
            )


@dataclass(frozen=True)
class PairBatch:
    """What the objective knows of N pairs besides the policy's log-probabilities; every tensor is (N,).

    Attributes:
        weight: effective weight u ≥ 0; 0 takes a pair out of the loss.
        ref_chosen, ref_rejected: reference log-probabilities, sums over response tokens, nats.
        is_visual: bool, the pair disprefers an image rather than an answer.
        counts_nll: bool, its chosen answer enters the likelihood term (an answer shared by two pairs counts once).
    """

    weight: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    is_visual: Tensor
    counts_nll: Tensor


def dpo_objective(
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: Tensor,
    pairs: PairBatch,
    total: Normaliser,
    *,
    beta: float,
    nll_coefficient: float = 0.0,
    loss: str = "sigmoid",
) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the step's loss.

    Args:
        chosen, rejected: policy log-probabilities (N,), sums over response tokens, nats.
        chosen_tokens: tokens of the chosen answers (N,).
        pairs: the pairs.
        total: denominators of the step.
        beta: inverse temperature, > 0.
        nll_coefficient: weight of the likelihood term, ≥ 0.
        loss: name in :data:`LOSSES`.

    Returns:
        The loss share (scalar, to be summed over micro-batches and ranks) and the sums named in :data:`SUMS`
        (detached float64).
    """
    chosen_logratios = chosen - pairs.ref_chosen
    rejected_logratios = rejected - pairs.ref_rejected
    # A pair without weight must not turn an infinite loss into NaN.
    counts = pairs.weight > 0
    per_pair = LOSSES[loss](chosen_logratios, rejected_logratios, beta)
    share = (pairs.weight * torch.where(counts, per_pair, 0.0)).sum() / total.weight
    nll_sum, nll_tokens = _nll(chosen, chosen_tokens, pairs.counts_nll)
    if nll_coefficient:
        share = share + nll_coefficient * nll_sum / max(total.nll_tokens, 1)
    # Rows that only fill a batch still belong to the graph, so that every rank runs the same backward pass.
    share = share + 0.0 * (torch.nan_to_num(chosen).sum() + torch.nan_to_num(rejected).sum())
    with torch.no_grad():
        chosen_rewards, rejected_rewards = beta * chosen_logratios, beta * rejected_logratios
        margin = chosen_rewards - rejected_rewards
        text, visual = counts & ~pairs.is_visual, counts & pairs.is_visual
        sums = _sums(
            loss=share,
            text_pairs=text.sum(),
            visual_pairs=visual.sum(),
            text_correct=(margin > 0)[text].sum(),
            visual_correct=(margin > 0)[visual].sum(),
            text_margin=margin[text].sum(),
            visual_margin=margin[visual].sum(),
            chosen_reward=chosen_rewards[counts].sum(),
            rejected_reward=rejected_rewards[counts].sum(),
            nll=nll_sum,
            nll_tokens=nll_tokens,
            non_finite=(~torch.isfinite(per_pair))[counts].sum(),
        )
    return share, sums


def sft_objective(
    chosen: Tensor, chosen_tokens: Tensor, pairs: PairBatch, total: Normaliser
) -> tuple[Tensor, Tensor]:
    """Supervised fine-tuning: the mean negative log-likelihood per token of the step's chosen answers.

    Args and returns: as :func:`dpo_objective`.
    """
    nll_sum, nll_tokens = _nll(chosen, chosen_tokens, pairs.counts_nll)
    share = nll_sum / max(total.nll_tokens, 1) + 0.0 * torch.nan_to_num(chosen).sum()
    with torch.no_grad():
        sums = _sums(
            loss=share,
            nll=nll_sum,
            nll_tokens=nll_tokens,
            non_finite=(~torch.isfinite(chosen))[pairs.counts_nll].sum(),
        )
    return share, sums


def summarise(sums: Tensor) -> dict[str, float | None]:
    """The figures of a whole step from its summed :data:`SUMS`; ``None`` where there was no such pair."""
    value = dict(zip(SUMS, sums.tolist(), strict=True))
    text, visual = value["text_pairs"], value["visual_pairs"]
    pairs = text + visual

    def mean(total: float, count: float) -> float | None:
        return total / count if count else None

    return {
        "loss": value["loss"],
        "pairs": pairs,
        "reward_margin": mean(value["text_margin"] + value["visual_margin"], pairs),
        "reward_accuracy": mean(value["text_correct"] + value["visual_correct"], pairs),
        "reward_margin_text": mean(value["text_margin"], text),
        "reward_accuracy_text": mean(value["text_correct"], text),
        "reward_margin_visual": mean(value["visual_margin"], visual),
        "reward_accuracy_visual": mean(value["visual_correct"], visual),
        "reward_chosen": mean(value["chosen_reward"], pairs),
        "reward_rejected": mean(value["rejected_reward"], pairs),
        "nll": mean(value["nll"], value["nll_tokens"]),
    }


def _nll(chosen: Tensor, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Σ −log π(y_w|x) and Σ |y_w| over the answers that count."""
    return -torch.where(counts, chosen, 0.0).sum(), (tokens * counts).sum()


def _sums(**values: Tensor) -> Tensor:
    first = next(iter(values.values()))
    zero = torch.zeros((), dtype=torch.float64, device=first.device)
    return torch.stack([values[name].detach().double() if name in values else zero for name in SUMS])
