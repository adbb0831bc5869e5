"""The policy (LLaVA + LoRA) and the DeepSpeed engine that shards and updates it."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmedpo_ray.align.forest import Forest
from mmedpo_ray.align.logps import LogpOutput, response_logps
from mmedpo_ray.align.losses import Objective
from mmedpo_ray.config import AlignConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import load_model, resolve_model

log = logging.getLogger(__name__)

# On CPU a collective costs more than the memory it saves on parameters this small: they stay whole on every rank
# (gradients and optimizer state are sharded all the same). DeepSpeed's own default is 100,000 elements.
_CPU_PERSISTENCE = 1_000_000
_GPU_PERSISTENCE = 100_000
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingSpec:
    """Everything a training worker needs to know; it travels to every rank.

    Attributes:
        align: the settings, ``objective`` and ``learning_rate`` being those of the role.
        model: model path as in ``model.path``.
        seed: of LoRA initialisation, order and dropout.
        folder: where checkpoints, metrics and the adapter go (shared by all nodes).
        scored: folder of the `scored` table.
        reference: folder of the `reference` table; ``None`` if the objective needs none.
        key: identity of the run; checkpoints of another key are not resumed.
        use_gpu: whether ranks have a GPU each.
        attempt: identity of this launch, so that an error is told from one of an earlier launch.
    """

    align: AlignConfig
    model: str
    seed: int
    folder: Path
    scored: str
    reference: str | None
    key: str
    use_gpu: bool
    attempt: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and of the computation."""
        return torch.bfloat16 if self.align.precision == "bf16" else torch.float32

    @property
    def objective(self) -> Literal["dpo", "sft"]:
        return self.align.objective

    @property
    def align_objective(self) -> Objective:
        """What is minimised with ``objective: dpo``."""
        return objective_of(self.align)

    @property
    def with_reference(self) -> bool:
        """Whether every forward is followed by one with the adapter off."""
        if self.objective == "sft":
            return False
        online = self.align_objective.needs_reference and self.align.reference == "online"
        return online or self.align.kl_coefficient > 0


def objective_of(align: AlignConfig) -> Objective:
    """The objective that the settings describe."""
    names = [field.name for field in dataclasses.fields(Objective)]
    return Objective(**{name: getattr(align, name) for name in names})


class Policy(nn.Module):
    """The model under training; ``forward`` is :func:`~mmedpo_ray.align.logps.response_logps`.

    DeepSpeed gathers sharded weights in hooks of ``forward``, so everything that touches weights happens inside it.
    """

    def __init__(
        self, model: nn.Module, *, with_reference: bool = False, kl_forward_share: float | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._with_reference = with_reference
        self._kl_forward_share = kl_forward_share

    def forward(self, batch: Forest) -> tuple[Any, ...]:
        """See :class:`~mmedpo_ray.align.logps.LogpOutput`; a plain tuple, because hooks rebuild it."""
        return tuple(
            response_logps(
                self.model,
                batch,
                with_reference=self._with_reference,
                kl_forward_share=self._kl_forward_share,
            )
        )

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their name in the peft model, sorted."""
        named = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return dict(sorted(named.items()))

    def load_adapter(self, parameters: dict[str, Tensor]) -> None:
        """Sets the trainable parameters by their name; before they are sharded."""
        with torch.no_grad():
            for name, value in self.adapter_parameters().items():
                value.copy_(parameters[name])


def build_policy(spec: TrainingSpec) -> Policy:
    """Loads the model and puts LoRA on its language model; equal on every rank and for every number of ranks.

    Raises:
        UserError: the language model has none of ``align.lora.target_modules``.
    """
    from peft import LoraConfig, get_peft_model

    lora = spec.align.lora
    model = load_model(spec.model, spec.dtype)
    # CLIP towers have a q_proj too: the pattern keeps to the language model.
    pattern = rf".*\.language_model\..*\.({'|'.join(lora.target_modules)})"
    torch.manual_seed(spec.seed)
    try:
        peft_model = get_peft_model(
            model,
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]
                lora_dropout=lora.dropout,
                target_modules=pattern,
                task_type="CAUSAL_LM",
                base_model_name_or_path=resolve_model(spec.model),
            ),
            # ZeRO-3 wants one dtype; the exact fp32 copy lives in the optimizer.
            autocast_adapter_dtype=False,
        )
    except ValueError as error:
        raise UserError(
            f"align.lora.target_modules={lora.target_modules} names no layer of the language model of {spec.model}. "
            "Use the names of its linear layers, such as q_proj and down_proj."
        ) from error
    if spec.align.gradient_checkpointing:
        # Non-reentrant checkpointing checks saved tensors that ZeRO-3 has meanwhile released.
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": True})
    return Policy(
        peft_model,
        with_reference=spec.with_reference,
        kl_forward_share=spec.align.kl_forward_share
        if spec.align.kl_coefficient and spec.with_reference
        else None,
    )


def deepspeed_settings(spec: TrainingSpec) -> dict[str, Any]:
    """The DeepSpeed configuration; batch sizes are ours, so DeepSpeed's are 1."""
    align = spec.align
    zero: dict[str, Any] = {
        "stage": align.zero_stage,
        "contiguous_gradients": True,
        # Overlap needs streams, which a CPU has not.
        "overlap_comm": spec.use_gpu,
    }
    if align.zero_stage == 3:
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


class Engine:
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
        """Forward pass of this rank's rows."""
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
            for moment in _MOMENTS
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
            for moment in _MOMENTS:
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
                **{moment: torch.zeros_like(shard) for moment in _MOMENTS},
            }
        if self._engine.zero_optimization_stage() != 3:
            # Links the state to the parameters, which ZeRO-2 otherwise does after the first update.
            self._optimizer._lazy_init_hp_params_optimizer_state()


def learning_rate_factor(scheduler: str, step: int, total_steps: int, warmup_ratio: float) -> float:
    """The share of ``align.learning_rate`` at a step (from 0): a linear rise, then a decay to 0 or none.

    Args:
        scheduler: cosine, linear or constant.
        step: optimizer step, 0 ≤ step < total_steps.
        total_steps: of the run.
        warmup_ratio: share of the steps that rise.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if scheduler == "linear" else 1.0


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
