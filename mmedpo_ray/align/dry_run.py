"""What a training run would do, before anything is loaded: steps, tokens, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mmedpo_ray import tables
from mmedpo_ray.align.pair_index import ensure_index
from mmedpo_ray.align.pair_source import PairsInMemory, StoredPairs, hold_out
from mmedpo_ray.align.plan import Plan
from mmedpo_ray.align.prepare import prepare_pairs
from mmedpo_ray.align.prepare_station import finished_table
from mmedpo_ray.align.scaling import Geometry, checkpoint_bytes, step_traffic
from mmedpo_ray.config import AlignConfig, Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import PromptWriter, load_processor, resolve_model
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

    Reads the prepared pairs; where `align` has not prepared them yet it tokenises `scored` in this process, which takes
    about half a millisecond a pair. Loads no weights and starts nothing.

    Raises:
        UserError: `scored` is missing, or no pair can be trained on.
    """
    from transformers import AutoConfig

    align = config.align
    source, dropped = _pairs(config)
    trained_on, _ = hold_out(source, align.validation_share, config.run.seed)
    plan = Plan.of(trained_on, align, config.run.seed)
    largest = plan.largest_micro_batch(align.max_workers)
    figures: dict[str, Any] = {
        **plan.summary(),
        "dropped": dropped,
        "ranks": align.max_workers,
        "largest_forward_tokens": largest.tokens,
        "largest_forward_responses": largest.response_tokens,
    }
    shape = Geometry.of(
        AutoConfig.from_pretrained(resolve_model(config.model.path)),
        align.lora.rank,
        align.lora.target_modules,
    )
    if align.train_projector:
        shape = shape.with_trained_projector()
    memory = estimate_memory(shape, align, largest.tokens, largest.response_tokens)
    traffic = step_traffic(
        shape,
        align.train,
        align.strategy,
        align.max_workers,
        weight_bytes=2 if align.precision == "bf16" else 4,
    )
    figures |= {
        "memory_gib_per_rank": round(memory.total, 2),
        "strategy": align.strategy,
        "traffic_bytes_per_step": traffic,
        "checkpoint_bytes": checkpoint_bytes(shape, align.train),
    }
    console.print(_table(figures, memory))
    return figures


def _pairs(config: Config) -> tuple[StoredPairs | PairsInMemory, int]:
    """The pairs of the run, prepared here if they are not yet, and how many rows are left out."""
    align, run = config.align, RunFolder(config.run.folder)
    writer = PromptWriter(load_processor(config.model.path))
    if (manifest := finished_table(config)) is not None:
        ensure_index(run.prepared, manifest)
        return StoredPairs(run.prepared, writer, align), sum(manifest.dropped.values())
    pairs, dropped = prepare_pairs(
        read_table(run.scored, tables.SCORED, "scored"),
        writer,
        max_length=align.max_length,
        visual_coefficient=align.visual_coefficient,
        reversed_visual_coefficient=align.reversed_visual_coefficient,
    )
    if not pairs:
        raise UserError(f"align: none of the {len(dropped):,} pairs in {run.scored} can be trained on.")
    return PairsInMemory(pairs), len(dropped)


def estimate_memory(shape: Geometry, align: AlignConfig, tokens: int, response_tokens: int) -> Memory:
    """Memory of one rank.

    Args:
        shape: of the model.
        align: precision, strategy and checkpointing.
        tokens: of the largest micro-batch.
        response_tokens: of these, those with logits.
    """
    size = 2 if align.precision == "bf16" else 4
    ranks = align.max_workers
    kept = _KEPT_WITH_CHECKPOINTING if align.gradient_checkpointing else _KEPT_PER_LAYER
    activations = tokens * shape.hidden * shape.num_layers * kept * size
    if align.gradient_checkpointing:
        activations += tokens * shape.hidden * _KEPT_PER_LAYER * size
    logits = response_tokens * shape.vocabulary * 4 * 2
    # Exact copy, two moments and the gradient (kept in float32 by ddp); an adapter's weights come on top of the model's.
    state = 16 if align.strategy == "ddp" else (12 + size) / ranks
    trained = shape.trained(align.train)
    beside = trained if align.train == "lora" else 0
    return Memory(
        weights=shape.total * size / (ranks if align.strategy == "zero3" else 1) / _GIB,
        trained=(trained * state + beside * size) / _GIB,
        activations=(activations + logits) / _GIB,
    )


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
        "traffic a rank and step": f"{figures['traffic_bytes_per_step'] / 1e6:,.1f} MB received under "
        f"{figures['strategy']}, with one micro-batch",
        "checkpoint": f"{figures['checkpoint_bytes'] / 1e6:,.1f} MB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
