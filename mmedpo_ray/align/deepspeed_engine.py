"""DeepSpeed ZeRO-2 and ZeRO-3: the policy's parameters, gradients and optimizer state sharded over the ranks."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from mmedpo_ray.align.engine import MOMENTS, Engine
from mmedpo_ray.align.forest import Forest
from mmedpo_ray.align.logps import LogpOutput
from mmedpo_ray.align.policy import Policy, TrainingSpec

# On CPU a collective costs more than the memory it saves on parameters this small: they stay whole on every rank
# (gradients and optimizer state are sharded all the same). DeepSpeed's own default is 100,000 elements.
_CPU_PERSISTENCE = 1_000_000
_GPU_PERSISTENCE = 100_000
_STAGES = {"zero2": 2, "zero3": 3}


def deepspeed_settings(spec: TrainingSpec) -> dict[str, Any]:
    """The DeepSpeed configuration; batch sizes are ours, so DeepSpeed's are 1."""
    align = spec.align
    zero: dict[str, Any] = {
        "stage": _STAGES[align.strategy],
        "contiguous_gradients": True,
        # Overlap needs streams, which a CPU has not.
        "overlap_comm": spec.use_gpu,
    }
    if align.strategy == "zero3":
        zero["stage3_param_persistence_threshold"] = _GPU_PERSISTENCE if spec.use_gpu else _CPU_PERSISTENCE
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": align.max_grad_norm,
        "bf16": {"enabled": align.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


class DeepSpeedEngine(Engine):
    """A DeepSpeed engine around the policy, with the verbs of an optimizer step.

    Args:
        policy: the model; afterwards its parameters are sharded.
        spec: the run.
    """

    def __init__(self, policy: Policy, spec: TrainingSpec) -> None:
        deepspeed = _import_deepspeed(use_gpu=spec.use_gpu)
        self.policy = policy
        parameters = policy.adapter_parameters()
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=spec.align.learning_rate, weight_decay=spec.align.weight_decay
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=deepspeed_settings(spec)
        )
        self._engine.train()
        self._world_size = torch.distributed.get_world_size()
        self.device: torch.device = torch.device(self._engine.device)

    def logps(self, batch: Forest) -> LogpOutput:
        return LogpOutput(*self._engine(batch))

    def backward(self, share: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of this rank's share of the loss; ``is_last`` marks the step's last micro-batch.

        DeepSpeed averages gradients over ranks, while our loss is a sum over them.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(share * self._world_size)

    def update(self, learning_rate: float) -> float:
        """Clips, updates the adapter and clears the gradients; returns the gradient norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def parameters(self) -> dict[str, Tensor]:
        """The adapter in full precision, gathered from all ranks (a collective)."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: safe_get_full_fp32_param(value).detach().cpu().clone().view(_shape(value))
            for name, value in self.policy.adapter_parameters().items()
        }

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments as ``<moment>.<parameter>``, gathered from all ranks (a collective)."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return {
            f"{moment}.{name}": safe_get_full_optimizer_state(value, moment)
            .detach()
            .cpu()
            .clone()
            .view(_shape(value))
            for name, value in self.policy.adapter_parameters().items()
            for moment in MOMENTS
        }

    def restore(self, parameters: dict[str, Tensor], moments: dict[str, Tensor], num_updates: int) -> None:
        """Puts a checkpoint's optimizer state back, on any number of ranks.

        The policy must have been built with the same parameters: this sets the optimizer's exact float32 copies, which
        DeepSpeed carries over to the weights only with the next update.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._make_optimizer_state(num_updates)
        for name, value in self.policy.adapter_parameters().items():
            safe_set_full_fp32_param(value, parameters[name].to(self.device))
            for moment in MOMENTS:
                safe_set_full_optimizer_state(value, moments[f"{moment}.{name}"].to(self.device), moment)

    def _make_optimizer_state(self, num_updates: int) -> None:
        """Adam makes its state at the first update; a fresh engine has none to fill."""
        if self._engine.zero_optimization_stage() == 3:
            shards = self._optimizer.fp32_partitioned_groups_flat
        else:
            shards = self._optimizer.single_partition_of_fp32_groups
        for shard in shards:
            self._optimizer.optimizer.state[shard] = {
                "step": torch.tensor(float(num_updates)),
                **{moment: torch.zeros_like(shard) for moment in MOMENTS},
            }
        if self._engine.zero_optimization_stage() != 3:
            # Links the state to the parameters, which ZeRO-2 otherwise does after the first update.
            self._optimizer._lazy_init_hp_params_optimizer_state()


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole shape of a parameter that may be sharded."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _import_deepspeed(*, use_gpu: bool) -> Any:
    import deepspeed

    if not use_gpu:
        # DeepSpeed would compile a shared-memory kernel at every first use, which needs a C++ compiler on each node and
        # half a minute; only its inference all-reduce uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
