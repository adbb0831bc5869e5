"""The objective: weighted preference losses over text and visual pairs, in plain torch.

With Δ_w = log π(y_w|x) − log π_ref(y_w|x) and Δ_l = log π(y_l|x*) − log π_ref(y_l|x*) (sums over response
tokens, nats), a pair has the loss ℓ(m) of its margin m = Δ_w − Δ_l and the weight u = s' (text pairs) or
s'·c_visual (visual pairs). A step minimises

    L = Σ u·ℓ(m) / Σ u  +  c_anchor · Σ u·a / Σ u  +  c_nll · Σ −log π(y_w|x) / Σ |y_w|  +  c_kl · Σ KL / Σ
    |y_w|

The last three terms are about right answers y_w for x, and count each of them once: an answer that a text and
a visual pair share counts in the text pair only. A reversed visual pair counts in none of them, because its
chosen side is the wrong answer on the noised image. With a visual pair for every text pair and c_anchor = 1
this is mDPO's sum of three losses, halved.

MMedPO (arXiv 2412.06141, equation 5) is ℓ(m) = −log σ(β·m) without the other terms. The denominators run over
*all* pairs of the step, on every rank and in every micro-batch. They are arguments here, so the sum of what
the micro-batches return is L for any number of ranks and accumulation steps. ``reduction: mean`` is what the
authors' code computes: Σ u·ℓ over the number of pairs.

A new loss is one function below with :class:`PairLoss` around it, and its name in ``align/settings.py``;
another package adds one by an entry point in the group ``mmedpo_ray.losses``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmedpo_ray.align.settings import LOSSES, AlignConfig


@dataclass(frozen=True)
class PairLoss:
    """A loss of margins, and how the margin is defined where the loss was published.

    Attributes:
        function: (margins (N,), settings) → loss of each pair (N,).
        per_token: log-ratios are means over tokens rather than sums.
        needs_reference: the margin is of log-ratios to the reference rather than of log-probabilities.
    """

    function: Callable[[Tensor, AlignConfig], Tensor]
    per_token: bool = False
    needs_reference: bool = True


@PairLoss
def sigmoid(margins: Tensor, align: AlignConfig) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7): −log σ(β·m)."""
    return -F.logsigmoid(align.beta * margins)


@PairLoss
def hinge(margins: Tensor, align: AlignConfig) -> Tensor:
    """SLiC as DPO writes it (arXiv 2309.06657, equation 8): max(0, 1 − β·m)."""
    return torch.relu(1.0 - align.beta * margins)


@partial(PairLoss, per_token=True)
def ipo(margins: Tensor, align: AlignConfig) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17): (m − 1/(2β))², of means over tokens as in its authors' code."""
    return (margins - 1.0 / (2.0 * align.beta)) ** 2


@PairLoss
def cdpo(margins: Tensor, align: AlignConfig) -> Tensor:
    """Conservative DPO (Mitchell 2023): cross-entropy to the label 1 − ε."""
    scaled, epsilon = align.beta * margins, align.label_smoothing
    return -(1.0 - epsilon) * F.logsigmoid(scaled) - epsilon * F.logsigmoid(-scaled)


@PairLoss
def robust(margins: Tensor, align: AlignConfig) -> Tensor:
    """Robust DPO (arXiv 2403.00409, equation 9): unbiased if a share ε of the pairs is swapped."""
    scaled, epsilon = align.beta * margins, align.label_smoothing
    kept, swapped = -F.logsigmoid(scaled), -F.logsigmoid(-scaled)
    return ((1.0 - epsilon) * kept - epsilon * swapped) / (1.0 - 2.0 * epsilon)


@partial(PairLoss, per_token=True, needs_reference=False)
def simpo(margins: Tensor, align: AlignConfig) -> Tensor:
    """SimPO (arXiv 2405.14734, equation 6): −log σ(β·m − γ), of mean log-probabilities, without reference."""
    return -F.logsigmoid(align.beta * margins - align.simpo_margin)


def reference_source(align: AlignConfig) -> Literal["precomputed", "online"] | None:
    """``align.reference`` if reference log-probabilities enter the loss, else ``None``."""
    uses_reference = LOSSES[align.loss].needs_reference or align.anchor_coefficient > 0
    return align.reference if align.objective == "dpo" and uses_reference else None


# A response whose tokens all have span weight 0 has no log-ratio either.
_FEWEST_TOKENS = 1e-6

SUMS = (
    *("loss", "text_pairs", "visual_pairs", "text_correct", "visual_correct", "text_margin"),
    *("visual_margin", "chosen_reward", "rejected_reward", "nll", "nll_tokens", "kl", "non_finite"),
)
"""Sums that a micro-batch reports; added over micro-batches and ranks they are those of the whole step."""


class Normaliser(NamedTuple):
    """Denominators of one optimizer step, over all its pairs on all ranks.

    Attributes:
        weight: Σ u, the effective weights of the pairs, above 0.
        nll_tokens: Σ |y_w| in tokens, over the answers whose likelihood counts.
        pairs: number of pairs.
    """

    weight: float
    nll_tokens: int
    pairs: int = 0


@dataclass(frozen=True)
class PairBatch:
    """N pairs without the policy's log-probabilities; every tensor is (N,).

    Attributes:
        weight: effective weight u ≥ 0; 0 takes a pair out of the loss.
        ref_chosen, ref_rejected: reference log-probabilities, sums over response tokens, nats.
        is_visual: bool, the rejected side is an image rather than an answer.
        counts_nll: bool, the chosen answer enters the terms about likelihood, divergence and anchor (an
            answer shared by two pairs counts once).
    """

    weight: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    is_visual: Tensor
    counts_nll: Tensor


class ResponseLogps(NamedTuple):
    """Sums over the response tokens of N sequences; every tensor is (N,).

    Attributes:
        logps: float32, Σ c_t · log π(token t | everything before), nats: c_t = 1, or less for tokens that
            both sides of a pair share (span weights).
        tokens: float32, Σ c_t, the divisor of a mean over tokens.
        likelihood: float32, ``logps`` with all c_t = 1.
        num_tokens: int64, tokens of the response.
        ref_logps: ``logps`` of the reference; ``None`` unless requested.
        kl: Σ of the divergence from the reference, nats; ``None`` unless requested.
    """

    logps: Tensor
    tokens: Tensor
    likelihood: Tensor
    num_tokens: Tensor
    ref_logps: Tensor | None = None
    kl: Tensor | None = None

    def sides(self, count: int) -> tuple[ResponseLogps, ResponseLogps]:
        """The first ``count`` sequences (chosen) and the others (rejected)."""
        chosen: list[Any] = [value if value is None else value[:count] for value in self]
        rejected: list[Any] = [value if value is None else value[count:] for value in self]
        return ResponseLogps(*chosen), ResponseLogps(*rejected)


def preference_objective(
    chosen: ResponseLogps, rejected: ResponseLogps, pairs: PairBatch, total: Normaliser, align: AlignConfig
) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the step's loss.

    Args:
        chosen, rejected: the policy's log-probabilities.
        pairs: the pairs.
        total: denominators of the step.
        align: loss and coefficients.

    Returns:
        The loss share (scalar, to be summed over micro-batches and ranks) and the sums named in :data:`SUMS`
        (detached float64).
    """
    loss = LOSSES[align.loss]
    chosen_ratios = _log_ratios(chosen, pairs.ref_chosen, loss, align)
    rejected_ratios = _log_ratios(rejected, pairs.ref_rejected, loss, align)
    # A pair without weight must not turn an infinite loss into NaN.
    counts = pairs.weight > 0
    per_pair = loss.function(chosen_ratios - rejected_ratios, align)
    if align.anchor_coefficient:
        rewards = align.beta * (chosen.logps - pairs.ref_chosen) - align.anchor_margin
        anchors = torch.where(pairs.counts_nll, -F.logsigmoid(rewards), 0.0)
        per_pair = per_pair + align.anchor_coefficient * anchors
    denominator = total.weight if align.reduction == "weighted_mean" else max(total.pairs, 1)
    share = (pairs.weight * torch.where(counts, per_pair, 0.0)).sum() / denominator
    nll_sum, nll_tokens = _nll(chosen, pairs.counts_nll)
    if align.nll_coefficient:
        share = share + align.nll_coefficient * nll_sum / max(total.nll_tokens, 1)
    kl_sum = torch.zeros_like(nll_sum)
    if chosen.kl is not None:
        kl_sum = torch.where(pairs.counts_nll, chosen.kl, 0.0).sum()
        share = share + align.kl_coefficient * kl_sum / max(total.nll_tokens, 1)
    # Rows that only fill a batch still belong to the graph, so that every rank runs the same backward pass.
    share = share + 0.0 * (torch.nan_to_num(chosen.logps).sum() + torch.nan_to_num(rejected.logps).sum())
    with torch.no_grad():
        chosen_rewards, rejected_rewards = align.beta * chosen_ratios, align.beta * rejected_ratios
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


def sft_objective(chosen: ResponseLogps, pairs: PairBatch, total: Normaliser) -> tuple[Tensor, Tensor]:
    """Supervised fine-tuning: the mean negative log-likelihood per token of the step's chosen answers.

    Args and returns: as :func:`preference_objective`.
    """
    nll_sum, nll_tokens = _nll(chosen, pairs.counts_nll)
    share = nll_sum / max(total.nll_tokens, 1) + 0.0 * torch.nan_to_num(chosen.likelihood).sum()
    non_finite = (~torch.isfinite(chosen.likelihood))[pairs.counts_nll].sum()
    return share, _sums(loss=share, nll=nll_sum, nll_tokens=nll_tokens, non_finite=non_finite)


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
    """The figures of a whole step from its summed :data:`SUMS`; ``None`` if there was no such pair."""
    value = dict(zip(SUMS, sums.tolist(), strict=True))
    pairs = value["text_pairs"] + value["visual_pairs"]

    def mean(total: float, count: float) -> float | None:
        return total / count if count else None

    figures = {"loss": value["loss"], "pairs": pairs}
    for figure, name in (("reward_margin", "margin"), ("reward_accuracy", "correct")):
        text, visual = value[f"text_{name}"], value[f"visual_{name}"]
        figures[figure] = mean(text + visual, pairs)
        figures[f"{figure}_text"] = mean(text, value["text_pairs"])
        figures[f"{figure}_visual"] = mean(visual, value["visual_pairs"])
    return figures | {
        "reward_chosen": mean(value["chosen_reward"], pairs),
        "reward_rejected": mean(value["rejected_reward"], pairs),
        "nll": mean(value["nll"], value["nll_tokens"]),
        "kl": mean(value["kl"], value["nll_tokens"]) if value["kl"] else None,
    }


def _log_ratios(side: ResponseLogps, reference: Tensor, loss: PairLoss, align: AlignConfig) -> Tensor:
    """Δ_w or Δ_l (N,): to the reference if the loss uses one, per token if it is normalised by length."""
    ratios = side.logps - reference if loss.needs_reference else side.logps
    per_token = loss.per_token if align.length_normalised is None else align.length_normalised
    return ratios / side.tokens.clamp_min(_FEWEST_TOKENS) if per_token else ratios


def _nll(chosen: ResponseLogps, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Σ −log π(y_w|x) and Σ |y_w| over the answers that count."""
    return -torch.where(counts, chosen.likelihood, 0.0).sum(), (chosen.num_tokens * counts).sum()


def _sums(**values: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=values["loss"].device)
    return torch.stack([values[name].detach().double() if name in values else zero for name in SUMS])
