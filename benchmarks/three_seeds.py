"""Base, aligned and control over several seeds of the whole pipeline, with intervals over all images.

    python benchmarks/three_seeds.py --config configs/phantom.yaml --folder runs/seeds [--seeds 0 1 2] [--json
    FILE] [key=value …]

Each seed is a run of its own: its training and test images, sampled answers, noise, LoRA initialisation and
order. Seeds that are finished are not run again. The answers of all seeds are then scored together; the
bootstrap resamples images, which no two seeds share. Cost: one run a seed, one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmedpo_ray.config.load import load
from mmedpo_ray.config.tree import Config
from mmedpo_ray.evaluate.scoring import Options
from mmedpo_ray.evaluate.summary import failed_rows, summarise
from mmedpo_ray.metrics import METRICS
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import read_table


def main() -> int:
    """Runs the seeds, prints the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/phantom.yaml")
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"), help="one sub-folder a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write the scores here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    folders = {seed: arguments.folder.absolute() / f"seed-{seed}" for seed in arguments.seeds}
    for seed, folder in folders.items():
        _run(arguments.config, [*arguments.overrides, f"run.seed={seed}", f"run.folder={folder}"])
    config = load(arguments.config, arguments.overrides)
    summary = pooled(config, folders)
    summary["command"] = " ".join(["python", *sys.argv])
    summary["hardware"] = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    sys.stdout.write(markdown(summary, config))
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return 0


def pooled(config: Config, folders: dict[int, Path]) -> dict[str, Any]:
    """Scores of all seeds' answers together and of each seed alone."""
    answers, failed, questions, per_seed = [], [], {}, {}
    for seed, folder in folders.items():
        run = RunFolder(str(folder))
        answers.append(_of_seed(seed, read_table(run.evaluate, schemas.ANSWERS, "answers")))
        if (dropped := failed_rows(run.evaluate)) is not None:
            failed.append(_of_seed(seed, dropped))
        samples = read_table(run.samples, schemas.SAMPLES, "samples")
        for sample_id, question in zip(
            samples["sample_id"].to_pylist(), samples["question"].to_pylist(), strict=True
        ):
            questions[f"{seed}/{sample_id}"] = question
        summary = json.loads((Path(run.evaluate) / "summary.json").read_text())
        per_seed[seed] = {
            name: {metric: figure["value"] for metric, figure in figures.items()}
            for name, figures in summary["models"].items()
        }
    result = summarise(
        pa.concat_tables(answers),
        questions,
        names={
            "base": config.model.name,
            "aligned": config.evaluate.aligned_name,
            "control": config.control.name,
        },
        options=Options(config.evaluate.bootstrap, config.evaluate.confidence, seed=0),
        failed=pa.concat_tables(failed) if failed else None,
    )
    return result | {"per_seed": per_seed}


def _of_seed(seed: int, table: pa.Table) -> pa.Table:
    """Ids that no two seeds share."""
    for column in ("image_id", "sample_id"):
        prefixed = pa.array([f"{seed}/{value}" for value in table[column].to_pylist()], pa.string())
        table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), prefixed)
    return table


def markdown(summary: dict[str, Any], config: Config) -> str:
    """The table of the README."""
    names = [config.model.name, config.evaluate.aligned_name, config.control.name]
    names = [name for name in names if name in summary["models"]]
    header = ["metric", *names, f"aligned − {names[0]}", f"aligned − {names[-1]}"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for key, metric in METRICS.items():
        if metric.role == "official" or not summary["models"][names[0]].get(key, {}).get("n"):
            continue
        cells = [f"{summary['models'][name][key]['value']:.3f}" for name in names]
        for difference in ("difference", "difference_to_control"):
            figure = summary[difference].get(key)
            if figure is None or figure["value"] is None:
                cells.append("–")
                continue
            cells.append(f"{figure['value']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]")
        lines.append(f"| {metric.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _run(config: str, overrides: list[str]) -> None:
    mmedpo = Path(sys.executable).parent / "mmedpo"
    result = subprocess.run([mmedpo, "run", "--config", config, *overrides], check=False)
    if result.returncode:
        sys.exit(f"mmedpo run failed with exit code {result.returncode} for {' '.join(overrides)}")


if __name__ == "__main__":
    sys.exit(main())
