"""What a training run is expected to need, said before any weight is loaded: steps, tokens, memory.

Memory is counted tensor by tensor as the packed forward keeps them for its backward pass (a test compares the count with what
autograd keeps); the allocator's losses, the vision tower's and NCCL's buffers come on top.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmedpo_ray.align.data.pair_source import PairSource, StoredPairs, TablePairs, hold_out
from mmedpo_ray.align.data.tokenise import COLUMNS, Preparation, prepare_table
from mmedpo_ray.align.engines.deepspeed import MOST_IN_BUCKET
from mmedpo_ray.align.packing import lm_head
from mmedpo_ray.align.packing.tree_attention import QUERIES_PER_BLOCK
from mmedpo_ray.align.plan.plan import Forwards, ForwardSize, Plan
from mmedpo_ray.align.plan.step_costs import Geometry, checkpoint_bytes, step_traffic
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.io import storage
from mmedpo_ray.models.loading import PromptWriter, load_processor, resolve_model
from mmedpo_ray.tables.manifest import read_manifest
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import footer_of

log = logging.getLogger(__name__)

# Numbers of weights that DeepSpeed keeps gathered at a time (stage3_max_live_parameters).
_MOST_GATHERED = 1_000_000_000
_GIB = 2**30
_FLOAT32 = 4
# Rows tokenised before the reference's forward passes: ten seconds of one core.
_ROWS_LOOKED_AT = 20_000
# Rows in which all pairs of these images are looked for, wherever they stand: a second; and files of larger tables.
_IDS_LOOKED_AT = 1_000_000
_FILES_LOOKED_AT = 16
# Above these a setting is worth a change; the last step of an epoch may always have few images.
_REPETITION_SPOKEN_OF, _EMPTY_SPOKEN_OF = 1.05, 0.1


@dataclass(frozen=True)
class Memory:
    """Expected memory of one rank, GiB.

    Attributes:
        weights: of the model; under ZeRO-3 a share of them, and those that are gathered at a time.
        trained: gradients, their buckets and Adam's state of what is trained, and the weights of an adapter.
        activations: of the largest micro-batch, logits of response tokens included.
    """

    weights: float
    trained: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.trained + self.activations

    def in_words(self) -> str:
        """The sum and its parts."""
        return (
            f"{self.total:.2f} GiB: weights {self.weights:.2f}, trained {self.trained:.2f}, "
            f"activations {self.activations:.2f}"
        )


@dataclass(frozen=True)
class Expectation:
    """What a run would do.

    Attributes:
        figures: of the plan, and ``ranks``, ``largest_forward_tokens``, ``largest_forward_responses``, ``memory_gib_per_rank``,
            ``strategy``, ``traffic_bytes_per_step``, ``checkpoint_bytes``.
        memory: of a rank where the fewest ranks train (``align.num_workers: [min, max]``): they share the state among them.
        forwards: micro-batches where the most ranks train.
    """

    figures: dict[str, Any]
    memory: Memory
    forwards: Forwards


def expect(source: PairSource, align: AlignConfig, config: Config, share: float = 1.0) -> Expectation:
    """The figures of a run.

    Args:
        source: its pairs, held-out ones among them.
        align: settings of the role.
        config: all settings.
        share: of the run's images that the pairs are of; figures are scaled to all of them.

    Raises:
        UserError: there is no pair to train on, or no model.
    """
    trained_on, _ = hold_out(source, align.validation_share, config.run.seed)
    plan = Plan.of(trained_on, align, config.run.seed)
    # Where the images looked at do not fill a step, they are those of some of its ranks.
    filled = min(1.0, plan.num_images / min(align.images_per_step, plan.num_images / share))
    few, many = (max(1, round(filled * ranks)) for ranks in (align.min_workers, align.max_workers))
    forwards = plan.forwards(many)
    # Fewer ranks have more to compute at once.
    largest = plan.forwards(few).largest if few < many else forwards.largest
    shape = geometry(config)
    memory = estimate_memory(shape, align, largest, align.min_workers)
    traffic = step_traffic(
        shape,
        align.train,
        align.strategy,
        align.max_workers,
        weight_bytes=2 if align.precision == "bf16" else 4,
    )
    figures = {
        **_scaled(plan.summary(forwards), share, align),
        "ranks": align.max_workers,
        "largest_forward_tokens": largest.tokens,
        "largest_forward_responses": largest.response_tokens,
        "memory_gib_per_rank": round(memory.total, 2),
        "strategy": align.strategy,
        "traffic_bytes_per_step": traffic,
        "checkpoint_bytes": checkpoint_bytes(shape, align.train),
    }
    return Expectation(figures, memory, forwards)


# Run folder → what was announced ahead, so that the same is not said again.
_ahead: dict[str, str] = {}


def announce(name: str, align: AlignConfig, config: Config) -> None:
    """Prints what training on the `prepared` table of a run is expected to do.

    Args:
        name: of the stage.
        align: settings of the role.
        config: all settings.
    """
    writer = PromptWriter(load_processor(config.model.path))
    source = StoredPairs(RunFolder(config.run.folder).prepared, writer, align)
    expected = expect(source, align, config)
    line = plan_line(name, expected, align)
    if line != _ahead.pop(config.run.folder, None):
        console.print(line, soft_wrap=True)
    warn_of_waste(expected, align)


def warn_of_waste(expected: Expectation, align: AlignConfig) -> None:
    """Says where limits cut trees apart, so that images are computed again, and where ranks have nothing to compute."""
    forwards, images = expected.forwards, min(align.images_per_step, expected.figures["images"])
    if forwards.repetition > _REPETITION_SPOKEN_OF:
        limits = [f"align.{name} (now {getattr(align, name):,})" for name in forwards.cut_by]
        log.warning(
            "align: the pairs of an image are more than a micro-batch may have, so %.3g times the tokens of whole trees are "
            "computed. Raise %s as far as memory allows",
            forwards.repetition,
            " and ".join(limits),
        )
    if forwards.empty > _EMPTY_SPOKEN_OF:
        log.warning(
            "align: a step has %d images for %d ranks, so %.0f%% of the micro-batches are empty. Lower align.num_workers%s",
            images,
            align.max_workers,
            100 * forwards.empty,
            " or raise align.images_per_step" if expected.figures["images"] > images else "",
        )


def announce_ahead(config: Config) -> None:
    """The same before there is such a table: tokenises `scored` in this process, of a large one some images with all their pairs."""
    source, _, share = tokenise(config)
    if not source.index.num_pairs:
        # The stage that writes the table says why.
        return
    expected = expect(source, config.align, config, share)
    _ahead[config.run.folder] = line = plan_line("align", expected, config.align)
    console.print(line, soft_wrap=True)


def tokenise(config: Config) -> tuple[TablePairs, int, float]:
    """The pairs in `scored`, tokenised in this process: about half a millisecond a pair, of a large table some of its images.

    Returns:
        The pairs, how many rows are left out, and the share of the images that was looked at.
    """
    writer = PromptWriter(load_processor(config.model.path))
    scored, share = _read_scored(RunFolder(config.run.folder).scored, _ROWS_LOOKED_AT)
    kept, dropped = prepare_table(scored, writer, Preparation.of(config.align))
    return TablePairs(kept, writer, config.align), len(dropped), share


def _read_scored(folder: str, most_rows: int) -> tuple[pa.Table, float]:
    """The table, or whole images that are spread over it and have about so many rows; and the share of the images.

    Of a table too large to look for all pairs of an image, those that stand together count as all.
    """
    manifest = read_manifest(folder)
    paths = storage.list_files(folder, ".parquet")
    count = manifest.rows_out if manifest else sum(footer_of(path).num_rows for path in paths)
    if count > _IDS_LOOKED_AT:
        rows = _row_groups(paths, most_rows)
        return rows, len(rows) / count
    dataset = storage.dataset(folder)
    if count <= most_rows:
        return dataset.to_table(columns=COLUMNS), 1.0
    images = pc.unique(dataset.to_table(columns=["image_id"])["image_id"])
    some = images.take(pa.array(range(0, len(images), math.ceil(count / most_rows))))
    return dataset.to_table(columns=COLUMNS, filter=pc.field("image_id").isin(some)), len(some) / len(images)


def _row_groups(paths: Sequence[str], most_rows: int) -> pa.Table:
    """Rows of row groups that are spread over some files of a table, without images that a row group may hold in part."""
    places = np.linspace(0, len(paths) - 1, min(len(paths), _FILES_LOOKED_AT)).astype(int)
    found = []
    for place in places.tolist():
        filesystem, path = storage.resolve(paths[place])
        with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as file:
            groups = file.num_row_groups
            wanted = most_rows * groups // (len(places) * max(1, file.metadata.num_rows))
            count = min(max(1, wanted), groups)
            for number in range(count):
                group = (2 * number + 1) * groups // (2 * count)
                found.append(_inner_images(file.read_row_group(group, columns=COLUMNS)))
    return pa.concat_tables(found)


def _inner_images(rows: pa.Table) -> pa.Table:
    """Rows of all images but the first and the last; all rows where there are no others."""
    images = rows["image_id"]
    is_inner = pc.invert(
        pc.is_in(
            images, value_set=pa.concat_arrays([images[:1].combine_chunks(), images[-1:].combine_chunks()])
        )
    )
    return rows.filter(is_inner) if pc.any(is_inner).as_py() else rows


def geometry(config: Config) -> Geometry:
    """Sizes of the model, from its configuration alone."""
    from transformers import AutoConfig

    align = config.align
    settings = AutoConfig.from_pretrained(resolve_model(config.model.path))
    shape = Geometry.of(settings, align.lora.rank, align.lora.target_modules)
    return shape.with_trained_projector() if align.train_projector else shape


def plan_line(name: str, expected: Expectation, align: AlignConfig) -> str:
    """What a run would do in one line."""
    plan = expected.figures
    about = "about " if is_scaled(expected) else ""
    return (
        f"[dim]{name}: {about}{plan['steps']:,} steps of {plan['pairs']:,} pairs on {plan['images']:,} images; "
        f"{about}{plan['tokens_per_epoch']:,} tokens an epoch, {plan['sharing_factor']} times fewer than unpacked; "
        f"effective sample size {plan['effective_sample_size']:.0%}; memory of {rank_in_words(align)} about "
        f"{expected.memory.in_words()}[/dim]"
    )


def rank_in_words(align: AlignConfig) -> str:
    """Whose memory is meant."""
    if align.min_workers == align.max_workers:
        return "a rank"
    return f"a rank of {align.min_workers}, the fewest of align.num_workers,"


def is_scaled(expected: Expectation) -> bool:
    """Whether the figures come from a share of the images."""
    return "share_looked_at" in expected.figures


def _scaled(found: dict[str, Any], share: float, align: AlignConfig) -> dict[str, Any]:
    """The plan's figures of all pairs from those of a share of their images."""
    if share == 1.0:
        return found
    figures = dict(found)
    for name in ("pairs", "visual_pairs", "reversed_pairs", "images", "tokens_per_epoch"):
        figures[name] = round(figures[name] / share)
    figures["steps_per_epoch"] = math.ceil(figures["images"] / align.images_per_step)
    steps = align.epochs * figures["steps_per_epoch"]
    figures["steps"] = min(steps, align.max_steps or steps)
    figures["epochs"] = round(figures["steps"] / figures["steps_per_epoch"], 3)
    figures["share_looked_at"] = share
    return figures


# ---------------------------------------------------------------------- memory


def estimate_memory(shape: Geometry, align: AlignConfig, largest: ForwardSize, ranks: int) -> Memory:
    """Memory of one rank.

    Args:
        shape: of the model.
        align: precision, strategy, attention and checkpointing.
        largest: micro-batch of a rank.
        ranks: that share weights or state.
    """
    size = 2 if align.precision == "bf16" else 4
    trained = shape.trained(align.train)
    # An adapter's weights come on top of the model's.
    beside = trained if align.train == "lora" else 0
    weights: float = shape.total * size
    if align.strategy == "zero3":
        weights = weights / ranks + (min(_MOST_GATHERED, shape.total) * size if ranks > 1 else 0)
    activations = size * kept_numbers(shape, align, largest) + logit_bytes(shape, align, largest)
    return Memory(
        weights=weights / _GIB,
        trained=(
            trained * _state_bytes(align, size) / _sharing(align, ranks)
            + _bucket_bytes(align, trained, size)
            + beside * size
        )
        / _GIB,
        activations=activations / _GIB,
    )


def _sharing(align: AlignConfig, ranks: int) -> int:
    """How many ranks share gradients and state."""
    return 1 if align.strategy == "ddp" else ranks


def _state_bytes(align: AlignConfig, size: int) -> int:
    """Bytes a trained number, besides the number itself in the precision of training, of ``size`` bytes.

    All in float32: Adam's two moments, the sum of the gradients, and an exact copy of a weight that is not exact itself. ddp has a
    rounded gradient beside the sum; DeepSpeed always makes the copy, and one of the sum while it updates.
    """
    if align.strategy == "ddp":
        return 12 if size == 4 else 16 + size
    return 20


def _bucket_bytes(align: AlignConfig, trained: int, size: int) -> int:
    """Gradients that DeepSpeed gathers before it sums them over the ranks; of ZeRO-2 a second bucket while the first travels."""
    buckets = {"zero3": 1, "zero2": 2, "ddp": 0}[align.strategy]
    return buckets * min(MOST_IN_BUCKET, trained) * size


def kept_numbers(shape: Geometry, align: AlignConfig, forward: ForwardSize) -> int:
    """Numbers that the layers keep of a micro-batch for its backward pass, in the precision of training.

    A layer keeps of a token: its input, the residual behind attention and both normalised (4·hidden); gate, up, the activated gate
    and the product of both (4·intermediate); queries, their block's copy, the attended values and these in the rows' order; keys and
    values, and their copies for every block (:mod:`~mmedpo_ray.align.packing.tree_attention`); LoRA's products of rank size. The last layer
    keeps most of that for response tokens alone. The masks of blocks and of response tokens are there once. With checkpointing there is the input of every layer, and one layer's rest.
    """
    tokens, outputs = forward.tokens, min(forward.response_tokens, forward.tokens)
    queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    reduced = align.lora.rank * len(align.lora.target_modules) if align.train == "lora" else 0
    of_token = 4 * shape.hidden + 4 * shape.intermediate + 4 * queries + 2 * keys + reduced
    shared = shape.heads // shape.key_heads
    copies, mask = 0, shared * outputs * tokens // max(1, forward.images)
    if align.attention == "tree":
        branches = max(0, tokens - forward.images * shape.image_tokens)
        blocks = math.ceil(branches / max(1, forward.images) / QUERIES_PER_BLOCK) * forward.images
        copies = 2 * keys * (blocks * shape.image_tokens + branches)
        seen = shape.image_tokens + branches // max(1, blocks)
        mask += shared * branches * seen
    layer = tokens * of_token + copies
    last = tokens * (2 * shape.hidden + 4 * keys) + outputs * of_token
    if align.gradient_checkpointing:
        return shape.num_layers * tokens * shape.hidden + layer + mask
    return (shape.num_layers - 1) * layer + last + mask


def logit_bytes(shape: Geometry, align: AlignConfig, forward: ForwardSize) -> int:
    """Logits of response tokens and their gradient at the height of the backward pass, in float32 (:mod:`~mmedpo_ray.align.packing.lm_head`)."""
    logits = min(forward.response_tokens * shape.vocabulary, max(lm_head.MOST_LOGITS, shape.vocabulary))
    # Log-probabilities, their gradient and the logits; the divergence has both models' with probabilities and products.
    return logits * _FLOAT32 * (8 if align.kl_coefficient else 3)
