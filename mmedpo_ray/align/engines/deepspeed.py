"""DeepSpeed ZeRO-2 and ZeRO-3: parameters, gradients and optimizer state sharded over the ranks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmedpo_ray.align.checkpoint.checkpoint import MOMENTS, PARAMETER, Checkpoint
from mmedpo_ray.align.engines.base import Engine, make_optimizer
from mmedpo_ray.align.losses import ResponseLogps
from mmedpo_ray.align.packing.trees import PackedTrees
from mmedpo_ray.align.policy import Policy, TrainingSpec

# On CPU a collective costs more than the memory it saves on parameters this small: they stay whole on every
# rank (gradients and optimizer state are sharded all the same). DeepSpeed's own default is 100,000 elements.
_CPU_PERSISTENCE = 1_000_000
_GPU_PERSISTENCE = 100_000
_STAGES = {"zero2": 2, "zero3": 3}
# Gradients summed over ranks at once. This is DeepSpeed's default, which it allocates even if fewer are
# trained.
MOST_IN_BUCKET = 500_000_000


def deepspeed_settings(spec: TrainingSpec, trained: int) -> dict[str, Any]:
    """The DeepSpeed configuration; batch sizes are ours, so DeepSpeed's are 1.

    Args:
        spec: the run.
        trained: how many numbers are trained.
    """
    align = spec.align
    zero: dict[str, Any] = {
        "stage": _STAGES[align.strategy],
        "contiguous_gradients": True,
        "reduce_bucket_size": max(1, min(MOST_IN_BUCKET, trained)),
        # Overlap needs streams, which a CPU does not have.
        "overlap_comm": spec.use_gpu,
    }
    if align.strategy == "zero3":
        zero["stage3_param_persistence_threshold"] = _GPU_PERSISTENCE if spec.use_gpu else _CPU_PERSISTENCE
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": align.max_grad_norm,
        "bf16": {"enabled": align.precision == "bf16"},
        # In bfloat16 the small gradients of later micro-batches would be lost in the sum.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


class DeepSpeedEngine(Engine):
    """See :class:`~mmedpo_ray.align.engines.base.Engine`; wraps a DeepSpeed engine.

    Args:
        policy: the model; afterwards its parameters are sharded.
        spec: the run.
    """

    def __init__(self, policy: Policy, spec: TrainingSpec) -> None:
        deepspeed = _import_deepspeed(use_gpu=spec.use_gpu)
        self.policy = policy
        trained = policy.trained_parameters()
        optimizer = make_optimizer(trained, spec.align)
        settings = deepspeed_settings(spec, sum(value.numel() for value in trained.values()))
        if spec.align.strategy == "zero3":
            _shard(policy, deepspeed, settings)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=settings
        )
        self._engine.train()
        self._make_optimizer_state()
        self._world_size = torch.distributed.get_world_size()
        self.device: torch.device = torch.device(self._engine.device)

    def logps(self, batch: PackedTrees) -> ResponseLogps:
        return ResponseLogps(*self._engine(batch))

    def backward(self, share: Tensor, *, is_last: bool) -> None:
        # DeepSpeed averages gradients over ranks, while our loss is a sum over them.
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(share * self._world_size)

    def update(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, value in self.policy.trained_parameters().items():
            whole = {PARAMETER: safe_get_full_fp32_param(value)}
            whole |= {moment: safe_get_full_optimizer_state(value, moment) for moment in MOMENTS}
            shape = getattr(value, "ds_shape", value.shape)
            yield name, {kind: tensor.view(shape) for kind, tensor in whole.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        # This sets the optimizer's exact float32 copies, which DeepSpeed copies to the weights only with the
        # next update.
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for state in self._optimizer.optimizer.state.values():
            state["step"].fill_(checkpoint.step)
        for name, value in self.policy.trained_parameters().items():
            safe_set_full_fp32_param(value, checkpoint.parameter(name).to(self.device))
            for moment in MOMENTS:
                safe_set_full_optimizer_state(value, checkpoint.moment(moment, name).to(self.device), moment)

    def _make_optimizer_state(self) -> None:
        """Creates Adam's state before the first update, so that a checkpoint can be restored into it.

        ZeRO-2 would not even find all of it later: it links state to parameters after the first group's first
        update, when the other groups have none yet.
        """
        is_zero3 = self._engine.zero_optimization_stage() == 3
        optimizer = self._optimizer
        shards = (
            optimizer.fp32_partitioned_groups_flat if is_zero3 else optimizer.single_partition_of_fp32_groups
        )
        for shard in shards:
            moments = {moment: torch.zeros_like(shard) for moment in MOMENTS}
            optimizer.optimizer.state[shard] = {"step": torch.tensor(0.0), **moments}
        if not is_zero3:
            optimizer._lazy_init_hp_params_optimizer_state()


def _shard(policy: nn.Module, deepspeed: Any, settings: dict[str, Any]) -> None:
    """Shards the parameters one after another, so that a device holds at most one whole parameter.

    Otherwise DeepSpeed would put the whole model on every device before it shards it.
    """
    deepspeed.zero.Init(module=policy, config_dict_or_path=settings)
    device = deepspeed.get_accelerator().current_device_name()
    for module in policy.modules():
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, value.to(device))


def _import_deepspeed(*, use_gpu: bool) -> Any:
    # DeepSpeed's autotuner, which nothing here uses, would spend seconds on MLflow in every rank: hide it.
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    if not use_gpu:
        # Only its inference all-reduce uses this shared-memory kernel, which DeepSpeed would compile at every
        # first use: that needs a C++ compiler on each node and half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
