"""The prepare stage on a real Ray cluster: slices, reversed pairs across slices, resuming, the dry run."""

from __future__ import annotations

from pathlib import Path

import pytest
from align_world import align_settings, write_scored, write_table
from pairs_in_memory import prepare_pairs
from tiny_llava import build_tiny_llava

from mmedpo_ray.align.data.pair_source import StoredPairs
from mmedpo_ray.align.data.prepare_stage import made_with, prepare
from mmedpo_ray.align.plan.dry_run import dry_run
from mmedpo_ray.config.tree import Config
from mmedpo_ray.errors import user_message
from mmedpo_ray.models.loading import load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.provenance import MADE_WITH
from mmedpo_ray.tables.run_folder import RunFolder

# More than two slices of the smallest size.
IMAGES = 160


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("prepare")
    settings = align_settings(
        loss="simpo", visual_coefficient=0.5, reversed_visual_coefficient=0.5, max_steps=None
    )
    config = Config(align=settings)
    config.run.folder = str(folder)
    config.model.path = str(build_tiny_llava(folder / "llava"))
    return config


@pytest.mark.timeout(300)
def test_a_failed_preparation_resumes_and_equals_one_process(config: Config, ray_cluster: None) -> None:
    run = RunFolder(config.run.folder)
    changes: dict = {"s005-0:text": {"weight": 0.0}, "s159-2:text": {"weight": float("nan")}}
    rows = write_scored(Path(config.run.folder), IMAGES, **changes)
    with pytest.raises(Exception, match="s159-2:text") as raised:
        prepare(config)
    assert "Run score again" in (user_message(raised.value) or "")
    for row in rows:
        if row["pair_id"] == "s159-2:text":
            row["weight"] = 1.0
    write_table(Path(run.scored), rows, schemas.SCORED, "score")

    expected = dry_run(config)
    manifest = prepare(config)
    assert (manifest.rows_in, manifest.rows_out) == (IMAGES * 5, IMAGES * 5 - 1)
    assert manifest.dropped == {"weight_zero": 1}
    writer = PromptWriter(load_processor(config.model.path))
    source = StoredPairs(run.prepared, writer, config.align)
    found = source.load(range(manifest.rows_out))
    pairs, _ = prepare_pairs(
        schemas.to_table(rows, schemas.SCORED),
        writer,
        max_length=config.align.max_length,
        visual_coefficient=0.5,
        reversed_visual_coefficient=0.5,
    )
    assert found == sorted(pairs, key=lambda pair: (pair.image_id, pair.pair_id))
    assert prepare(config).finished_at == manifest.finished_at, "a finished table is kept"
    assert dry_run(config) == expected, "what `--dry-run` says before and after is the same"
    assert expected["reversed_pairs"] == IMAGES
    assert manifest.extra[MADE_WITH] == made_with(config)


@pytest.mark.timeout(300)
def test_pairs_that_the_settings_leave_out_are_no_fault(config: Config, ray_cluster: None) -> None:
    """Without visual pairs a quarter of the rows is dropped, which no limit on faulty rows is about."""
    changes = {"visual_coefficient": 0.0, "reversed_visual_coefficient": 0.0, "max_length": 128}
    changed = config.model_copy(update={"align": config.align.model_copy(update=changes)})
    changed.run = changed.run.model_copy(update={"max_dropped_share": 0.01})
    manifest = prepare(changed)
    assert (manifest.rows_out, manifest.dropped) == (IMAGES * 3 - 1, {"weight_zero": IMAGES + 1})
