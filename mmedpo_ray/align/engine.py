"""What an engine does with the policy: the verbs of an optimizer step, whatever the strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mmedpo_ray.align.forest import Forest
from mmedpo_ray.align.logps import LogpOutput
from mmedpo_ray.align.policy import Policy, TrainingSpec

MOMENTS = ("exp_avg", "exp_avg_sq")


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

    @abstractmethod
    def backward(self, share: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of this rank's share of the loss; ``is_last`` marks the step's last micro-batch.

        The loss is the *sum* of the shares of all ranks and micro-batches.
        """

    @abstractmethod
    def update(self, learning_rate: float) -> float:
        """Clips, updates the adapter and clears the gradients; returns the gradient norm before clipping."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The adapter in full precision, gathered from all ranks (a collective)."""

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """Adam's moments as ``<moment>.<parameter>``, gathered from all ranks (a collective)."""

    @abstractmethod
    def restore(self, parameters: dict[str, Tensor], moments: dict[str, Tensor], num_updates: int) -> None:
        """Puts a checkpoint's optimizer state back, on any number of ranks.

        The policy must have been built with the same parameters.
        """


def make_engine(policy: Policy, spec: TrainingSpec) -> Engine:
    """The engine of ``align.strategy``."""
    if spec.align.strategy == "ddp":
        from mmedpo_ray.align.ddp_engine import DdpEngine

        return DdpEngine(policy, spec)
    from mmedpo_ray.align.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(policy, spec)
