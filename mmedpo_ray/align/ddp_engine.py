"""Data parallel training without sharding: every rank holds the whole policy. Plain torch.

Only the adapter has gradients, so instead of hooks on every layer one all-reduce of its flat gradient follows the step's last
backward pass. The fastest strategy where the frozen model fits on each device.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mmedpo_ray.align.engine import MOMENTS, Engine
from mmedpo_ray.align.forest import Forest
from mmedpo_ray.align.logps import LogpOutput
from mmedpo_ray.align.policy import Policy, TrainingSpec


class DdpEngine(Engine):
    """See :class:`~mmedpo_ray.align.engine.Engine`.

    Args:
        policy: the model, equal on every rank.
        spec: the run.
    """

    def __init__(self, policy: Policy, spec: TrainingSpec) -> None:
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if spec.use_gpu else torch.device("cpu")
        )
        self.policy = policy.to(self.device).train()
        self._max_grad_norm = spec.align.max_grad_norm
        self._trained = policy.adapter_parameters()
        # Updates are smaller than bfloat16 can hold: the exact values live here.
        self._exact = {name: value.detach().float().clone() for name, value in self._trained.items()}
        for value in self._exact.values():
            value.grad = torch.zeros_like(value)
        self._optimizer = torch.optim.AdamW(
            self._exact.values(), lr=spec.align.learning_rate, weight_decay=spec.align.weight_decay
        )

    def logps(self, batch: Forest) -> LogpOutput:
        return LogpOutput(*self.policy(batch))

    def backward(self, share: Tensor, *, is_last: bool) -> None:  # noqa: ARG002
        share.backward()
        for name, value in self._trained.items():
            exact = self._exact[name]
            assert exact.grad is not None
            if value.grad is not None:
                exact.grad += value.grad
                value.grad = None

    def update(self, learning_rate: float) -> float:
        gradients = [value.grad for value in self._exact.values() if value.grad is not None]
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(
                gradients, flat.split([item.numel() for item in gradients]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(list(self._exact.values()), self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            for name, value in self._trained.items():
                value.copy_(self._exact[name])
        return float(norm)

    def parameters(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self._exact.items()}

    def moments(self) -> dict[str, Tensor]:
        return {
            f"{moment}.{name}": self._optimizer.state[value][moment].cpu().clone()
            for name, value in self._exact.items()
            for moment in MOMENTS
        }

    def restore(self, parameters: dict[str, Tensor], moments: dict[str, Tensor], num_updates: int) -> None:
        with torch.no_grad():
            for name, value in self._exact.items():
                value.copy_(parameters[name].to(self.device))
                self._trained[name].copy_(value)
                self._optimizer.state[value] = {
                    "step": torch.tensor(float(num_updates)),
                    **{moment: moments[f"{moment}.{name}"].to(self.device).clone() for moment in MOMENTS},
                }
