"""The objective: weighted preference losses over text and visual pairs, with the terms that keep them in place. Plain torch.

With Δ_w = log π(y_w|x) − log π_ref(y_w|x) and Δ_l = log π(y_l|x*) − log π_ref(y_l|x*) (sums over response tokens, nats), a pair
has the loss ℓ(m) of its margin m = Δ_w − Δ_l and the weight u = s' (text pairs) or s'·c_visual (visual pairs); a step minimises

    L = Σ u·ℓ(m) / Σ u  +  c_anchor · Σ u·a / Σ u  +  c_nll · Σ −log π(y_w|x) / Σ |y_w|  +  c_kl · Σ KL / Σ |y_w|

The last three terms are about answers that should be said, y_w for x, and count each of them once: where a text and a visual
pair share it, in the text pair alone, and a reversed visual pair, whose better side is the wrong answer on the noised image, has
none. With a visual pair for every text pair and c_anchor = 1 that is mDPO's sum of three losses, halved.

MMedPO (arXiv 2412.06141, equation 5) is ℓ(m) = −log σ(β·m) without the other terms. Denominators run over *all* pairs of the
step, on every rank and in every micro-batch, so they are arguments: the sum of what the micro-batches return is L, whatever
the number of ranks and accumulation steps. ``reduction="mean"`` is what the authors' code computes: Σ u·ℓ over the number of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedpo_ray.errors import UserError


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        loss: name in :data:`LOSSES`.
        beta: inverse temperature, > 0.
        label_smoothing: ε in [0, 0.5), the assumed share of swapped pairs (cdpo, robust).
        length_normalised: log-ratios per token rather than a sequence; ``None``: as the loss is published.
        simpo_margin: γ, the target margin of simpo.
        anchor_coefficient, anchor_margin: c_anchor and δ of a = −log σ(β·Δ_w − δ) (mDPO, arXiv 2406.11839).
        nll_coefficient: c_nll.
        kl_coefficient, kl_forward_share: c_kl, and λ of λ·KL(π_ref‖π) + (1 − λ)·KL(π‖π_ref) over the vocabulary.
        reduction: weighted_mean (over Σ u) or mean (over the number of pairs).
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool | None = None
    simpo_margin: float = 0.5
    anchor_coefficient: float = 0.0
    anchor_margin: float = 0.0
    nll_coefficient: float = 0.0
    kl_coefficient: float = 0.0
    kl_forward_share: float = 0.5
    reduction: Literal["weighted_mean", "mean"] = "weighted_mean"

    @property
    def form(self) -> LossForm:
        return LOSSES[self.loss]

    @property
    def per_token(self) -> bool:
        """Whether margins are of mean rather than summed log-probabilities."""
        return self.form.per_token if self.length_normalised is None else self.length_normalised

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probabilities enter the loss."""
        return self.form.needs_reference or self.anchor_coefficient > 0


PairLoss = Callable[[Tensor, Objective], Tensor]
"""(margins (N,), objective) → loss of each pair (N,)."""


@dataclass(frozen=True)
class LossForm:
    """A pair loss and what its margin is made of, as published.

    Attributes:
        function: margins to losses.
        per_token: log-ratios are means over tokens.
        needs_reference: log-ratios to the reference rather than log-probabilities.
    """

    function: PairLoss
    per_token: bool = False
    needs_reference: bool = True


def sigmoid_loss(margins: Tensor, objective: Objective) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7): −log σ(β·m)."""
    return -F.logsigmoid(objective.beta * margins)


def hinge_loss(margins: Tensor, objective: Objective) -> Tensor:
    """SLiC as DPO writes it (arXiv 2309.06657, equation 8): max(0, 1 − β·m)."""
    return torch.relu(1.0 - objective.beta * margins)


def ipo_loss(margins: Tensor, objective: Objective) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17): (m − 1/(2β))², m of means over tokens as its authors computed it."""
    return (margins - 1.0 / (2.0 * objective.beta)) ** 2


def cdpo_loss(margins: Tensor, objective: Objective) -> Tensor:
    """Conservative DPO (Mitchell 2023): cross-entropy to the label 1 − ε."""
    scaled, epsilon = objective.beta * margins, objective.label_smoothing
    return -(1.0 - epsilon) * F.logsigmoid(scaled) - epsilon * F.logsigmoid(-scaled)


def robust_loss(margins: Tensor, objective: Objective) -> Tensor:
    """Robust DPO (arXiv 2403.00409, equation 9): unbiased where a share ε of the pairs is swapped."""
    scaled, epsilon = objective.beta * margins, objective.label_smoothing
    kept, swapped = -F.logsigmoid(scaled), -F.logsigmoid(-scaled)
    return ((1.0 - epsilon) * kept - epsilon * swapped) / (1.0 - 2.0 * epsilon)


def simpo_loss(margins: Tensor, objective: Objective) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6): −log σ(β·m − γ), m of mean log-probabilities, no reference."""
    return -F.logsigmoid(objective.beta * margins - objective.simpo_margin)


LOSSES: Mapping[str, LossForm] = {
    "sigmoid": LossForm(sigmoid_loss),
    "hinge": LossForm(hinge_loss),
    "ipo": LossForm(ipo_loss, per_token=True),
    "cdpo": LossForm(cdpo_loss),
    "robust": LossForm(robust_loss),
    "simpo": LossForm(simpo_loss, per_token=True, needs_reference=False),
}

# A response whose tokens all have span weight 0 has no log-ratio either.
_FEWEST_TOKENS = 1e-6

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
    "kl",
    "non_finite",
)


@dataclass(frozen=True)
class Normaliser:
    """Denominators of one optimizer step, over all its pairs on all ranks.

    Attributes:
        weight: Σ u, the effective weights of the pairs.
        nll_tokens: Σ |y_w| in tokens, over the answers whose likelihood counts.
        pairs: number of pairs.
    """

    weight: float
    nll_tokens: int
    pairs: int = 0

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
        counts_nll: bool, its chosen answer enters the terms about likelihood, divergence and anchor (an answer shared by two
            pairs counts once).
    """

    weight: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    is_visual: Tensor
    counts_nll: Tensor


@dataclass(frozen=True)
class Side:
    """The policy's view of one side of N pairs; every tensor is (N,).

    Attributes:
        logps: Σ c_t · log π(token t), nats: c_t = 1, or less for tokens that both sides share (span weights).
        tokens: Σ c_t, what a mean over tokens divides by.
        likelihood: Σ log π(token t) over all tokens, nats; ``logps`` itself without span weights.
        num_tokens: tokens of the response.
        kl: Σ over tokens of the divergence from the reference, nats; ``None`` without that term.
    """

    logps: Tensor
    tokens: Tensor
    likelihood: Tensor
    num_tokens: Tensor
    kl: Tensor | None = None

    @classmethod
    def plain(cls, logps: Tensor, num_tokens: Tensor) -> Side:
        """A side without span weights and divergence."""
        return cls(logps, num_tokens, logps, num_tokens)


def preference_objective(
    chosen: Side, rejected: Side, pairs: PairBatch, total: Normaliser, objective: Objective
) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the step's loss.

    Args:
        chosen, rejected: the policy's log-probabilities.
        pairs: the pairs.
        total: denominators of the step.
        objective: what is minimised.

    Returns:
        The loss share (scalar, to be summed over micro-batches and ranks) and the sums named in :data:`SUMS`
        (detached float64).
    """
    chosen_ratios, rejected_ratios = _log_ratios(chosen, rejected, pairs, objective)
    # A pair without weight must not turn an infinite loss into NaN.
    counts = pairs.weight > 0
    per_pair = objective.form.function(chosen_ratios - rejected_ratios, objective)
    if objective.anchor_coefficient:
        rewards = objective.beta * (chosen.logps - pairs.ref_chosen) - objective.anchor_margin
        anchors = torch.where(pairs.counts_nll, -F.logsigmoid(rewards), 0.0)
        per_pair = per_pair + objective.anchor_coefficient * anchors
    denominator = total.weight if objective.reduction == "weighted_mean" else max(total.pairs, 1)
    share = (pairs.weight * torch.where(counts, per_pair, 0.0)).sum() / denominator
    nll_sum, nll_tokens = _nll(chosen, pairs.counts_nll)
    if objective.nll_coefficient:
        share = share + objective.nll_coefficient * nll_sum / max(total.nll_tokens, 1)
    kl_sum = torch.zeros_like(nll_sum)
    if chosen.kl is not None:
        kl_sum = torch.where(pairs.counts_nll, chosen.kl, 0.0).sum()
        share = share + objective.kl_coefficient * kl_sum / max(total.nll_tokens, 1)
    # Rows that only fill a batch still belong to the graph, so that every rank runs the same backward pass.
    share = share + 0.0 * (torch.nan_to_num(chosen.logps).sum() + torch.nan_to_num(rejected.logps).sum())
    with torch.no_grad():
        chosen_rewards, rejected_rewards = objective.beta * chosen_ratios, objective.beta * rejected_ratios
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
            kl=kl_sum,
            non_finite=(~torch.isfinite(per_pair))[counts].sum(),
        )
    return share, sums


def sft_objective(chosen: Side, pairs: PairBatch, total: Normaliser) -> tuple[Tensor, Tensor]:
    """Supervised fine-tuning: the mean negative log-likelihood per token of the step's chosen answers.

    Args and returns: as :func:`preference_objective`.
    """
    nll_sum, nll_tokens = _nll(chosen, pairs.counts_nll)
    share = nll_sum / max(total.nll_tokens, 1) + 0.0 * torch.nan_to_num(chosen.likelihood).sum()
    with torch.no_grad():
        sums = _sums(
            loss=share,
            nll=nll_sum,
            nll_tokens=nll_tokens,
            non_finite=(~torch.isfinite(chosen.likelihood))[pairs.counts_nll].sum(),
        )
    return share, sums


def kl_divergence(logits: Tensor, reference_logits: Tensor, forward_share: float) -> Tensor:
    """λ·KL(π_ref‖π) + (1 − λ)·KL(π‖π_ref) of next-token distributions, exact over the vocabulary.

    Args:
        logits, reference_logits: (E, V).
        forward_share: λ in [0, 1].

    Returns:
        (E,) nats.
    """
    logp, ref = F.log_softmax(logits.float(), -1), F.log_softmax(reference_logits.float(), -1)
    forward = (ref.exp() * (ref - logp)).sum(-1)
    backward = (logp.exp() * (logp - ref)).sum(-1)
    return forward_share * forward + (1.0 - forward_share) * backward


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
        "kl": mean(value["kl"], value["nll_tokens"]) if value["kl"] else None,
    }


def _log_ratios(
    chosen: Side, rejected: Side, pairs: PairBatch, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Δ_w and Δ_l (N,): to the reference where the loss has one, per token where it is normalised by length."""
    ratios = []
    for side, reference in ((chosen, pairs.ref_chosen), (rejected, pairs.ref_rejected)):
        ratio = side.logps - reference if objective.form.needs_reference else side.logps
        ratios.append(ratio / side.tokens.clamp_min(_FEWEST_TOKENS) if objective.per_token else ratio)
    return ratios[0], ratios[1]


def _nll(chosen: Side, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Σ −log π(y_w|x) and Σ |y_w| over the answers that count."""
    return -torch.where(counts, chosen.likelihood, 0.0).sum(), (chosen.num_tokens * counts).sum()


def _sums(**values: Tensor) -> Tensor:
    first = next(iter(values.values()))
    zero = torch.zeros((), dtype=torch.float64, device=first.device)
    return torch.stack([values[name].detach().double() if name in values else zero for name in SUMS])
