"""Settings of `align`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mmedpo_ray.config.base import Section, Share
from mmedpo_ray.plugins import Registry

_UNSMOOTHED, _SMOOTHED = ("sigmoid", "hinge", "ipo", "simpo"), ("cdpo", "robust")
LOSSES = Registry(
    "loss",
    "mmedpo_ray.losses",
    {name: f"mmedpo_ray.align.losses:{name}" for name in (*_UNSMOOTHED, *_SMOOTHED)},
)
"""Losses of a preference pair's margin (:class:`mmedpo_ray.align.losses.PairLoss`) by name."""


class LoraConfig(Section):
    """Low-rank adaptation of the language model; has no effect with ``train: full``."""

    rank: int = Field(128, ge=1)
    alpha: float = Field(256, gt=0)
    dropout: Share = 0.0
    target_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="linear layers of the language model",
    )


class AlignConfig(Section):
    """scored pairs → trained weights: weighted DPO under Ray Train and DeepSpeed ZeRO-3."""

    objective: Literal["dpo", "sft"] = Field("dpo", description="sft: likelihood of the chosen answers only")
    loss: Annotated[str, AfterValidator(LOSSES.check)] = Field(
        "sigmoid",
        description="loss of a pair's margin: sigmoid (DPO, as in the paper), hinge, ipo, cdpo, robust, "
        "simpo, or one that another package adds",
    )
    beta: float = Field(0.1, gt=0, description="inverse temperature of the loss")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="cdpo, robust: share of swapped pairs")
    length_normalised: bool | None = Field(
        None, description="log-ratios per token; null: as the loss is published (ipo and simpo: yes)"
    )
    simpo_margin: float = Field(0.5, ge=0, description="simpo: target margin γ")
    nll_coefficient: float = Field(0.0, ge=0, description="weight of the mean NLL per chosen token")
    visual_coefficient: float = Field(1.0, ge=0, description="factor on the loss of visual pairs")
    reversed_visual_coefficient: float = Field(
        0.0,
        ge=0,
        description="the same of reversed visual pairs: on the noised image, wrong answer over right",
    )
    anchor_coefficient: float = Field(
        0.0, ge=0, description="weight of mDPO's anchor, which keeps the chosen answer's reward positive"
    )
    anchor_margin: float = Field(0.0, description="the reward δ that the anchor requires")
    kl_coefficient: float = Field(
        0.0,
        ge=0,
        description="weight of the divergence from the reference per chosen token (one more forward)",
    )
    kl_forward_share: Share = Field(0.5, description="λ of λ·KL(ref‖policy) + (1 − λ)·KL(policy‖ref)")
    common_token_weight: Share = Field(
        1.0, description="weight of tokens that both answers of a text pair share; 0: only differing tokens"
    )
    reduction: Literal["weighted_mean", "mean"] = Field(
        "weighted_mean", description="Σ w·ℓ / Σ w, or the authors' mean of w·ℓ (with score.weights.mode=raw)"
    )
    reference: Literal["precomputed", "online"] = Field(
        "precomputed", description="log-probabilities from the table, or from a forward with the adapter off"
    )
    train: Literal["lora", "full"] = Field(
        "lora",
        description="what is trained of the language model: low-rank updates, or all weights (embeddings, "
        "norms and lm_head too); the vision tower never is",
    )
    train_projector: bool = Field(False, description="train the projector behind the vision tower too")
    learning_rate: float = Field(1e-7, gt=0)
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: int = Field(3, ge=1)
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    images_per_step: int = Field(
        8, ge=1, description="images, with all their pairs, in a step over all ranks"
    )
    pairs_per_forward: int = Field(
        64, ge=1, description="most pairs a rank computes at once; fewer than an image has repeat its tokens"
    )
    tokens_per_forward: int | None = Field(
        16_384, ge=64, description="most tokens at once, after packing, padding included; null: no limit"
    )
    max_length: int = Field(2048, ge=64, description="tokens of prompt + response, image tokens included")
    lora: LoraConfig = LoraConfig()
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = True
    attention: Literal["tree", "sdpa", "flex"] = Field(
        "tree",
        description="tree: trunks and branches apart; sdpa: a dense mask; flex: FlexAttention's block mask, "
        "on CUDA. Equal values",
    )
    strategy: Literal["zero3", "zero2", "ddp"] = Field(
        "zero3",
        description="what ranks share: all (zero3), optimizer state and gradients (zero2), or nothing (ddp)",
    )
    num_workers: int | tuple[int, int] = Field(
        2, description="training processes; [min, max]: as many as fit into the cluster, even as it changes"
    )
    resize_check_seconds: float = Field(
        60.0, ge=0, description="num_workers=[min, max]: time between checks of the cluster's room"
    )
    cpus_per_worker: float = Field(
        1.0, gt=0, description="CPUs of a worker; from 2 on, as many threads read its images"
    )
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of a worker's tensor operations")
    use_gpu: bool | None = Field(None, description="null: if the cluster has GPUs")
    checkpoint_every: int = Field(50, ge=1, description="optimizer steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="the last so many stay, and the best")
    validation_share: float = Field(
        0.0, ge=0, lt=1, description="share of the images held out of training, with all their pairs"
    )
    validate_every: int = Field(
        50, ge=1, description="optimizer steps between evaluations of the held-out images; also at the end"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="result: the last weights, or those with the lowest validation loss"
    )
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        ("tensorboard",), description="where metrics go besides metrics.jsonl"
    )
    max_failures: int = Field(2, ge=0, description="restarts of the worker group from the last checkpoint")

    @property
    def image_threads(self) -> int:
        """Threads of a worker that read images, in addition to the one that computes."""
        return max(1, int(self.cpus_per_worker))

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _combinations(self) -> AlignConfig:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"num_workers must be at least 1, or [min, max], not {self.num_workers}")
        if self.loss in _SMOOTHED and not self.label_smoothing:
            raise ValueError(f"loss={self.loss} needs align.label_smoothing > 0; at 0 it is sigmoid")
        if self.loss in _UNSMOOTHED and self.label_smoothing:
            raise ValueError(
                f"label_smoothing has no effect with align.loss={self.loss}; use cdpo or robust, or set it "
                "to 0"
            )
        if self.train == "full" and self.reference == "online":
            raise ValueError(
                "reference=online switches an adapter off, and align.train=full has none; use precomputed"
            )
        if self.train == "full" and self.kl_coefficient:
            raise ValueError(
                "kl_coefficient needs an adapter to switch off, and align.train=full has none; set it to 0 "
                "(align.anchor_coefficient and align.nll_coefficient work), or use align.train=lora"
            )
        if self.keep == "best" and not self.validation_share:
            raise ValueError(
                "keep=best needs held-out images to find the best; set align.validation_share above 0"
            )
        return self


class ControlConfig(Section):
    """A supervised fine-tuning control with as many updates, trained and evaluated like the aligned model."""

    enabled: bool = True
    name: str = Field("sft_control", description="name under which it is served")
    learning_rate: float | None = Field(None, gt=0, description="null: align.learning_rate")
