"""The policy: a LLaVA with what is trained of it, and what a training worker must know to build it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmedpo_ray.align.losses import Objective
from mmedpo_ray.align.packing.logps import make_fast, response_logps
from mmedpo_ray.align.packing.tree_attention import check_family
from mmedpo_ray.align.packing.trees import Forest
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import PROJECTOR, load_model, resolve_model

# Of a name of a layer to one that may have been meant, as difflib measures it.
_LEAST_LIKENESS = 0.6
# Names of probabilities in transformers: attention_dropout, resid_pdrop, attention_probs_dropout_prob.
_DROPOUT = re.compile(r"dropout|pdrop")


@dataclass(frozen=True)
class TrainingSpec:
    """Everything a training worker needs to know; it travels to every rank.

    Attributes:
        align: the settings, ``objective`` and ``learning_rate`` being those of the role.
        model: model path as in ``model.path``.
        seed: of LoRA initialisation, order and dropout.
        folder: where checkpoints, metrics and the trained weights go (shared by all nodes).
        prepared: folder of the `prepared` table.
        stored_reference: whether the reference log-probabilities are those of the table.
        key: identity of the run; checkpoints of another key are not resumed.
        use_gpu: whether ranks have a GPU each.
        attempt: identity of this launch, so that an error is told from one of an earlier launch.
        prepared_key: of the `prepared` table; ``None``: any.
        prepared_with: what the table of that key is made with (:mod:`~mmedpo_ray.tables.provenance`), for messages.
        check_reference: compare the table with the untrained policy in the first step.
    """

    align: AlignConfig
    model: str
    seed: int
    folder: Path
    prepared: str
    stored_reference: bool
    key: str
    use_gpu: bool
    attempt: str
    prepared_key: str | None = None
    prepared_with: dict[str, Any] | None = None
    check_reference: bool = True

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
    """The model under training; ``forward`` is :func:`~mmedpo_ray.align.packing.logps.response_logps`.

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
        """See :class:`~mmedpo_ray.align.packing.logps.LogpOutput`; a plain tuple, because hooks rebuild it."""
        return tuple(
            response_logps(
                self.model,
                batch,
                with_reference=self._with_reference,
                kl_forward_share=self._kl_forward_share,
            )
        )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their name in the model, sorted."""
        named = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return dict(sorted(named.items()))

    def load_parameters(self, read: Callable[[str], Tensor]) -> None:
        """Sets the trainable parameters, read by their name one at a time; before they are sharded."""
        with torch.no_grad():
            for name, value in self.trained_parameters().items():
                value.copy_(read(name))


def build_policy(spec: TrainingSpec) -> Policy:
    """Loads the model and makes trainable what ``align.train`` and ``align.train_projector`` say.

    Equal on every rank and for every number of ranks. The vision tower is always frozen. The only dropout is that of LoRA: the
    reference is computed without any.

    Raises:
        UserError: the language model lacks one of ``align.lora.target_modules``, or is of a family that is not supported.
    """
    model = load_model(spec.model, spec.dtype)
    _check_window(model, spec.align, spec.model)
    _disable_dropout(model)
    trained = _with_lora(model, spec) if spec.align.train == "lora" else _unfrozen(model, spec)
    make_fast(trained, attention=spec.align.attention, sharded=spec.align.strategy == "zero3")
    if spec.align.gradient_checkpointing:
        # Non-reentrant checkpointing checks saved tensors that ZeRO-3 has meanwhile released.
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": True})
    return Policy(
        trained,
        with_reference=spec.with_reference,
        kl_forward_share=spec.align.kl_forward_share
        if spec.align.kl_coefficient and spec.with_reference
        else None,
    )


def _disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability of a transformers model to 0: of its layers, its attention and its configurations."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Attention keeps its probability as a number of its own, or reads it from the configuration.
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if _DROPOUT.search(name) and isinstance(value, int | float) and not isinstance(value, bool):
                    setattr(holder, name, 0.0)


def check_model(model: str, align: AlignConfig) -> None:
    """Says before any weight is loaded what :func:`build_policy` would refuse.

    Args:
        model: as ``model.path``.
        align: the settings.

    Raises:
        UserError: as :func:`build_policy`.
    """
    from transformers import AutoConfig, LlavaForConditionalGeneration

    settings = AutoConfig.from_pretrained(resolve_model(model))
    check_family(settings.text_config, along_tree=align.attention == "tree")
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(settings)
    _check_window(empty, align, model)
    if align.train == "lora":
        _check_targets(empty, align.lora.target_modules, model)


def _with_lora(model: Any, spec: TrainingSpec) -> Any:
    """A peft model with LoRA on the language model and, if wanted, a trained copy of the projector beside the original."""
    from peft import LoraConfig, get_peft_model

    lora = spec.align.lora
    _check_targets(model, lora.target_modules, spec.model)
    torch.manual_seed(spec.seed)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=_target_pattern(lora.target_modules),
            # The original stays: with the adapter off, the model is the reference.
            modules_to_save=[PROJECTOR] if spec.align.train_projector else None,
            task_type="CAUSAL_LM",
            base_model_name_or_path=resolve_model(spec.model),
        ),
        # ZeRO-3 wants one dtype; the exact fp32 copy lives in the optimizer.
        autocast_adapter_dtype=False,
    )


def _target_pattern(names: Sequence[str]) -> str:
    """What the full names of the layers match; CLIP towers have a q_proj too, so it keeps to the language model."""
    return rf".*\.language_model\..*\.({'|'.join(names)})"


def _check_targets(model: Any, names: Sequence[str], model_name: str) -> None:
    """Every name must be that of linear layers of the language model, and of nothing else in it.

    Raises:
        UserError: names the wrong ones and those they may stand for.
    """
    inside = {
        name: isinstance(module, nn.Linear)
        for name, module in model.named_modules()
        if ".language_model." in name
    }
    known = sorted({name.rpartition(".")[2] for name, is_linear in inside.items() if is_linear})
    wrong = [name for name in names if not _is_target(name, inside)]
    if names and not wrong:
        return
    described = []
    for name in wrong:
        near = difflib.get_close_matches(name, known, cutoff=_LEAST_LIKENESS)
        described.append(f"{name} (did you mean {' or '.join(near)}?)" if near else name)
    raise UserError(
        f"align.lora.target_modules names no layer of the language model of {model_name}"
        f"{' with ' if described else ''}{', '.join(described)}. Its linear layers are {', '.join(known)}."
    )


def _is_target(name: str, inside: Mapping[str, bool]) -> bool:
    """Whether a name of ``align.lora.target_modules`` matches linear layers only (module → whether it is one)."""
    try:
        pattern = re.compile(_target_pattern([name]))
    except re.error:
        return False
    found = [is_linear for module, is_linear in inside.items() if pattern.fullmatch(module)]
    return bool(found) and all(found)


def _unfrozen(model: Any, spec: TrainingSpec) -> Any:
    """The model itself, all weights of its language model trainable: embeddings, norms and lm_head too."""
    for module in (model.model.language_model, model.lm_head):
        module.requires_grad_(True)
    if spec.align.train_projector:
        getattr(model.model, PROJECTOR).requires_grad_(True)
    return model


def _check_window(model: Any, align: AlignConfig, model_name: str) -> None:
    """A tree sees all its ancestors; a model that attends to a window only must be given sequences inside it."""
    window = getattr(model.config.text_config, "sliding_window", None)
    if window is not None and align.max_length > window:
        raise UserError(
            f"{model_name} attends to the last {window} tokens only (sliding_window), align.max_length is "
            f"{align.max_length}. Lower align.max_length to {window}."
        )


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
