"""One set of small training runs that the equalities of `align` compare."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from align_world import Launch, train, training_spec, with_settings, write_prepared, write_scored
from tiny_llava import build_tiny_llava

from mmedpo_ray.align.policy import TrainingSpec
from mmedpo_ray.align.settings import LoraConfig

# Several chunks in every forward: the vocabulary has 512 entries.
_FEW_LOGITS = 3_000


@dataclass(frozen=True)
class Runs:
    """Finished runs by name, and the settings of the plain one."""

    folder: Path
    spec: TrainingSpec


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same training done in several ways, each in a folder with ``adapter/`` and ``metrics.jsonl``."""
    folder = tmp_path_factory.mktemp("runs")
    model = build_tiny_llava(folder / "model")
    rows = write_scored(folder)
    plain = training_spec(folder, model, folder / "plain", nll_coefficient=0.5, visual_coefficient=0.5)
    write_prepared(folder / "prepared", rows, model, plain.align)
    write_prepared(folder / "no_number", rows, model, plain.align, chosen=math.nan)
    moved = with_settings(plain, folder / "moved")

    def all_terms(name: str, **changes: object) -> TrainingSpec:
        """Every further term at once, the reference from a second forward with the adapter off."""
        terms = {
            "loss": "ipo",
            "reference": "online",
            "kl_coefficient": 0.2,
            "anchor_coefficient": 0.3,
            "reversed_visual_coefficient": 0.4,
            "common_token_weight": 0.3,
        }
        spec = with_settings(plain, folder / name, **(terms | changes))
        write_prepared(spec.folder / "prepared", rows, model, spec.align)
        return replace(spec, prepared=str(spec.folder / "prepared"))

    def full(name: str, **changes: object) -> TrainingSpec:
        """All weights of language model and projector."""
        ways = {"train": "full", "train_projector": True, "learning_rate": 1e-3, "weight_decay": 0.1}
        return with_settings(plain, folder / name, **(ways | changes))

    def projector(name: str, **changes: object) -> TrainingSpec:
        """LoRA and projector with every further term, and two images held out."""
        held_out = {"train_projector": True, "validation_share": 0.34, "validate_every": 1}
        return all_terms(name, **(held_out | changes))

    def best(name: str, **changes: object) -> TrainingSpec:
        """So fast that the held-out images soon suffer."""
        ways = {"learning_rate": 0.1, "validation_share": 0.34, "validate_every": 1, "keep": "best"}
        return with_settings(plain, folder / name, **(ways | {"keep_checkpoints": 1} | changes))

    def dropout(name: str) -> TrainingSpec:
        return with_settings(plain, folder / name, lora=LoraConfig(rank=4, alpha=8, dropout=0.3))

    def bf16(name: str, **changes: object) -> TrainingSpec:
        return with_settings(plain, folder / name, precision="bf16", **changes)

    dropout_resumed, bf16_resumed = dropout("dropout_resumed"), bf16("bf16_resumed")
    full_resumed, full_moved, best_resumed = full("full_resumed"), full("full_moved"), best("best_resumed")
    train(
        [
            Launch(plain),
            Launch(with_settings(plain, folder / "accumulated", pairs_per_forward=2)),
            Launch(with_settings(plain, folder / "checkpointing", gradient_checkpointing=True)),
            Launch(resumed := with_settings(plain, folder / "resumed"), crash_after=3),
            Launch(resumed),
            Launch(moved, crash_after=3),
            Launch(with_settings(plain, folder / "ddp", strategy="ddp", pairs_per_forward=5)),
            Launch(with_settings(plain, folder / "token_budget", tokens_per_forward=200)),
            Launch(all_terms("all_terms", strategy="ddp")),
            Launch(full("full", strategy="ddp")),
            Launch(full_moved, crash_after=3),
            Launch(projector("projector", strategy="ddp")),
            Launch(best("best")),
            Launch(best_resumed, crash_after=3),
            Launch(best_resumed),
            Launch(dropout("dropout")),
            Launch(dropout_resumed, crash_after=3),
            Launch(dropout_resumed),
            Launch(bf16("bf16")),
            Launch(bf16("bf16_accumulated", pairs_per_forward=2)),
            Launch(bf16_resumed, crash_after=3),
            Launch(bf16_resumed),
            Launch(bf16("bf16_ddp", strategy="ddp"), crash_after=3),
            Launch(bf16("bf16_ddp", strategy="ddp")),
        ]
    )
    train(
        [
            Launch(with_settings(plain, folder / "two_ranks")),
            # Four pairs a micro-batch leave one of two ranks without work in some rounds.
            Launch(with_settings(plain, folder / "two_ranks_accumulated", pairs_per_forward=5)),
            Launch(zero_two := with_settings(plain, folder / "zero_two", strategy="zero2"), crash_after=3),
            Launch(zero_two),
            Launch(bf16("bf16_zero_two", strategy="zero2", pairs_per_forward=5)),
            Launch(ddp := with_settings(plain, folder / "ddp_two_ranks", strategy="ddp"), crash_after=3),
            Launch(ddp),
            Launch(all_terms("all_terms_two_ranks", pairs_per_forward=5), most_logits=_FEW_LOGITS),
            Launch(all_terms("all_terms_released"), releases_weights=True, most_logits=_FEW_LOGITS),
            Launch(
                with_settings(plain, folder / "released", gradient_checkpointing=True), releases_weights=True
            ),
            Launch(moved),
            Launch(
                full("full_two_ranks", gradient_checkpointing=True, pairs_per_forward=5),
                most_logits=_FEW_LOGITS,
            ),
            Launch(full_resumed, crash_after=3),
            Launch(full_resumed),
            Launch(with_settings(full_moved, folder / "full_moved", strategy="zero2")),
            Launch(projector("projector_two_ranks", gradient_checkpointing=True, pairs_per_forward=5)),
            Launch(with_settings(plain, folder / "sft", objective="sft")),
            Launch(
                with_settings(plain, folder / "overflow", learning_rate=1e30, warmup_ratio=0.0),
                is_refused=True,
            ),
            Launch(
                replace(with_settings(plain, folder / "other_reference"), check_reference=True),
                is_refused=True,
            ),
            Launch(
                replace(with_settings(plain, folder / "stale_reference"), prepared_key="now"),
                is_refused=True,
            ),
            Launch(broken := with_settings(plain, folder / "broken"), crash_after=3),
            Launch(replace(broken, prepared=str(folder / "no_number")), is_refused=True),
        ],
        world_size=2,
    )
    return Runs(folder, plain)
