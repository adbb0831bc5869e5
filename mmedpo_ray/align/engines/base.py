"""The interface of an engine: the operations of an optimizer step, for every strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mmedpo_ray.align.checkpoint.checkpoint import Checkpoint
from mmedpo_ray.align.losses import ResponseLogps
from mmedpo_ray.align.packing.trees import PackedTrees
from mmedpo_ray.align.policy import Policy
from mmedpo_ray.align.settings import AlignConfig


class Engine(ABC):
    """Holds the policy and its optimizer on one of the ranks.

    Attributes:
        policy: the model; a strategy may have sharded its parameters.
        device: of the batches.
    """

    policy: Policy
    device: torch.device

    @abstractmethod
    def logps(self, batch: PackedTrees) -> ResponseLogps:
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
        """Clips, updates the parameters and clears the gradients; returns the norm before clipping."""

    @abstractmethod
    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The trained parameters one by one, each with Adam's moments, whole and in full precision.

        Every item is gathered from all ranks, so all of them must take all items; none holds more than one at
        a time.

        Yields:
            Name, and ``{"parameter", "exp_avg", "exp_avg_sq"}`` → tensor, valid until the next item.
        """

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores a checkpoint's optimizer state, on any number of ranks.

        The policy must have been built with the checkpoint's parameters.
        """


def make_optimizer(
    parameters: Mapping[str, Tensor], align: AlignConfig, *, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW; matrices decay, biases and the scales of norms do not.

    Args:
        parameters: the trained parameters, not yet sharded.
        align: rates.
        fused: one kernel for a whole update; the parameters must stay on their device.
    """
    matrices = [value for value in parameters.values() if value.ndim >= 2]
    others = [value for value in parameters.values() if value.ndim < 2]
    groups = [
        {"params": values, "weight_decay": decay}
        for values, decay in ((matrices, align.weight_decay), (others, 0.0))
        if values
    ]
    return torch.optim.AdamW(groups, lr=align.learning_rate, weight_decay=align.weight_decay, fused=fused)
