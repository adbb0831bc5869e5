"""`mmedpo align --dry-run`: prints what a training run would do and need."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from mmedpo_ray.align.data.pair_index import ensure_index
from mmedpo_ray.align.data.pair_source import PairSource, StoredPairs
from mmedpo_ray.align.data.prepare_stage import finished_table
from mmedpo_ray.align.plan.preview import Preview, described_rank, preview, tokenise_scored, warn_of_waste
from mmedpo_ray.align.policy import check_model
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import EMBEDDED_NAME, load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables.run_folder import RunFolder


def dry_run(config: Config) -> dict[str, Any]:
    """Prints and returns the plan of `mmedpo align` and what it would need.

    Reads the index of the prepared pairs; if `align` has not prepared them yet, it tokenises `scored` in this
    process, of a large table some images, and scales their figures. Loads no weights and starts nothing.

    Raises:
        UserError: `scored` is missing, no pair can be trained on, or training would refuse the model.
    """
    check_model(config.model.path, config.align)
    source, dropped, share = _pairs(config)
    expected = preview(source, config.align, config, share)
    figures = {**expected.figures, "dropped": dropped}
    console.print(_table(figures, expected, config))
    warn_of_waste(expected, config.align)
    return figures


def _pairs(config: Config) -> tuple[PairSource, int, float]:
    """The pairs of the run, the number of rows dropped, and the share of the images looked at."""
    run = RunFolder(config.run.folder)
    if (manifest := finished_table(config)) is not None:
        ensure_index(run.prepared, manifest)
        writer = PromptWriter(load_processor(config.model.path))
        return StoredPairs(run.prepared, writer, config.align), sum(manifest.dropped.values()), 1.0
    source, dropped, share = tokenise_scored(config)
    if not source.index.num_pairs:
        looked_at = "that were looked at " if share < 1.0 else ""
        raise UserError(f"align: none of the {dropped:,} pairs {looked_at}in {run.scored} can be trained on.")
    return source, round(dropped / share), share


def _table(figures: dict[str, Any], expected: Preview, config: Config) -> Table:
    align, about, model = config.align, expected.about, config.model.path
    lora = f"LoRA of rank {align.lora.rank}"
    rows = {
        "model": "the embedded tiny LLaVA" if model == EMBEDDED_NAME else escape(model),
        "objective": _objective(align),
        "trained": lora if align.train == "lora" else "all weights of the language model",
        "learning rate": f"{align.learning_rate:g}, {align.scheduler}",
        "pairs": f"{about}{figures['pairs']:,} ({figures['visual_pairs']:,} visual; "
        f"{figures['dropped']:,} dropped)",
        "images (trees)": f"{about}{figures['images']:,}",
        "optimizer steps": f"{about}{figures['steps']:,} ({figures['epochs']:g} epochs)",
        "tokens an epoch": f"{about}{figures['tokens_per_epoch']:,}, {figures['sharing_factor']} times "
        "fewer than unpacked",
        "effective sample size": f"{figures['effective_sample_size']:.0%} of the pairs",
        "largest forward": f"{figures['largest_forward_tokens']:,} tokens, "
        f"{figures['largest_forward_responses']:,} with logits",
        f"memory of {described_rank(align)} about": str(expected.memory),
        "traffic a rank and step": f"{figures['traffic_bytes_per_step'] / 1e6:,.1f} MB received under "
        f"{figures['strategy']} by {figures['ranks']} ranks, with one micro-batch",
        "checkpoint": f"{figures['checkpoint_bytes'] / 1e6:,.1f} MB",
    }
    table = Table(title="what `mmedpo align` would do", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _objective(align: AlignConfig) -> str:
    """The loss and the terms that have a weight: ``dpo: loss sigmoid, beta 0.1, visual_coefficient 0.1``."""
    if align.objective == "sft":
        return "sft: the likelihood of the chosen answers"
    terms = {"loss": align.loss, "beta": f"{align.beta:g}"}
    for name, value in align:
        if name.endswith("_coefficient") and value:
            terms[name] = f"{value:g}"
    return f"dpo: {', '.join(f'{name} {value}' for name, value in terms.items())}"
