"""The policy: a model with its trainable part, and the description of a run from which a worker builds it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmedpo_ray.align.losses import reference_source
from mmedpo_ray.align.packing.logps import check_attention, response_logps, use_packed_forward
from mmedpo_ray.align.packing.tree_attention import check_family
from mmedpo_ray.align.packing.trees import PackedTrees
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.architectures import architecture_of
from mmedpo_ray.models.architectures.base import Architecture
from mmedpo_ray.models.loading import load_config, load_model, resolve_model

# How like an existing layer (by difflib's ratio) a wrong name must be for "did you mean".
_LEAST_LIKENESS = 0.6
# Names of probabilities in transformers: attention_dropout, resid_pdrop, attention_probs_dropout_prob.
_DROPOUT = re.compile(r"dropout|pdrop")


@dataclass(frozen=True)
class TrainingSpec:
    """Everything a training worker needs to know; it travels to every rank.

    Attributes:
        align: the settings, with ``objective`` and ``learning_rate`` of the role.
        model: as ``model.path``.
        seed: of LoRA initialisation, order and dropout.
        folder: receives checkpoints, metrics and the trained weights (shared by all nodes).
        prepared: folder of the `prepared` table.
        key: identity of the run; checkpoints of another key are not resumed.
        use_gpu: whether each rank has a GPU.
        launch: identity of this launch, see :mod:`mmedpo_ray.align.checkpoint.run_lock`.
        prepared_key: of the `prepared` table; ``None`` accepts any.
        prepared_with: settings of that table (:mod:`~mmedpo_ray.tables.provenance`), for messages.
        check_reference: whether the first step compares the table with the untrained policy.
    """

    align: AlignConfig
    model: str
    seed: int
    folder: Path
    prepared: str
    key: str
    use_gpu: bool
    launch: str
    prepared_key: str | None = None
    prepared_with: dict[str, Any] | None = None
    check_reference: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and of the computation."""
        return torch.bfloat16 if self.align.precision == "bf16" else torch.float32


class Policy(nn.Module):
    """The model under training; ``forward`` is :func:`~mmedpo_ray.align.packing.logps.response_logps`.

    DeepSpeed gathers sharded weights in hooks of ``forward``, so everything that touches weights happens
    inside it.
    """

    def __init__(
        self, model: nn.Module, *, with_reference: bool = False, kl_forward_share: float | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._options: dict[str, Any] = {
            "with_reference": with_reference,
            "kl_forward_share": kl_forward_share,
        }

    def forward(self, batch: PackedTrees) -> tuple[Any, ...]:
        """See :class:`~mmedpo_ray.align.losses.ResponseLogps`; a plain tuple, because hooks rebuild it."""
        return tuple(response_logps(self.model, batch, **self._options))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their name in the model, sorted."""
        named = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return dict(sorted(named.items()))

    def load_parameters(self, read: Callable[[str], Tensor]) -> None:
        """Sets the trainable parameters, which ``read`` returns by name; call it before they are sharded."""
        with torch.no_grad():
            for name, value in self.trained_parameters().items():
                value.copy_(read(name))


def build_policy(spec: TrainingSpec) -> Policy:
    """Loads the model and makes trainable what ``align.train`` and ``align.train_projector`` say.

    The result is the same on every rank and for every number of ranks. The vision tower is always frozen. The
    only dropout is that of LoRA, because the reference is computed without any.

    Raises:
        UserError: the language model lacks one of ``align.lora.target_modules``, or its family is not
            supported.
    """
    align = spec.align
    model = load_model(spec.model, spec.dtype)
    _check_window(model, align, spec.model)
    _disable_dropout(model)
    trained = _with_lora(model, spec) if align.train == "lora" else _unfreeze(model, align)
    use_packed_forward(trained, attention=align.attention, sharded=align.strategy == "zero3")
    if align.gradient_checkpointing:
        # Non-reentrant checkpointing checks saved tensors that ZeRO-3 has meanwhile released.
        language_model = model.get_submodule(architecture_of(model).language_model)
        language_model.gradient_checkpointing_enable({"use_reentrant": True})
    with_kl = align.objective == "dpo" and align.kl_coefficient > 0
    return Policy(
        trained,
        with_reference=with_kl or reference_source(align) == "online",
        kl_forward_share=align.kl_forward_share if with_kl else None,
    )


def _disable_dropout(model: nn.Module) -> None:
    """Sets all dropout probabilities of a transformers model to 0, also those in configurations."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Attention keeps its probability as a number of its own, or reads it from the configuration.
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if _DROPOUT.search(name) and isinstance(value, int | float) and not isinstance(value, bool):
                    setattr(holder, name, 0.0)


def check_model(model: str, align: AlignConfig) -> None:
    """Raises the errors of :func:`build_policy` before any weight is loaded.

    Args:
        model: as ``model.path``.
        align: the settings.

    Raises:
        UserError: as :func:`build_policy`.
    """
    from transformers import AutoModelForImageTextToText

    settings = load_config(model)
    check_attention(architecture_of(settings), align.attention)
    check_family(settings.text_config, along_tree=align.attention == "tree")
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(settings)
    _check_window(empty, align, model)
    if align.train == "lora":
        _check_targets(empty, align.lora.target_modules, model)


def _with_lora(model: Any, spec: TrainingSpec) -> Any:
    """A peft model with LoRA on the language model and, if wanted, a trained copy of the projector."""
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
            target_modules=target_pattern(architecture_of(model), lora.target_modules),
            # The original stays: with the adapter off, the model is the reference.
            modules_to_save=projector_names(model) if spec.align.train_projector else None,
            task_type="CAUSAL_LM",
            base_model_name_or_path=resolve_model(spec.model),
        ),
        # ZeRO-3 needs one dtype; the exact fp32 copy lives in the optimizer.
        autocast_adapter_dtype=False,
    )


def _unfreeze(model: Any, align: AlignConfig) -> Any:
    """Makes the language model trainable, with embeddings, norms and lm_head; returns the model."""
    architecture = architecture_of(model)
    trained = [architecture.language_model, "lm_head"]
    trained += architecture.projector if align.train_projector else []
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    return model


def projector_names(model: Any) -> list[str]:
    """The projector's modules as peft looks for them: by the ends of full names, and no list of modules."""
    found = []
    for name in architecture_of(model).projector:
        short, module = name.removeprefix("model."), model.get_submodule(name)
        is_list = isinstance(module, nn.ModuleList)
        found += [f"{short}.{number}" for number in range(len(module))] if is_list else [short]
    return found


def target_pattern(architecture: Architecture, names: Sequence[str]) -> str:
    """A pattern of full names of layers, in the language model only: CLIP towers have a q_proj too."""
    inside = architecture.language_model.rpartition(".")[2]
    return rf".*\.{inside}\..*\.({'|'.join(names)})"


def _check_targets(model: Any, names: Sequence[str], model_name: str) -> None:
    """Every name must match linear layers of the language model, and nothing else in it.

    Raises:
        UserError: lists the wrong names and similar correct ones.
    """
    architecture = architecture_of(model)
    layers = {
        name: isinstance(module, nn.Linear)
        for name, module in model.named_modules()
        if name.startswith(f"{architecture.language_model}.")
    }

    def is_target(name: str) -> bool:
        try:
            pattern = re.compile(target_pattern(architecture, [name]))
        except re.error:
            return False
        found = [is_linear for layer, is_linear in layers.items() if pattern.fullmatch(layer)]
        return bool(found) and all(found)

    wrong = [name for name in names if not is_target(name)]
    if names and not wrong:
        return
    known = sorted({name.rpartition(".")[2] for name, is_linear in layers.items() if is_linear})
    described = []
    for name in wrong:
        near = difflib.get_close_matches(name, known, cutoff=_LEAST_LIKENESS)
        described.append(f"{name} (did you mean {' or '.join(near)}?)" if near else name)
    raise UserError(
        f"align.lora.target_modules names no layer of the language model of {model_name}"
        f"{' with ' if described else ''}{', '.join(described)}. Its linear layers are {', '.join(known)}."
    )


def _check_window(model: Any, align: AlignConfig, model_name: str) -> None:
    """In a packed tree a token sees all its ancestors; sequences must fit a model's attention window."""
    if architecture_of(model).layer_masks:
        # Windows are among the masks.
        return
    window = getattr(model.config.text_config, "sliding_window", None)
    if window is not None and align.max_length > window:
        raise UserError(
            f"{model_name} attends to the last {window} tokens only (sliding_window), align.max_length is "
            f"{align.max_length}. Lower align.max_length to {window}."
        )


def learning_rate_factor(scheduler: str, step: int, total_steps: int, warmup_ratio: float) -> float:
    """The factor on ``align.learning_rate`` at a step: a linear warm-up, then a decay to 0 or none.

    Args:
        scheduler: cosine, linear or constant.
        step: optimizer step, 0 ≤ step < total_steps.
        total_steps: of the run.
        warmup_ratio: share of the steps in the warm-up.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if scheduler == "linear" else 1.0
