"""A small world for tests of `align`: images, a `scored` table, and ranks started without Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmedpo_ray.align.data.pair_index import ensure_index
from mmedpo_ray.align.data.tokenise import COLUMNS, prepare_rows, with_reversed_pairs, wrong_answers
from mmedpo_ray.align.engines import deepspeed
from mmedpo_ray.align.packing import lm_head
from mmedpo_ray.align.policy import TrainingSpec
from mmedpo_ray.align.settings import AlignConfig, LoraConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage
from mmedpo_ray.models.loading import load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.manifest import Manifest

QUESTIONS = ("Is there a nodule?", "Where is the effusion?", "Describe the chest radiograph.")
ANSWERS = (
    ("No.", "Yes."),
    ("In the left lower zone.", "In the right lower zone of the lung."),
    ("The heart is normal. There is a small left effusion.", "The heart is enlarged. No effusion."),
)


def write_scored(folder: Path, num_images: int = 6, seed: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """Writes images and a finished `scored` table under ``folder``: three text pairs and one visual pair an
    image.

    Args:
        folder: receives ``images/`` and ``scored/``.
        num_images: trees.
        seed: of pixels and weights.
        changes: pair_id → dict of changed fields.

    Returns:
        The rows.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(num_images):
        image_uri, noised_uri = (
            str(folder / "images" / f"{kind}{number}.png") for kind in ("image", "noised")
        )
        Path(image_uri).parent.mkdir(parents=True, exist_ok=True)
        for uri in (image_uri, noised_uri):
            Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(uri)
        for index, question in enumerate(QUESTIONS):
            sample_id = f"s{number:03d}-{index}"
            rows.append(
                _row(f"{sample_id}:text", sample_id, number, question, ANSWERS[index], image_uri, image_uri)
            )
            if index == 1:
                answer = (ANSWERS[index][0],) * 2
                rows.append(
                    _row(f"{sample_id}:visual", sample_id, number, question, answer, image_uri, noised_uri)
                )
    for row in rows:
        row["weight"] = float(rng.uniform(0.75, 1.25))
        row.update(changes.get(row["pair_id"], {}))
    write_table(folder / "scored", rows, schemas.SCORED, "score")
    return rows


def write_table(folder: Path, rows: list[dict[str, Any]], schema: Any, stage: str) -> None:
    """Writes a finished table with its manifest."""
    storage.write_parquet(str(folder / "part-00000.parquet"), schemas.to_table(rows, schema))
    (folder / "manifest.json").write_text(
        json.dumps({"stage": stage, "key": "test", "rows_in": len(rows), "rows_out": len(rows)})
    )


def write_prepared(
    folder: Path,
    rows: list[dict[str, Any]],
    model: Path,
    settings: AlignConfig,
    seed: int = 1,
    chosen: float | None = None,
) -> None:
    """Writes a finished `prepared` table, with plausible reference values (they need not be the model's for
    an equality).

    Args:
        folder: of the table.
        rows: of `scored`.
        model: whose tokenizer writes them.
        settings: what is prepared.
        seed: of the values.
        chosen: the same value for all chosen answers instead.
    """
    selected: list[Any] = [{name: row[name] for name in COLUMNS} for row in rows]
    if settings.reversed_visual_coefficient:
        selected = with_reversed_pairs(selected, wrong_answers(rows))
    prepared = prepare_rows(selected, PromptWriter(load_processor(str(model))), settings)
    assert all(schemas.DROP_REASON not in row for row in prepared)
    rng = np.random.default_rng(seed)
    for row in prepared:
        row["ref_chosen_logp"], row["ref_rejected_logp"] = (-rng.uniform(5, 30, 2)).tolist()
        if chosen is not None:
            row["ref_chosen_logp"] = chosen
    write_table(folder, sorted(prepared, key=lambda row: row["tree_key"]), schemas.PREPARED, "prepare")
    ensure_index(str(folder), Manifest(stage="prepare", key="test"))


def align_settings(**changes: Any) -> AlignConfig:
    """Settings small enough for seconds on one core."""
    values: dict[str, Any] = {
        "beta": 0.3,
        "learning_rate": 2e-3,
        "epochs": 4,
        "max_steps": 4,
        "images_per_step": 3,
        "pairs_per_forward": 16,
        "max_length": 256,
        "lora": LoraConfig(rank=4, alpha=8),
        "precision": "fp32",
        "gradient_checkpointing": False,
        "checkpoint_every": 2,
    }
    return AlignConfig(**(values | changes))


def training_spec(world: Path, model: Path, folder: Path, **changes: Any) -> TrainingSpec:
    """A run on the tables under ``world``; ``changes`` go to :func:`align_settings`."""
    settings = align_settings(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    return TrainingSpec(
        align=settings,
        model=str(model),
        seed=0,
        folder=folder,
        prepared=str(world / "prepared"),
        key="test",
        use_gpu=False,
        launch="test",
        # The tables of these tests hold made-up numbers.
        check_reference=False,
    )


@dataclass(frozen=True)
class Launch:
    """A run to start.

    Attributes:
        spec: the run.
        crash_after: ends it, as a crash would, once that many updates are done.
        is_refused: run it as a Ray Train worker does; it must end with a user error.
        most_logits: computed at once; fewer than there are make chunks.
        releases_weights: ZeRO-3 shards the smallest weights too, and releases them after every use, as it
            does large ones.
    """

    spec: TrainingSpec
    crash_after: int | None = None
    is_refused: bool = False
    most_logits: int = lm_head.MOST_LOGITS
    releases_weights: bool = False


def train(launches: Sequence[Launch], world_size: int = 1) -> None:
    """Runs training loops one after the other on ``world_size`` processes, started once."""
    arguments = (world_size, _free_port(), list(launches))
    torch.multiprocessing.spawn(_rank, args=arguments, nprocs=world_size, join=True)


@contextlib.contextmanager
def single_rank(folder: Path) -> Iterator[None]:
    """A process group of this process alone; ``folder`` is an empty one for its store."""
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class _CrashError(Exception):
    pass


def _rank(rank: int, world_size: int, port: int, launches: list[Launch]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from mmedpo_ray.align.loop import TrainingLoop

    for launch in launches:
        lm_head.MOST_LOGITS = launch.most_logits
        if launch.is_refused:
            # A rank that begins after another was refused would end at once, as it should.
            torch.distributed.barrier()
            _expect_refusal(launch.spec)
            continue
        with _releasing() if launch.releases_weights else contextlib.nullcontext():
            loop = TrainingLoop(launch.spec)
        if launch.crash_after is not None:
            loop._log = _crash_at(launch.crash_after, loop._log)  # type: ignore[method-assign]
        try:
            loop.run()
        except _CrashError:
            # The next launch begins as after a real crash: with nothing still being written, and on all ranks
            # at once.
            loop.checkpoints.wait()
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _releasing() -> Iterator[None]:
    """Engines made meanwhile keep no weight whole."""
    before, deepspeed._CPU_PERSISTENCE = deepspeed._CPU_PERSISTENCE, 0
    try:
        yield
    finally:
        deepspeed._CPU_PERSISTENCE = before


def _expect_refusal(spec: TrainingSpec) -> None:
    from mmedpo_ray.align.stage import _worker

    try:
        _worker({"spec": spec})
    except UserError:
        # Ray Train would start the workers again; that attempt must end at once.
        _worker({"spec": spec})
    else:
        raise AssertionError("the run was not refused")


def _crash_at(step: int, log: Any) -> Any:
    def crash(at: int, *figures: Any) -> None:
        log(at, *figures)
        if at + 1 == step:
            raise _CrashError

    return crash


def with_settings(spec: TrainingSpec, folder: Path, **changes: Any) -> TrainingSpec:
    """The same run in another folder with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(spec, folder=folder, align=spec.align.model_copy(update=changes))


def _row(
    pair_id: str,
    sample_id: str,
    number: int,
    question: str,
    answers: tuple[str, str],
    image: str,
    rejected_image: str,
) -> dict[str, Any]:
    return {
        "pair_id": pair_id,
        "sample_id": sample_id,
        "image_id": f"i{number:03d}",
        "dataset": "test",
        "task": "report" if question.startswith("Describe") else "vqa",
        "answer_type": "open",
        "kind": pair_id.rpartition(":")[2],
        "image_uri": image,
        "rejected_image_uri": rejected_image,
        "question": question,
        "chosen": answers[0],
        "rejected": answers[1],
        "generator": "rule_edit",
        "score": 0.5,
        "weight": 1.0,
        "consensus": True,
        "rounds": 0,
        "history": [],
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
