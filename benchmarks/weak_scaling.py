"""Weak scaling of training: twice the ranks with twice the images a step, pairs per second a rank.

    python benchmarks/weak_scaling.py --run DIR [--ranks 1 2] [--strategy zero3] [--json FILE]

DIR is the folder of a run whose `prepared` table is finished (``make demo`` writes runs/phantom). Every rank
is a process with one thread, as a GPU would be a rank; the loop is the one that Ray Train runs. Steps begin
after the first, which builds the optimizer's state. On the machine's own cores more ranks than cores mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmedpo_ray.align.metrics import read_metrics
from mmedpo_ray.align.policy import TrainingSpec
from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.tables.run_folder import RunFolder

IMAGES_PER_RANK = 4


def spec_of(config: Config, folder: Path, ranks: int, arguments: argparse.Namespace) -> TrainingSpec:
    """The run's training with ``ranks`` times the images a step."""
    run = RunFolder(str(arguments.run.absolute()))
    align = config.align.model_copy(
        update={
            "images_per_step": IMAGES_PER_RANK * ranks,
            "max_steps": arguments.steps,
            "epochs": 1000,
            "strategy": arguments.strategy,
            "checkpoint_every": 10**9,
            "trackers": (),
        }
    )
    return TrainingSpec(
        align=align,
        model=config.model.path,
        seed=config.run.seed,
        folder=folder,
        prepared=run.prepared,
        key="benchmark",
        use_gpu=False,
        launch="benchmark",
    )


def rank_main(rank: int, world_size: int, port: int, spec: TrainingSpec) -> None:
    """One rank."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from mmedpo_ray.align.loop import TrainingLoop

    TrainingLoop(spec).run()
    torch.distributed.destroy_process_group()


def measure(config: Config, ranks: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps of one number of ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        spec = spec_of(config, Path(name), ranks, arguments)
        torch.multiprocessing.spawn(rank_main, args=(ranks, port, spec), nprocs=ranks, join=True)
        rows = read_metrics(Path(name))[1:]
    return {
        "ranks": ranks,
        "seconds": statistics.median(row["seconds"] for row in rows),
        "pairs_per_second": statistics.median(row["pairs_per_second"] for row in rows),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
    }


def main() -> int:
    """Measures and prints a line a number of ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/phantom"))
    parser.add_argument("--config", default="configs/phantom.yaml")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--strategy", choices=["zero3", "zero2", "ddp"], default="zero3")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = load(arguments.config)
    results: list[dict[str, Any]] = [measure(config, ranks, arguments) for ranks in arguments.ranks]
    for result in results:
        result["efficiency"] = (result["pairs_per_second"] / result["ranks"]) / (
            results[0]["pairs_per_second"] / results[0]["ranks"]
        )
        print(
            f"{arguments.strategy}, {result['ranks']} ranks: {result['pairs_per_second']:.1f} pairs/s, "
            f"{result['seconds']:.3f} s a step, efficiency {result['efficiency']:.0%}"
        )
    if arguments.json:
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
        content = {"command": " ".join(["python", *sys.argv]), "hardware": hardware, "results": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
