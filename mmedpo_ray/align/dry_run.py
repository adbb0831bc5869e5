"""What a training run would do, before anything is loaded: steps, tokens, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from mmedpo_ray import tables
from mmedpo_ray.align.plan import Plan, hold_out
from mmedpo_ray.align.prepare import prepare_pairs
from mmedpo_ray.config import AlignConfig, Config
from mmedpo_ray.console import console
from mmedpo_ray.models.loading import PROJECTOR, PromptWriter, load_processor, resolve_model
from mmedpo_ray.run_folder import RunFolder
from mmedpo_ray.stage import read_table

_GIB = 2**30
# Bytes a layer keeps for the backward pass, per token and hidden unit, in units of the element size: measured forms of
# a pre-norm transformer block with a gated MLP under scaled dot-product attention.
_KEPT_PER_LAYER = 16
_KEPT_WITH_CHECKPOINTING = 1


@dataclass(frozen=True)
class Memory:
    """Estimated memory of one rank, GiB.

    Attributes:
        weights: of the model, a share of them under ZeRO-3.
        trained: gradients and Adam's state of what is trained, and the weights of an adapter.
        activations: of the largest micro-batch, logits of response tokens included.
    """

    weights: float
    trained: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.activations


def dry_run(config: Config) -> dict[str, Any]:
    """Prints and returns the plan of `mmedpo align` and what it would need.

    Reads `scored` and the tokenizer, loads no weights and starts nothing.

    Raises:
        UserError: `scored` is missing, or no pair can be trained on.
    """
    align = config.align
    scored = read_table(RunFolder(config.run.folder).scored, tables.SCORED, "scored")
    pairs, dropped = prepare_pairs(
        scored,
        PromptWriter(load_processor(config.model.path)),
        max_length=align.max_length,
        visual_coefficient=align.visual_coefficient,
        reversed_visual_coefficient=align.reversed_visual_coefficient,
    )
    trained_on, _ = hold_out(pairs, align.validation_share, config.run.seed)
    plan = Plan.of(trained_on, align, config.run.seed)
    largest = plan.largest_micro_batch(align.max_workers)
    figures = {
        **plan.summary(),
        "dropped": len(dropped),
        "ranks": align.max_workers,
        "largest_forward_tokens": largest.tokens,
        "largest_forward_responses": largest.response_tokens,
    }
    memory = estimate_memory(config.model.path, align, largest.tokens, largest.response_tokens)
    figures |= {"memory_gib_per_rank": round(memory.total, 2)}
    console.print(_table(figures, memory))
    return figures


def estimate_memory(model: str, align: AlignConfig, tokens: int, response_tokens: int) -> Memory:
    """Memory of one rank from the model's configuration alone.

    Args:
        model: as ``model.path``.
        align: precision, strategy, LoRA and checkpointing.
        tokens: of the largest micro-batch.
        response_tokens: of these, those with logits.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    settings = AutoConfig.from_pretrained(resolve_model(model))
    with torch.device("meta"):
        shape = AutoModelForImageTextToText.from_config(settings)
    size = 2 if align.precision == "bf16" else 4
    frozen = sum(parameter.numel() for parameter in shape.parameters())
    inside, beside = _num_trained(shape, align)
    ranks = align.max_workers
    text = settings.text_config
    kept = _KEPT_WITH_CHECKPOINTING if align.gradient_checkpointing else _KEPT_PER_LAYER
    activations = tokens * text.hidden_size * text.num_hidden_layers * kept * size
    if align.gradient_checkpointing:
        activations += tokens * text.hidden_size * _KEPT_PER_LAYER * size
    logits = response_tokens * text.vocab_size * 4 * 2
    # Exact copy, two moments and the gradient (kept in float32 by ddp); an adapter's weights come on top of the model's.
    state = 16 if align.strategy == "ddp" else (12 + size) / ranks
    return Memory(
        weights=frozen * size / (ranks if align.strategy == "zero3" else 1) / _GIB,
        trained=((inside + beside) * state + beside * size) / _GIB,
        activations=(activations + logits) / _GIB,
    )


def _num_trained(shape: torch.nn.Module, align: AlignConfig) -> tuple[int, int]:
    """Trained parameters that are the model's own, and those beside it (LoRA, a copy of the projector)."""
    sizes = {name: value.numel() for name, value in shape.named_parameters()}
    projector = sum(size for name, size in sizes.items() if PROJECTOR in name) * align.train_projector
    if align.train == "full":
        own = sum(
            size for name, size in sizes.items() if ".language_model." in name or name.startswith("lm_head.")
        )
        return own + projector, 0
    lora = sum(
        align.lora.rank * (module.in_features + module.out_features)
        for name, module in shape.named_modules()
        if isinstance(module, torch.nn.Linear)
        and ".language_model." in f".{name}"
        and name.rsplit(".", 1)[-1] in align.lora.target_modules
    )
    return 0, projector + lora


def _table(figures: dict[str, Any], memory: Memory) -> Table:
    table = Table(title="what `mmedpo align` would do", show_header=False)
    rows = {
        "pairs": f"{figures['pairs']:,} ({figures['visual_pairs']:,} visual; {figures['dropped']:,} dropped)",
        "images (trees)": f"{figures['images']:,}",
        "optimizer steps": f"{figures['steps']:,} ({figures['epochs']:g} epochs)",
        "tokens an epoch": f"{figures['tokens_per_epoch']:,}, {figures['sharing_factor']} times fewer than unpacked",
        "effective sample size": f"{figures['effective_sample_size']:.0%} of the pairs",
        "largest forward": f"{figures['largest_forward_tokens']:,} tokens, "
        f"{figures['largest_forward_responses']:,} with logits, on {figures['ranks']} ranks",
        "memory a rank (estimate)": f"{memory.total:.2f} GiB: weights {memory.weights:.2f}, trained {memory.trained:.2f}, "
        f"activations {memory.activations:.2f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
