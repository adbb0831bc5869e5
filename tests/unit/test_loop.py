"""One rank's training loop: what it refuses before anything wrong becomes weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from align_world import single_rank, training_spec, write_prepared, write_scored, write_table
from tiny_llava import build_tiny_llava

from mmedpo_ray.align.checkpoint.checkpoint import checkpoint_folders
from mmedpo_ray.align.data.pair_index import ensure_index
from mmedpo_ray.align.loop import TrainingLoop
from mmedpo_ray.align.policy import TrainingSpec
from mmedpo_ray.align.settings import LoraConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.manifest import Manifest

COLUMNS = ("ref_chosen_logp", "ref_rejected_logp")


@pytest.fixture(autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with single_rank(tmp_path_factory.mktemp("store")):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("loop") / "llava")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Tables with made-up reference values."""
    folder = tmp_path_factory.mktemp("world")
    write_prepared(
        folder / "prepared", write_scored(folder), model, training_spec(folder, model, folder).align
    )
    return folder


def one_step(world: Path, model: Path, folder: Path, **changes: Any) -> TrainingSpec:
    settings = {"strategy": "ddp", "max_steps": 1, "images_per_step": 6} | changes
    return training_spec(world, model, folder, **settings)


def with_reference(
    world: Path, model: Path, folder: Path, precision: str, noise: Callable[[int], float]
) -> Path:
    """The same tables with the model's own values plus ``noise`` (number of the side → nats per token)."""
    loop = TrainingLoop(one_step(world, model, folder / "values", precision=precision, pairs_per_forward=4))
    loop.engine.train(False)
    found: dict[str, tuple[float, float]] = {}
    for micro, batch in loop._read(loop.plan, 0, loop.images):
        count = len(micro.pairs)
        with torch.no_grad():
            out = loop.engine.logps(batch)
        for number, pair in enumerate(micro.pairs):
            sides = [number, count + number]
            found[pair.pair_id] = tuple(  # type: ignore[assignment]
                float(out.logps[side]) + float(out.num_tokens[side]) * noise(2 * len(found) + index)
                for index, side in enumerate(sides)
            )
    rows = pq.read_table(world / "prepared/part-00000.parquet").to_pylist()
    assert len(found) == len(rows)
    for row in rows:
        row.update(zip(COLUMNS, found[row["pair_id"]], strict=True))
    write_table(folder / "prepared", rows, schemas.PREPARED, "prepare")
    ensure_index(str(folder / "prepared"), Manifest(stage="prepare", key="test"))
    return folder


def checked(spec: TrainingSpec) -> TrainingSpec:
    return replace(spec, check_reference=True)


def packing_noise(number: int) -> float:
    """As a bf16 model with 2 B parameters has it: 0.03 on average, one side in 24 at 0.165."""
    return 0.165 if number % 24 == 5 else 0.028 * (-1) ** number


@pytest.mark.parametrize(
    ("precision", "noise", "is_refused"),
    [
        ("bf16", lambda _: 0.0, False),
        ("bf16", packing_noise, False),
        ("bf16", lambda number: 0.3 * (-1) ** number, True),
        ("bf16", lambda number: 1.5 if number == 7 else 0.0, True),
        ("fp32", lambda _: 0.0, False),
        ("fp32", lambda number: 2e-3 if number == 7 else 0.0, True),
        ("fp32", packing_noise, True),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_reference_may_differ_by_rounding(
    tmp_path: Path,
    world: Path,
    model: Path,
    precision: str,
    noise: Callable[[int], float],
    is_refused: bool,
    dropout: float,
) -> None:
    known = with_reference(world, model, tmp_path, precision, noise)
    lora = LoraConfig(rank=4, alpha=8, dropout=dropout)
    spec = checked(one_step(known, model, tmp_path / "run", precision=precision, lora=lora))
    if is_refused:
        with pytest.raises(UserError, match=r"differ from those of .* nats per token"):
            TrainingLoop(spec).run()
        assert not (spec.folder / "adapter").exists()
        return
    TrainingLoop(spec).run()
    assert (spec.folder / "adapter").is_dir()


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reference_of_another_model_is_refused(
    tmp_path: Path, world: Path, model: Path, dropout: float, precision: str
) -> None:
    lora = LoraConfig(rank=4, alpha=8, dropout=dropout)
    with pytest.raises(UserError, match=r"differ from those of .* nats per token"):
        TrainingLoop(checked(one_step(world, model, tmp_path, lora=lora, precision=precision))).run()


def test_supervised_training_with_dropout_compares_no_reference(
    tmp_path: Path, world: Path, model: Path
) -> None:
    """Its forward passes have no rejected side."""
    lora = LoraConfig(rank=4, alpha=8, dropout=0.1)
    TrainingLoop(checked(one_step(world, model, tmp_path, lora=lora, objective="sft"))).run()
    assert (tmp_path / "adapter").is_dir()


def test_a_look_at_the_reference_changes_no_dropout(tmp_path: Path, world: Path, model: Path) -> None:
    known = with_reference(world, model, tmp_path, "fp32", lambda _: 0.0)
    lora = LoraConfig(rank=4, alpha=8, dropout=0.3)
    losses = []
    for check in (True, False):
        spec = one_step(known, model, tmp_path / f"run{check}", lora=lora, max_steps=2)
        loop = TrainingLoop(replace(spec, check_reference=check))
        loop.run()
        losses.append((spec.folder / "adapter/adapter_model.safetensors").read_bytes())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_becomes_no_checkpoint(
    tmp_path: Path, world: Path, model: Path, factor: float
) -> None:
    """The loss is finite then, and that of the next step would be too late."""
    loop = TrainingLoop(one_step(world, model, tmp_path, max_steps=3, images_per_step=3, checkpoint_every=1))
    next(iter(loop.engine.policy.trained_parameters().values())).register_hook(lambda grad: grad * factor)
    with pytest.raises(UserError, match="gradient of step 1 is not finite though its loss is"):
        loop.run()
    assert checkpoint_folders(tmp_path) == []
    assert not (tmp_path / "adapter").exists()
