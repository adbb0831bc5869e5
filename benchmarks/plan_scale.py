"""Bytes and seconds of the training plan at growing numbers of pairs.

    python benchmarks/plan_scale.py [--pairs 10000 100000 1000000] [--json FILE]

Writes synthetic `prepared` tables (four pairs an image: three text pairs and a visual one; 40 prompt tokens
beside the image, answers of 2 to 40 tokens) in files of 50,000 rows as the prepare stage does, indexes them,
and starts a rank: a fresh process that opens the table, plans and loads its part of steps of one image a rank
among 64, then of eight images a rank among 512. Times are of the processor, so that other work on the machine
does not count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmedpo_ray.align.data.pair_index import ensure_index
from mmedpo_ray.align.data.pair_source import StoredPairs
from mmedpo_ray.align.data.tokenise import COLUMNS, prepare_rows
from mmedpo_ray.align.plan.plan import Plan
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.models.loading import EMBEDDED_NAME, load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.manifest import Manifest

PAIRS_PER_IMAGE = 4
ROWS_PER_FILE = 12 * 4096
ROWS_PER_GROUP = 1024
# Ranks, and images in a step.
RUNS = ((64, 64), (512, 4096))
STEPS = 40


def write_table(folder: Path, num_pairs: int, image_token: int, image_tokens: int) -> None:
    """A `prepared` table of random tokens."""
    rng = np.random.default_rng(0)
    for number, start in enumerate(range(0, num_pairs, ROWS_PER_FILE)):
        rows = np.arange(start, min(start + ROWS_PER_FILE, num_pairs))
        image, place = rows // PAIRS_PER_IMAGE, rows % PAIRS_PER_IMAGE
        is_visual = place == PAIRS_PER_IMAGE - 1
        image_ids = [f"study-{item:010d}" for item in image]
        pair_ids = [
            f"{name}-{index}:{'visual' if flag else 'text'}"
            for name, index, flag in zip(image_ids, place, is_visual, strict=True)
        ]
        uris = [f"/data/images/{name}.png" for name in image_ids]
        noised = [f"/runs/run/noised/{name}.png" for name in image_ids]
        chosen, rejected = (rng.integers(2, 41, len(rows)) for _ in range(2))
        prompts = np.full((len(rows), 41), image_token, np.int32)
        prompts[:, 1:] = rng.integers(1000, 30000, (len(rows), 40))
        columns: dict[str, Any] = {
            "tree_key": [f"{name}\x1f{pair}" for name, pair in zip(image_ids, pair_ids, strict=True)],
            "pair_id": pair_ids,
            "image_id": image_ids,
            "kind": np.where(is_visual, "visual", "text"),
            "image_uri": uris,
            "rejected_image_uri": np.where(is_visual, noised, uris),
            "prompt": lists(prompts.ravel(), np.full(len(rows), 41)),
            "chosen": lists(rng.integers(1000, 30000, chosen.sum(), dtype=np.int32), chosen),
            "rejected": lists(rng.integers(1000, 30000, rejected.sum(), dtype=np.int32), rejected),
            "image_position": np.zeros(len(rows), np.int32),
            "prompt_tokens": np.full(len(rows), 40 + image_tokens, np.int32),
            "chosen_tokens": chosen.astype(np.int32),
            "rejected_tokens": rejected.astype(np.int32),
            "answer_hash": rng.integers(-(2**63), 2**63 - 1, len(rows)),
            "weight": rng.uniform(0.75, 1.25, len(rows)),
            "ref_chosen_logp": -rng.uniform(1, 90, len(rows)),
            "ref_rejected_logp": -rng.uniform(1, 90, len(rows)),
        }
        table = pa.table(
            [
                pa.array(columns[field.name], field.type)
                if field.name in columns
                else pa.nulls(len(rows), field.type)
                for field in schemas.PREPARED
            ],
            schema=schemas.PREPARED,
        )
        path = folder / f"part-{number:05d}.parquet"
        pq.write_table(table, path, compression="zstd", row_group_size=ROWS_PER_GROUP)


def lists(values: np.ndarray, lengths: np.ndarray) -> pa.Array:
    """A list column from its values and the length of each list."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int32()))


def private_bytes() -> int:
    """Memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def start_rank(folder: str, queue: Any) -> None:
    """What a rank does before and between its steps; imports and the processor are there already."""
    writer = PromptWriter(load_processor(EMBEDDED_NAME))
    before = private_bytes()
    figures: dict[str, float] = {}
    for ranks, images in RUNS:
        align = AlignConfig(images_per_step=images, pairs_per_forward=16)
        started = time.process_time()
        plan = Plan(StoredPairs(folder, writer, align), align, seed=0)
        plan.micro_batches(0, 0, ranks)
        first = time.process_time()
        steps = range(1, min(STEPS, plan.total_steps))
        for step in steps:
            plan.micro_batches(step, 0, ranks)
            plan.normaliser(step)
        figures[f"first_step_seconds_{ranks}"] = first - started
        figures[f"step_milliseconds_{ranks}"] = 1000 * (time.process_time() - first) / max(1, len(steps))
    queue.put(
        figures
        | {
            "rank_private_mib": (private_bytes() - before) / 2**20,
            "order_mib": plan._order[1].nbytes / 2**20,
        }
    )


def measure(num_pairs: int) -> dict[str, float]:
    """Table, index and a rank of one size."""
    writer = PromptWriter(load_processor(EMBEDDED_NAME))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder, num_pairs, writer.image_token_id, writer.count_image_tokens(None))
        table = sum(path.stat().st_size for path in folder.iterdir())
        started = time.process_time()
        ensure_index(name, Manifest(stage="prepare", key="benchmark"))
        seconds = time.process_time() - started
        index = sum(path.stat().st_size for path in (folder / "index").iterdir())
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=start_rank, args=(name, queue))
        process.start()
        rank = queue.get(timeout=600)
        process.join()
    return {
        "pairs": num_pairs,
        "table_bytes_per_pair": table / num_pairs,
        "index_bytes_per_pair": index / num_pairs,
        "index_seconds": seconds,
        **rank,
    }


def tokenising_microseconds(count: int = 2000) -> float:
    """Core time to prepare a row of `scored`, all questions and answers different."""
    writer = PromptWriter(load_processor(EMBEDDED_NAME))
    texts = {"image_uri": "a", "rejected_image_uri": "a", "image_id": "i", "kind": "text", "weight": 1.0}
    rows = [
        texts
        | {
            "pair_id": str(number),
            "sample_id": str(number),
            "question": f"Is there a nodule in zone {number} of the left lung?",
            "chosen": f"Yes, there is a nodule of {number} mm in the upper zone.",
            "rejected": f"No, there is no nodule of {number} mm in the lung.",
        }
        for number in range(count)
    ]
    assert set(rows[0]) == set(COLUMNS)
    started = time.process_time()
    prepare_rows(rows, writer, AlignConfig())
    return 1e6 * (time.process_time() - started) / count


def main() -> int:
    """Measures and prints a line a size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenising = tokenising_microseconds()
    print(f"tokenising: {tokenising:.0f} µs of one core a pair")
    results = [measure(count) for count in arguments.pairs]
    heads = [
        "pairs",
        "table, B/pair",
        "index, B/pair",
        "index, s",
        "start to first step, s",
        "a step of 64 ranks, ms",
    ]
    heads += ["a step of 512 ranks, ms", "rank's own memory, MiB", "of it order, MiB"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in results:
        print(
            f"| {row['pairs']:,} | {row['table_bytes_per_pair']:.0f} | {row['index_bytes_per_pair']:.1f} | "
            f"{row['index_seconds']:.2f} | {row['first_step_seconds_64']:.2f} | "
            f"{row['step_milliseconds_64']:.1f} | {row['step_milliseconds_512']:.0f} | "
            f"{row['rank_private_mib']:.0f} | {row['order_mib']:.2f} |"
        )
    if arguments.json:
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
        content = {
            "command": " ".join(["python", *sys.argv]),
            "hardware": hardware,
            "tokenising_microseconds": tokenising,
            "results": results,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
