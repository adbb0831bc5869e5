"""What a training run would do, before anything is loaded: steps, tokens, memory."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from mmedpo_ray.align.data.pair_index import ensure_index
from mmedpo_ray.align.data.pair_source import PairSource, StoredPairs
from mmedpo_ray.align.data.prepare_stage import finished_table
from mmedpo_ray.align.plan.estimates import (
    Expectation,
    expect,
    is_scaled,
    rank_in_words,
    tokenise,
    warn_of_waste,
)
from mmedpo_ray.align.policy import check_model
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import EMBEDDED_NAME, PromptWriter, load_processor
from mmedpo_ray.tables.run_folder import RunFolder

_COEFFICIENTS = {
    "nll_coefficient",
    "visual_coefficient",
    "reversed_visual_coefficient",
    "anchor_coefficient",
    "kl_coefficient",
}


def dry_run(config: Config) -> dict[str, Any]:
    """Prints and returns the plan of `mmedpo align` and what it would need.

    Reads the index of the prepared pairs; where `align` has not prepared them yet it tokenises `scored` in this process, of a
    large table some images, and scales their figures. Loads no weights and starts nothing.

    Raises:
        UserError: `scored` is missing, no pair can be trained on, or training would refuse the model.
    """
    check_model(config.model.path, config.align)
    source, dropped, share = _pairs(config)
    expected = expect(source, config.align, config, share)
    figures = {**expected.figures, "dropped": dropped}
    console.print(_table(figures, expected, config))
    warn_of_waste(expected, config.align)
    return figures


def _pairs(config: Config) -> tuple[PairSource, int, float]:
    """The pairs of the run, prepared here if they are not yet, how many rows are left out, and the share that was looked at."""
    run = RunFolder(config.run.folder)
    if (manifest := finished_table(config)) is not None:
        ensure_index(run.prepared, manifest)
        writer = PromptWriter(load_processor(config.model.path))
        return StoredPairs(run.prepared, writer, config.align), sum(manifest.dropped.values()), 1.0
    source, dropped, share = tokenise(config)
    if not source.index.num_pairs:
        looked_at = "that were looked at " if share < 1.0 else ""
        raise UserError(f"align: none of the {dropped:,} pairs {looked_at}in {run.scored} can be trained on.")
    return source, round(dropped / share), share


def _table(figures: dict[str, Any], expected: Expectation, config: Config) -> Table:
    align = config.align
    about = "about " if is_scaled(expected) else ""
    table = Table(title="what `mmedpo align` would do", show_header=False)
    rows = {
        "model": escape(config.model.path)
        if config.model.path != EMBEDDED_NAME
        else "the embedded tiny LLaVA",
        "objective": _objective(align),
        "trained": f"LoRA of rank {align.lora.rank}"
        if align.train == "lora"
        else "all weights of the language model",
        "learning rate": f"{align.learning_rate:g}, {align.scheduler}",
        "pairs": f"{about}{figures['pairs']:,} ({figures['visual_pairs']:,} visual; {figures['dropped']:,} dropped)",
        "images (trees)": f"{about}{figures['images']:,}",
        "optimizer steps": f"{about}{figures['steps']:,} ({figures['epochs']:g} epochs)",
        "tokens an epoch": f"{about}{figures['tokens_per_epoch']:,}, {figures['sharing_factor']} times fewer than unpacked",
        "effective sample size": f"{figures['effective_sample_size']:.0%} of the pairs",
        "largest forward": f"{figures['largest_forward_tokens']:,} tokens, "
        f"{figures['largest_forward_responses']:,} with logits",
        f"memory of {rank_in_words(align)} about": expected.memory.in_words(),
        "traffic a rank and step": f"{figures['traffic_bytes_per_step'] / 1e6:,.1f} MB received under "
        f"{figures['strategy']} by {figures['ranks']} ranks, with one micro-batch",
        "checkpoint": f"{figures['checkpoint_bytes'] / 1e6:,.1f} MB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _objective(align: AlignConfig) -> str:
    """``dpo: loss sigmoid, beta 0.1, visual_coefficient 0.1``: the terms that have a weight."""
    if align.objective == "sft":
        return "sft: the likelihood of the chosen answers"
    terms = [f"loss {align.loss}", f"beta {align.beta:g}"]
    for name, value in align.model_dump(include=_COEFFICIENTS).items():
        if value:
            terms.append(f"{name} {value:g}")
    return f"dpo: {', '.join(terms)}"
