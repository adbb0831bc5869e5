"""endpoint + samples → answers and scores.

Every test question goes to every model through the endpoint, as a user's would. The answers (`answers` schema) are kept
in ``evaluate/``, what failed in ``evaluate/dropped/``, the scores with their intervals in ``evaluate/summary.json``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.table import Table

from mmedpo_ray import storage, tables
from mmedpo_ray.config import Config
from mmedpo_ray.console import console, progress_bar
from mmedpo_ray.errors import UserError
from mmedpo_ray.evaluate import statistics
from mmedpo_ray.evaluate.client import Endpoint, Question, Reply
from mmedpo_ray.evaluate.metrics import METRICS, Answer, Metric
from mmedpo_ray.models.loading import model_fingerprint
from mmedpo_ray.run_folder import RunFolder
from mmedpo_ray.serving import engine_groups, run_models, start_endpoint
from mmedpo_ray.stage import Manifest, Station, digest, read_manifest, read_table

log = logging.getLogger(__name__)

SUMMARY = "summary.json"
# An interrupted evaluation loses at most this many seconds of answers.
_SAVE_EVERY_S = 10.0


def evaluate(config: Config) -> Manifest:
    """Asks every model of the run the test questions and scores the answers.

    Uses ``evaluate.endpoint`` if given, else starts an endpoint for the run's models and stops it afterwards.

    Raises:
        UserError: there is no test question, the endpoint lacks a model, or too many requests failed.
    """
    run = RunFolder(config.run.folder)
    station, names = _station(config, run)
    finished = station.finished()
    if finished is not None:
        if _read_summary(run).get("key") != _summary_key(station, config):
            answers = read_table(run.evaluate, tables.ANSWERS, "answers")
            _write_summary(config, run, station, answers, names)
        return finished
    samples = _test_samples(config, run)
    done = station.done_ids("answer_id")
    todo = [
        (name, sample) for name in names for sample in samples if f"{name}/{sample['sample_id']}" not in done
    ]
    asked = len(done)
    for group in _groups(config, names):
        questions = [(name, sample) for name, sample in todo if name in group]
        if questions:
            with _endpoint(config, group) as base_url:
                asyncio.run(_collect(config, station, base_url, questions, done=asked))
            asked += len(questions)

    def summarise(answers: pa.Table) -> dict[str, Any]:
        return {"summary": _write_summary(config, run, station, answers, names)["models"]}

    return station.finish_parts(schema=tables.ANSWERS, id_column="answer_id", extra=summarise)


def _station(config: Config, run: RunFolder) -> tuple[Station, list[str]]:
    """The station, which depends on what answers could depend on, and the names of the models to ask."""
    settings = config.evaluate.model_dump(include={"max_tokens", "temperature", "max_samples"})
    inputs = [run.samples]
    if config.evaluate.endpoint:
        offered = Endpoint(config.evaluate.endpoint, config.evaluate).model_names()
        names = _names_at(config, offered)
        settings["endpoint"] = config.evaluate.endpoint
    else:
        names = list(run_models(config))
        settings["model_files"] = model_fingerprint(config.model.path)
        if config.evaluate.aligned_name not in names:
            raise UserError(
                f"there is no aligned model in {run.model('aligned')} to evaluate. Run `mmedpo export` first, or set "
                "evaluate.endpoint to one that serves it."
            )
    for role, name in (("aligned", config.evaluate.aligned_name), ("control", config.control.name)):
        folder = str(run.model(role))  # type: ignore[arg-type]
        if name in names and read_manifest(folder) is not None:
            inputs.append(folder)
    station = Station(
        "evaluate",
        run.evaluate,
        config,
        settings=[settings, config.model.path, names, config.model.engine.dtype, config.run.seed],
        inputs=inputs,
    )
    return station, names


def _names_at(config: Config, offered: Sequence[str]) -> list[str]:
    wanted = [config.model.name, config.evaluate.aligned_name]
    missing = [name for name in wanted if name not in offered]
    if missing:
        raise UserError(
            f"the endpoint {config.evaluate.endpoint} has no model {missing[0]!r}; it has {', '.join(offered) or 'none'}. "
            "Set model.name and evaluate.aligned_name to served names, or serve the run with `mmedpo serve`."
        )
    return wanted + ([config.control.name] if config.control.name in offered else [])


def _test_samples(config: Config, run: RunFolder) -> list[dict[str, Any]]:
    """Test questions, those about one image in a row, limited to ``evaluate.max_samples`` by whole images."""
    table = read_table(run.samples, tables.SAMPLES, "samples")
    table = table.filter(pc.equal(table["split"], "test")).sort_by(
        [("image_id", "ascending"), ("sample_id", "ascending")]
    )
    if table.num_rows == 0:
        raise UserError(
            f"{run.samples} has no test question. Set data.test_file, or data.test_share above 0, and run ingest again."
        )
    rows = table.to_pylist()
    limit = config.evaluate.max_samples
    if limit is None or limit >= len(rows):
        return rows
    images = sorted({row["image_id"] for row in rows})
    order = {
        image: rank for rank, image in enumerate(np.random.default_rng(config.run.seed).permutation(images))
    }
    return sorted(rows, key=lambda row: (order[row["image_id"]], row["sample_id"]))[:limit]


def _groups(config: Config, names: Sequence[str]) -> list[list[str]]:
    """Names to ask together. Whole models have an engine each; one after the other they need the room of one."""
    if config.evaluate.endpoint:
        return [list(names)]
    models = {name: path for name, path in run_models(config).items() if name in names}
    return [list(group) for group in engine_groups(models)]


@contextlib.contextmanager
def _endpoint(config: Config, names: Sequence[str]) -> Iterator[str]:
    if config.evaluate.endpoint:
        yield config.evaluate.endpoint
        return
    # An endpoint of our own: any free port, not reachable from elsewhere, beside whatever else is served.
    own = config.model_copy(deep=True)
    own.serve.port, own.serve.host = 0, "127.0.0.1"
    models = {name: path for name, path in run_models(config).items() if name in names}
    with start_endpoint(own, models, app_name="mmedpo-evaluate", route_prefix="/evaluate") as endpoint:
        console.print(f"[dim]evaluate: {', '.join(names)} answer after {endpoint.seconds:.0f} s[/dim]")
        yield endpoint.base_url


async def _collect(
    config: Config, station: Station, base_url: str, todo: list[tuple[str, dict[str, Any]]], done: int
) -> None:
    """Asks, and writes the answers in parts as they come."""
    by_id = {f"{name}/{sample['sample_id']}": (name, sample) for name, sample in todo}
    questions = [
        Question(answer_id, name, sample["image_uri"], sample["question"])
        for answer_id, (name, sample) in by_id.items()
    ]
    client = Endpoint(base_url, config.evaluate, config.data.max_pixels)
    rows: list[dict[str, Any]] = []
    saved = started = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("evaluate", total=done + len(questions), completed=done, note="")
        async for reply in client.ask(questions):
            rows.append(_row(*by_id[reply.answer_id], reply))
            bar.advance(task)
            if len(rows) >= config.ray.rows_per_part or time.monotonic() - saved > _SAVE_EVERY_S:
                station.write_part(rows, tables.ANSWERS, "answer_id")
                rows, saved = [], time.monotonic()
    if rows:
        station.write_part(rows, tables.ANSWERS, "answer_id")
    seconds = time.monotonic() - started
    log.info(
        "%d answers in %.0f s (%.1f a second)", len(questions), seconds, len(questions) / max(seconds, 1e-9)
    )


def _row(name: str, sample: dict[str, Any], reply: Reply) -> dict[str, Any]:
    return {
        "answer_id": reply.answer_id,
        "model": name,
        "sample_id": sample["sample_id"],
        "image_id": sample["image_id"],
        "task": sample["task"],
        "answer_type": sample["answer_type"],
        "reference": sample["answer"],
        "prediction": reply.text,
        "seconds": reply.seconds,
        tables.DROP_REASON: reply.reason,
        tables.DROP_DETAIL: reply.detail,
    }


# ---------------------------------------------------------------------- scores


def summarise(
    answers: pa.Table,
    questions: dict[str, str],
    *,
    base: str,
    aligned: str,
    control: str,
    resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Scores of every model with intervals, and of the differences on the questions that both models answered.

    Args:
        answers: the `answers` table.
        questions: question by sample id.
        base: name of the unaligned model.
        aligned: name of the aligned one.
        control: name of the control; may be absent.
        resamples: draws of the bootstrap.
        confidence: of the intervals.
        seed: of the draws.

    Returns:
        ``{"models": {name: {metric: {"value", "low", "high", "n"}}}, "difference": …, "difference_to_control": …}``
    """
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in answers.to_pylist():
        rows.setdefault((row["model"], row["answer_type"]), []).append(row)
    names = [name for name in (base, aligned, control) if any(name == model for model, _ in rows)]
    models: dict[str, dict[str, Any]] = {name: {} for name in names}
    differences: dict[str, dict[str, Any]] = {base: {}, control: {}}
    for metric in METRICS.values():
        scored = {
            name: _statistics(metric, rows.get((name, metric.answer_type), []), questions) for name in names
        }
        options = {"resamples": resamples, "confidence": confidence, "seed": seed}
        for name in names:
            models[name][metric.name] = _estimate(metric, [scored[name]], **options).as_dict()
        for other, target in differences.items():
            if aligned in scored and other in scored:
                target[metric.name] = _estimate(metric, [scored[aligned], scored[other]], **options).as_dict()
    return {"models": models, "difference": differences[base], "difference_to_control": differences[control]}


_Scored = dict[str, tuple[str, np.ndarray]]


def _statistics(metric: Metric, rows: list[dict[str, Any]], questions: dict[str, str]) -> _Scored:
    """Sample id → (image id, statistics)."""
    return {
        row["sample_id"]: (
            row["image_id"],
            metric.statistics(
                Answer(row["reference"], row["prediction"], questions.get(row["sample_id"], ""))
            ),
        )
        for row in rows
    }


def _estimate(metric: Metric, scored: list[_Scored], **options: Any) -> statistics.Estimate:
    common = sorted(set.intersection(*(set(item) for item in scored)))
    if not common:
        return statistics.Estimate(float("nan"), float("nan"), float("nan"), 0)
    clusters = [scored[0][sample][0] for sample in common]
    order = sorted(set(clusters))
    sums = [
        statistics.cluster_sums(np.stack([item[sample][1] for sample in common]), clusters, order)
        for item in scored
    ]
    return statistics.bootstrap(
        metric.value,
        sums,
        combine=statistics.difference if len(sums) == 2 else None,
        n=len(common),
        **options,
    )


def _write_summary(
    config: Config, run: RunFolder, station: Station, answers: pa.Table, names: Sequence[str]
) -> dict[str, Any]:
    samples = read_table(run.samples, tables.SAMPLES, "samples")
    questions = dict(zip(samples["sample_id"].to_pylist(), samples["question"].to_pylist(), strict=True))
    summary = summarise(
        answers,
        questions,
        base=config.model.name,
        aligned=config.evaluate.aligned_name,
        control=config.control.name,
        resamples=config.evaluate.bootstrap,
        confidence=config.evaluate.confidence,
        seed=config.run.seed,
    )
    summary["names"] = {
        role: name
        for role, name in (
            ("base", config.model.name),
            ("aligned", config.evaluate.aligned_name),
            ("control", config.control.name),
        )
        if name in names
    }
    summary |= {
        "images": pc.count_distinct(answers["image_id"]).as_py(),
        "questions": pc.count_distinct(answers["sample_id"]).as_py(),
        "bootstrap": config.evaluate.bootstrap,
        "confidence": config.evaluate.confidence,
        "command": _command(),
        "key": _summary_key(station, config),
    }
    storage.write_bytes(storage.join(run.evaluate, SUMMARY), json.dumps(summary, indent=2).encode())
    return summary


def _summary_key(station: Station, config: Config) -> str:
    return digest(station.key, config.evaluate.bootstrap, config.evaluate.confidence, sorted(METRICS))


def _read_summary(run: RunFolder) -> dict[str, Any]:
    try:
        return json.loads(storage.read_bytes(storage.join(run.evaluate, SUMMARY)))
    except FileNotFoundError:
        return {}


def _command() -> str:
    """The command line of this process, without the folder of the program."""
    program = Path(sys.argv[0]).name
    return shlex.join([program, *sys.argv[1:]] if not program.endswith(".py") else ["python", *sys.argv])


def summary_table(summary: dict[str, Any]) -> Table:
    """The scores as a table: a column a model, then the differences with their intervals."""
    names = summary["names"]
    table = Table(
        title=f"{summary['questions']:,} questions about {summary['images']:,} images, "
        f"{summary['confidence']:.0%} intervals over images",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for name in names.values():
        table.add_column(name.replace("_", "_\n", 1), justify="right", overflow="fold")
    table.add_column(f"{names.get('aligned', 'aligned')} −\n{names.get('base', 'base')}", justify="right")
    if "control" in names:
        table.add_column(f"{names['aligned']} −\n{names['control']}", justify="right")
    for key, metric in METRICS.items():
        values = [summary["models"].get(name, {}).get(key) for name in names.values()]
        if metric.official or not any(value and value["n"] for value in values):
            continue
        cells = [_cell(value) for value in values] + [_difference_cell(summary["difference"].get(key))]
        if "control" in names:
            cells.append(_difference_cell(summary["difference_to_control"].get(key)))
        table.add_row(metric.label, *cells)
    return table


def _cell(value: dict[str, Any] | None) -> str:
    if not value or value["value"] is None:
        return "–"
    if value["low"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f}\n[dim]\\[{_short(value['low'])}, {_short(value['high'])}][/dim]"


def _difference_cell(value: dict[str, Any] | None) -> str:
    if not value or value["value"] is None or value["low"] is None:
        return "–"
    text = f"{value['value']:+.3f}\n\\[{_short(value['low'], '+')}, {_short(value['high'], '+')}]"
    if value["low"] > 0:
        return f"[green]{text}[/green]"
    return f"[red]{text}[/red]" if value["high"] < 0 else text


def _short(number: float, sign: str = "") -> str:
    """Three decimals without the zero before the point."""
    return (
        format(number, f"{sign}.3f").replace("0.", ".", 1)
        if abs(number) < 1
        else format(number, f"{sign}.3f")
    )
