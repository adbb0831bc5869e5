"""A run that died goes on as if it had not, also with another number of workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from align_compare import assert_same_training

from mmedpo_ray.align.checkpoint.checkpoint import checkpoint_folders
from mmedpo_ray.align.metrics import read_metrics

if TYPE_CHECKING:
    from conftest import Runs

pytestmark = pytest.mark.engine


def test_resumed_equals_uninterrupted(runs: Runs) -> None:
    assert_same_training(runs.folder / "resumed", runs.folder / "plain", tolerance=1e-6)


def test_dropout_resumes_where_it_was(runs: Runs) -> None:
    assert_same_training(runs.folder / "dropout_resumed", runs.folder / "dropout", tolerance=1e-6)
    first, second = (
        [row["loss"] for row in read_metrics(runs.folder / name)] for name in ("dropout", "plain")
    )
    assert first != second, "dropout must be at work"


def test_bf16_resumes_with_exact_weights(runs: Runs) -> None:
    assert_same_training(runs.folder / "bf16_resumed", runs.folder / "bf16", tolerance=1e-6)


def test_resumed_full_training_equals_uninterrupted(runs: Runs) -> None:
    """On two sharded ranks; what differs is the size of micro-batches and activation checkpointing."""
    assert_same_training(runs.folder / "full_resumed", runs.folder / "full_two_ranks")


def test_a_run_may_move_to_another_number_of_workers(runs: Runs) -> None:
    assert_same_training(runs.folder / "moved", runs.folder / "plain")


def test_the_end_of_a_run_is_a_checkpoint_too(runs: Runs) -> None:
    assert [path.name for path in checkpoint_folders(runs.folder / "resumed")] == [
        "step-000002",
        "step-000004",
    ]
