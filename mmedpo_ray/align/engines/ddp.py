"""Data parallel training without sharding: every rank holds the whole policy. Plain torch.

The gradients of the trained parameters are summed over ranks in a few large pieces after the step's last
backward pass, instead of in hooks on every layer. This is the fastest strategy if model and optimizer fit on
each device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mmedpo_ray.align.checkpoint.checkpoint import MOMENTS, PARAMETER, Checkpoint
from mmedpo_ray.align.engines.base import Engine, make_optimizer
from mmedpo_ray.align.losses import ResponseLogps
from mmedpo_ray.align.packing.trees import PackedTrees
from mmedpo_ray.align.policy import Policy, TrainingSpec

# Values summed over ranks at once, in a copy of four bytes per value.
_BUCKET_NUMEL = 2**26


class DdpEngine(Engine):
    """See :class:`~mmedpo_ray.align.engines.base.Engine`.

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
        self._trained = policy.trained_parameters()
        # Updates are smaller than bfloat16 can represent: exact copies exist beside the rounded values of the
        # model.
        self._exact = {
            name: value if value.dtype is torch.float32 else value.detach().float().clone()
            for name, value in self._trained.items()
        }
        self._rounded = [
            (value, self._exact[name])
            for name, value in self._trained.items()
            if value is not self._exact[name]
        ]
        for value in self._exact.values():
            value.grad = torch.zeros_like(value)
        self._optimizer = make_optimizer(self._exact, spec.align, fused=True)

    def logps(self, batch: PackedTrees) -> ResponseLogps:
        return ResponseLogps(*self.policy(batch))

    def backward(self, share: Tensor, *, is_last: bool) -> None:  # noqa: ARG002
        share.backward()
        for value, exact in self._rounded:
            assert exact.grad is not None
            if value.grad is not None:
                exact.grad += value.grad
                value.grad = None

    def update(self, learning_rate: float) -> float:
        if dist.is_initialized() and dist.get_world_size() > 1:
            _sum_over_ranks([value.grad for value in self._exact.values() if value.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(list(self._exact.values()), self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            for value, exact in self._rounded:
                value.copy_(exact)
        return float(norm)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, value in self._exact.items():
            moments = self._optimizer.state[value]
            yield name, {PARAMETER: value, **{moment: moments[moment] for moment in MOMENTS}}

    def restore(self, checkpoint: Checkpoint) -> None:
        with torch.no_grad():
            for name, value in self._exact.items():
                value.copy_(checkpoint.parameter(name))
                self._trained[name].copy_(value)
                self._optimizer.state[value] = {
                    "step": torch.tensor(float(checkpoint.step), device=self.device),
                    **{
                        moment: torch.empty_like(value).copy_(checkpoint.moment(moment, name))
                        for moment in MOMENTS
                    },
                }


def _sum_over_ranks(gradients: list[Tensor]) -> None:
    """Sums tensors over ranks in place, in buckets."""
    bucket: list[Tensor] = []
    size = 0
    for number, gradient in enumerate(gradients, start=1):
        bucket.append(gradient)
        size += gradient.numel()
        if size < _BUCKET_NUMEL and number < len(gradients):
            continue
        flat = torch.cat([item.flatten() for item in bucket])
        dist.all_reduce(flat)
        for item, part in zip(bucket, flat.split([item.numel() for item in bucket]), strict=True):
            item.copy_(part.view_as(item))
        bucket, size = [], 0
