"""Images of several sizes: tables and plans count each image's own tokens, and training computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from align_world import write_scored
from PIL import Image
from tiny_models import build_tiny

from mmedpo_ray.align.data.batch import ImageLoader, pack_pairs
from mmedpo_ray.align.data.pair_source import TablePairs
from mmedpo_ray.align.data.tokenise import prepare_table
from mmedpo_ray.align.packing.logps import response_logps, use_packed_forward
from mmedpo_ray.align.plan.plan import Plan
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import load_model, load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas

SIZES = ((150, 100), (70, 120), (40, 30))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("qwen2_5_vl", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def writer(model: Path) -> PromptWriter:
    return PromptWriter(load_processor(str(model)))


def scored(folder: Path) -> list[dict[str, Any]]:
    """Rows of `scored` whose images, noised ones included, have three sizes."""
    rows = write_scored(folder, num_images=len(SIZES))
    draw = np.random.default_rng(0)
    images = list(dict.fromkeys(row["image_uri"] for row in rows))
    for row in rows:
        width, height = SIZES[images.index(row["image_uri"])]
        for uri in {row["image_uri"], row["rejected_image_uri"]}:
            Image.fromarray(draw.integers(0, 255, (height, width, 3), np.uint8)).save(uri)
    return rows


def test_every_image_has_its_own_number_of_tokens(model: Path, writer: PromptWriter, tmp_path: Path) -> None:
    align = AlignConfig(max_length=256, images_per_step=len(SIZES), precision="fp32")
    table, dropped = prepare_table(schemas.to_table(scored(tmp_path), schemas.SCORED), writer, align)
    assert not dropped
    source = TablePairs(table, writer, align)
    pairs = source.load(range(source.index.num_pairs))
    counts = {len(pair.prompt) - len(set(pair.prompt)) for pair in pairs}
    assert len(counts) >= len(SIZES), "the sizes must matter"
    batch = pack_pairs(pairs, ImageLoader(writer), writer.pad_token_id, both_sides=True)
    # The plan knows the tokens of the trees without packing them or reading an image.
    real = (batch.subtree_end > torch.arange(batch.subtree_end.shape[1])).sum() - len(batch.layout.padding)
    assert (
        Plan(source, align, seed=0).summary(Plan(source, align, seed=0).forwards(1))["tokens_per_epoch"]
        == real
    )
    loaded = load_model(str(model), torch.float32)
    use_packed_forward(loaded)
    assert response_logps(loaded, batch).logps.isfinite().all()


def test_sides_whose_images_have_other_numbers_of_tokens_are_dropped(
    writer: PromptWriter, tmp_path: Path
) -> None:
    rows = scored(tmp_path)
    visual = next(row for row in rows if row["kind"] == "visual")
    Image.new("L", (28, 140)).save(visual["rejected_image_uri"])
    align = AlignConfig(max_length=256)
    _, dropped = prepare_table(schemas.to_table(rows, schemas.SCORED), writer, align)
    found = {(row["pair_id"], row[schemas.DROP_REASON]) for row in dropped}
    assert (visual["pair_id"], "image_sizes_differ") in found


def test_an_image_that_changed_since_is_noticed(model: Path, writer: PromptWriter, tmp_path: Path) -> None:
    align = AlignConfig(max_length=256)
    table, _ = prepare_table(schemas.to_table(scored(tmp_path), schemas.SCORED), writer, align)
    pairs = TablePairs(table, writer, align).load([0])
    Image.new("L", (28, 280)).save(pairs[0].image_uri)
    loaded = load_model(str(model), torch.float32)
    batch = pack_pairs(pairs, ImageLoader(writer), writer.pad_token_id, both_sides=False)
    with pytest.raises(UserError, match="has changed"):
        response_logps(loaded, batch)
