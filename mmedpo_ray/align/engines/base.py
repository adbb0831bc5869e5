"""What an engine does with the policy: the verbs of an optimizer step, whatever the strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmedpo_ray.align.checkpoint.checkpoint import Checkpoint
from mmedpo_ray.align.packing.logps import LogpOutput
from mmedpo_ray.align.packing.trees import Forest
from mmedpo_ray.align.policy import Policy, TrainingSpec
from mmedpo_ray.align.settings import AlignConfig


class Engine(ABC):
    """Holds the policy and its optimizer on one of the ranks.

    Attributes:
        policy: the model; a strategy may have sharded its parameters.
        device: where batches go.
    """

    policy: Policy
    device: torch.device

    @abstractmethod
    def logps(self, batch: Forest) -> LogpOutput:
        """Forward pass of this rank's sequences."""

    def train(self, mode: bool = True) -> None:
        """Switches dropout and gradient checkpointing on or off."""
        self.policy.train(mode)

    @abstractmethod
    def backward(self, share: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of this rank's share of the loss; ``is_last`` marks the step's last micro-batch.

        The loss is the *sum* of the shares of all ranks and micro-batches.
        """

    @abstractmethod
    def update(self, learning_rate: float) -> float:
        """Clips, updates the trained parameters and clears the gradients; returns the gradient norm before clipping."""

    @abstractmethod
    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The trained parameters one by one, each with Adam's moments, whole and in full precision.

        Every item is gathered from all ranks, so all of them must take all items; none ever holds more than one.

        Yields:
            Name, and ``{"parameter", "exp_avg", "exp_avg_sq"}`` → tensor, valid until the next item.
        """

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's optimizer state back, on any number of ranks.

        The policy must have been built with the same parameters.
        """


def make_engine(policy: Policy, spec: TrainingSpec) -> Engine:
    """The engine of ``align.strategy``."""
    if spec.align.strategy == "ddp":
        from mmedpo_ray.align.engines.ddp import DdpEngine

        return DdpEngine(policy, spec)
    from mmedpo_ray.align.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(policy, spec)


def make_optimizer(
    parameters: Mapping[str, Tensor], align: AlignConfig, *, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW; matrices decay, biases and the scales of norms do not.

    Args:
        parameters: the trained parameters, not yet sharded.
        align: rates.
        fused: one kernel for all of an update; the parameters must stay where they are.
    """
    groups: list[dict[str, Any]] = [
        {"params": [value for value in parameters.values() if value.ndim >= 2]},
        {"params": [value for value in parameters.values() if value.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=align.learning_rate,
        weight_decay=align.weight_decay,
        fused=fused,
    )
