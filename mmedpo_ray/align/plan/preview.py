"""What a training run will need, before any weight is loaded: steps, tokens, memory, traffic."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmedpo_ray.align.data.pair_source import PairSource, StoredPairs, TablePairs
from mmedpo_ray.align.data.tokenise import COLUMNS, prepare_table
from mmedpo_ray.align.plan.estimates import (
    Geometry,
    Memory,
    checkpoint_bytes,
    estimate_memory,
    step_traffic,
    weight_bytes,
)
from mmedpo_ray.align.plan.plan import Forwards, Plan
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console
from mmedpo_ray.io import storage
from mmedpo_ray.models.architectures import architecture_of
from mmedpo_ray.models.loading import load_config, load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables.manifest import read_manifest
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.slices import footer_of

log = logging.getLogger(__name__)

# Rows tokenised before the reference's forward passes: ten seconds of one core.
_ROWS_LOOKED_AT = 20_000
# Rows among which all pairs of these images are searched: a second; and files of larger tables.
_IDS_LOOKED_AT = 1_000_000
_FILES_LOOKED_AT = 16
# A setting is worth a change above these; the last step of an epoch may always have few images.
REPETITION_WARN_ABOVE, EMPTY_WARN_ABOVE = 1.05, 0.1


class Preview(NamedTuple):
    """What a run will do.

    Attributes:
        figures: of the plan, and ``ranks``, ``largest_forward_tokens``, ``largest_forward_responses``,
            ``memory_gib_per_rank``, ``strategy``, ``traffic_bytes_per_step``, ``checkpoint_bytes``; with
            ``share_looked_at`` if they are scaled up from a share of the images.
        memory: of a rank with the fewest ranks (``align.num_workers: [min, max]``), which share the state.
        forwards: micro-batches with the most ranks.
    """

    figures: dict[str, Any]
    memory: Memory
    forwards: Forwards

    @property
    def about(self) -> str:
        """Qualifies figures that are scaled up."""
        return "about " if "share_looked_at" in self.figures else ""


def preview(source: PairSource, align: AlignConfig, config: Config, share: float = 1.0) -> Preview:
    """The figures of a run, and warnings about settings that waste work.

    Args:
        source: its pairs, held-out ones included.
        align: settings of the role.
        config: all settings.
        share: of the run's images that the pairs are from; figures are scaled up to all of them.

    Raises:
        UserError: there is no pair to train on, or no model.
    """
    trained_on, _ = source.hold_out(align.validation_share, config.run.seed)
    plan = Plan(trained_on, align, config.run.seed)
    # If the images looked at do not fill a step, they stand for those of some of its ranks.
    filled = min(1.0, plan.num_images / min(align.images_per_step, plan.num_images / share))
    few, many = (max(1, round(filled * ranks)) for ranks in (align.min_workers, align.max_workers))
    forwards = plan.forwards(many)
    # Fewer ranks compute more at once.
    largest = plan.forwards(few).largest if few < many else forwards.largest
    shape = model_geometry(config, source)
    memory = estimate_memory(shape, align, largest, align.min_workers)
    size = weight_bytes(align)
    figures = {
        **_scaled(plan.summary(forwards), share, align),
        "ranks": align.max_workers,
        "largest_forward_tokens": largest.tokens,
        "largest_forward_responses": largest.response_tokens,
        "memory_gib_per_rank": round(memory.total, 2),
        "strategy": align.strategy,
        "traffic_bytes_per_step": step_traffic(
            shape, align.train, align.strategy, align.max_workers, weight_bytes=size
        ),
        "checkpoint_bytes": checkpoint_bytes(shape, align.train),
    }
    return Preview(figures, memory, forwards)


# Run folder → line printed by `announce_ahead`, so that `announce` does not repeat it.
_announced: dict[str, str] = {}


def announce(name: str, align: AlignConfig, config: Config) -> None:
    """Prints what training on the `prepared` table of a run will need.

    Args:
        name: of the stage.
        align: settings of the role.
        config: all settings.
    """
    writer = PromptWriter(load_processor(config.model.path))
    expected = preview(StoredPairs(RunFolder(config.run.folder).prepared, writer, align), align, config)
    line = _line(name, expected, align)
    if line != _announced.pop(config.run.folder, None):
        console.print(line, soft_wrap=True)
    warn_of_waste(expected, align)


def announce_ahead(config: Config) -> None:
    """As :func:`announce`, before the `prepared` table exists: tokenises rows of `scored` in this process."""
    source, _, share = tokenise_scored(config)
    # If there is no pair, the stage that writes the table reports why.
    if source.index.num_pairs:
        line = _line("align", preview(source, config.align, config, share), config.align)
        _announced[config.run.folder] = line
        console.print(line, soft_wrap=True)


def _line(name: str, expected: Preview, align: AlignConfig) -> str:
    plan, about = expected.figures, expected.about
    return (
        f"[dim]{name}: {about}{plan['steps']:,} steps of {plan['pairs']:,} pairs on {plan['images']:,} "
        f"images; {about}{plan['tokens_per_epoch']:,} tokens an epoch, {plan['sharing_factor']} times fewer "
        f"than unpacked; effective sample size {plan['effective_sample_size']:.0%}; memory of "
        f"{described_rank(align)} about {expected.memory}[/dim]"
    )


def described_rank(align: AlignConfig) -> str:
    """The rank whose memory is printed."""
    if align.min_workers == align.max_workers:
        return "a rank"
    return f"a rank of {align.min_workers}, the fewest of align.num_workers,"


def warn_of_waste(expected: Preview, align: AlignConfig) -> None:
    """Warns about limits that cut trees, so that images are computed again, and about ranks without work."""
    forwards, images = expected.forwards, min(align.images_per_step, expected.figures["images"])
    if forwards.repetition > REPETITION_WARN_ABOVE:
        limits = [f"align.{name} (now {getattr(align, name):,})" for name in forwards.cut_by]
        log.warning(
            "align: an image has more pairs than fit into a micro-batch, so %.3g times the tokens of whole "
            "trees are computed. Raise %s as far as memory allows",
            forwards.repetition,
            " and ".join(limits),
        )
    if forwards.empty > EMPTY_WARN_ABOVE:
        log.warning(
            "align: a step has %d images for %d ranks, so %.0f%% of the micro-batches are empty. Lower "
            "align.num_workers%s",
            images,
            align.max_workers,
            100 * forwards.empty,
            " or raise align.images_per_step" if expected.figures["images"] > images else "",
        )


def model_geometry(config: Config, source: PairSource) -> Geometry:
    """Sizes of the model, from its configuration, and of the images where their sizes differ."""
    settings = load_config(config.model.path)
    image_tokens = architecture_of(settings).fixed_image_tokens(settings)
    if image_tokens is None:
        # A prompt is nearly all image.
        image_tokens = round(float(np.mean(source.index.pairs["prompt"])))
    return Geometry.of(settings, config.align, image_tokens)


def _scaled(found: dict[str, Any], share: float, align: AlignConfig) -> dict[str, Any]:
    """The plan's figures for all pairs from those of a share of their images."""
    if share == 1.0:
        return found
    counts = ("pairs", "visual_pairs", "reversed_pairs", "images", "tokens_per_epoch")
    figures = found | {name: round(found[name] / share) for name in counts}
    per_epoch = math.ceil(figures["images"] / align.images_per_step)
    steps = align.epochs * per_epoch
    steps = min(steps, align.max_steps or steps)
    epochs = round(steps / per_epoch, 3)
    return figures | {
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "epochs": epochs,
        "share_looked_at": share,
    }


# ---------------------------------------------------------------------- a part of `scored`


def tokenise_scored(config: Config) -> tuple[TablePairs, int, float]:
    """The pairs in `scored`, tokenised in this process, which takes half a millisecond per pair.

    Of a large table only some images are read.

    Returns:
        The pairs, the number of rows dropped, and the share of the images looked at.
    """
    writer = PromptWriter(load_processor(config.model.path))
    scored, share = _read_scored(RunFolder(config.run.folder).scored, _ROWS_LOOKED_AT)
    kept, dropped = prepare_table(scored, writer, config.align)
    return TablePairs(kept, writer, config.align), len(dropped), share


def _read_scored(folder: str, most_rows: int) -> tuple[pa.Table, float]:
    """The table, or about so many rows of whole images spread over it; and the share of the images.

    In a table too large to search for all pairs of an image, those that are adjacent count as all.
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


def _row_groups(paths: list[str], most_rows: int) -> pa.Table:
    """Rows of row groups spread over some files, without images that a group may hold in part."""
    places = np.linspace(0, len(paths) - 1, min(len(paths), _FILES_LOOKED_AT)).astype(int)
    found = []
    for place in places.tolist():
        filesystem, path = storage.resolve(paths[place])
        with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as file:
            groups = file.num_row_groups
            wanted = most_rows * groups // (len(places) * max(1, file.metadata.num_rows))
            count = min(max(1, wanted), groups)
            for number in range(count):
                rows = file.read_row_group((2 * number + 1) * groups // (2 * count), columns=COLUMNS)
                images = rows["image_id"].to_pylist()
                inner = pa.array([image not in (images[0], images[-1]) for image in images])
                found.append(rows.filter(inner) if pc.any(inner).as_py() else rows)
    return pa.concat_tables(found)
