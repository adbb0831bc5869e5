"""endpoint + samples → answers and scores.

Every test question goes to every model through the endpoint, as a user's would. The answers (`answers`
schema) are kept in ``evaluate/``, requests that failed in ``evaluate/dropped/``, the scores with their
intervals in ``evaluate/summary.json``. A failed request is scored as an empty answer: it stays in the
denominator. The next call tries again those that may pass.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmedpo_ray.config.tree import Config
from mmedpo_ray.console import console, progress_bar
from mmedpo_ray.errors import UserError
from mmedpo_ray.evaluate.client import RETRY_REASONS, Question, QuestionClient, Reply
from mmedpo_ray.evaluate.look import NO_LESION, Shown, shown_instead
from mmedpo_ray.evaluate.scoring import Options, check_script
from mmedpo_ray.evaluate.summary import ROLES, failed_rows, summarise, summary_table
from mmedpo_ray.io import storage
from mmedpo_ray.metrics import at_hand
from mmedpo_ray.models.fingerprint import model_fingerprint
from mmedpo_ray.serve.application import engine_groups
from mmedpo_ray.serve.endpoint import start_endpoint
from mmedpo_ray.serve.models import run_models
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.stage_runner import Manifest, StageRunner, digest, read_manifest, read_table

__all__ = ["SUMMARY", "evaluate", "summary_table"]

log = logging.getLogger(__name__)

SUMMARY = "summary.json"
# An interrupted evaluation loses at most this many seconds of answers.
_SAVE_EVERY_S = 10.0


def evaluate(config: Config) -> Manifest:
    """Asks every model of the run the test questions and scores the answers.

    Uses ``evaluate.endpoint`` if given, else starts an endpoint for the run's models and stops it afterwards.

    Raises:
        UserError: there is no test question, or one in a script that cannot be scored, the endpoint lacks a
            model, or too many requests failed.
    """
    run = RunFolder(config.run.folder)
    stage, names = _stage(config, run)
    manifest = stage.finished()
    if manifest is None:
        samples = _test_samples(config, run)
        manifest = stage.write_rows(
            lambda done: _ask(config, stage, names, samples, done),
            schema=_schema(config),
            id_column="answer_id",
            retry_reasons=RETRY_REASONS,
            intended_reasons=(NO_LESION,),
        )
    key = digest(
        manifest.key, manifest.content, config.evaluate.bootstrap, config.evaluate.confidence, at_hand()
    )
    if _read_summary(run).get("key") != key:
        _write_summary(config, run, names, key)
    return manifest


@dataclass(frozen=True)
class Asked:
    """A question to a model, about its own image or about one shown instead.

    Attributes:
        model: served name.
        sample: row of `samples`.
        shown: what is shown instead of the sample's image.
    """

    model: str
    sample: dict[str, Any]
    shown: Shown | None = None

    @property
    def id(self) -> str:
        name = f"{self.model}/{self.sample['sample_id']}"
        return name if self.shown is None else f"{name}~{self.shown.condition}"

    def question(self) -> Question:
        sample, shown = self.sample, self.shown or Shown("", self.sample["image_uri"])
        return Question(self.id, self.model, shown.image_uri, sample["question"], shown.alteration)


def _schema(config: Config) -> pa.Schema:
    return schemas.LOOK_ANSWERS if config.evaluate.look else schemas.ANSWERS


def _ask(
    config: Config, stage: StageRunner, names: Sequence[str], samples: list[dict[str, Any]], done: IdSet
) -> None:
    """Asks every model what it has not answered yet."""
    wanted: list[tuple[dict[str, Any], Shown | None]] = [(sample, None) for sample in samples]
    if config.evaluate.look:
        noise = config.curate.visual.noise
        wanted += shown_instead(samples, noise, config.run.seed, config.data.max_pixels)
    todo = [
        each
        for name in names
        for sample, shown in wanted
        if (each := Asked(name, sample, shown)).id not in done
    ]
    asked = len(done)
    for group in _groups(config, names):
        questions = [each for each in todo if each.model in group]
        if questions:
            with _endpoint(config, group) as client:
                asyncio.run(_collect(config, stage, client, questions, done=asked))
            asked += len(questions)


def _stage(config: Config, run: RunFolder) -> tuple[StageRunner, list[str]]:
    """The stage, which depends on what answers could depend on, and the names of the models to ask."""
    settings = config.evaluate.model_dump(include={"max_tokens", "temperature", "max_samples"})
    inputs = [run.samples]
    if config.evaluate.look:
        settings["look"] = config.curate.visual.noise.model_dump()
    if config.evaluate.endpoint:
        offered = QuestionClient(config.evaluate.endpoint, config.evaluate).model_names()
        names = _names_at(config, offered)
        settings["endpoint"] = config.evaluate.endpoint
    else:
        names = list(run_models(config))
        settings["model_files"] = model_fingerprint(config.model.path)
        if config.evaluate.aligned_name not in names:
            raise UserError(
                f"there is no aligned model in {run.model('aligned')} to evaluate. Run `mmedpo export` "
                "first, or set evaluate.endpoint to one that serves it."
            )
    for role, name in (("aligned", config.evaluate.aligned_name), ("control", config.control.name)):
        folder = str(run.model(role))  # type: ignore[arg-type]
        if name in names and read_manifest(folder) is not None:
            inputs.append(folder)
    stage = StageRunner(
        "evaluate",
        run.evaluate,
        config,
        settings=[settings, config.model.path, names, config.model.engine.dtype, config.run.seed],
        inputs=inputs,
    )
    return stage, names


def _names_at(config: Config, offered: Sequence[str]) -> list[str]:
    wanted = [config.model.name, config.evaluate.aligned_name]
    missing = [name for name in wanted if name not in offered]
    if missing:
        raise UserError(
            f"the endpoint {config.evaluate.endpoint} has no model {missing[0]!r}; it has "
            f"{', '.join(offered) or 'none'}. Set model.name and evaluate.aligned_name to served names, or "
            "serve the run with `mmedpo serve`."
        )
    return wanted + ([config.control.name] if config.control.name in offered else [])


def _test_samples(config: Config, run: RunFolder) -> list[dict[str, Any]]:
    """Test questions, those about one image in a row, limited to ``evaluate.max_samples`` by whole images."""
    table = read_table(run.samples, schemas.SAMPLES, "samples")
    table = table.filter(pc.equal(table["split"], "test")).sort_by(
        [("image_id", "ascending"), ("sample_id", "ascending")]
    )
    if table.num_rows == 0:
        raise UserError(
            f"{run.samples} has no test question. Set data.test_file, or data.test_share above 0, and run "
            "ingest again."
        )
    rows = _limited(config, table.to_pylist())
    for row in rows:
        check_script(f"sample {row['sample_id']}", row["question"], row["answer"])
    return rows


def _limited(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    limit = config.evaluate.max_samples
    if limit is None or limit >= len(rows):
        return rows
    images = sorted({row["image_id"] for row in rows})
    order = {
        image: rank for rank, image in enumerate(np.random.default_rng(config.run.seed).permutation(images))
    }
    return sorted(rows, key=lambda row: (order[row["image_id"]], row["sample_id"]))[:limit]


def _groups(config: Config, names: Sequence[str]) -> list[list[str]]:
    """Names to ask together: whole models one after the other, since each has an engine of its own."""
    if config.evaluate.endpoint:
        return [list(names)]
    models = {name: path for name, path in run_models(config).items() if name in names}
    return [list(group) for group in engine_groups(models)]


@contextlib.contextmanager
def _endpoint(config: Config, names: Sequence[str]) -> Iterator[QuestionClient]:
    max_pixels = config.data.max_pixels
    if config.evaluate.endpoint:
        yield QuestionClient(config.evaluate.endpoint, config.evaluate, max_pixels)
        return
    # An endpoint of our own: any free port, not reachable from elsewhere, beside whatever else is served.
    own = config.model_copy(deep=True)
    own.serve.port, own.serve.host, own.serve.route_prefix = 0, "127.0.0.1", "/evaluate"
    own.serve.max_output_tokens = max(own.serve.max_output_tokens, config.evaluate.max_tokens)
    models = {name: path for name, path in run_models(config).items() if name in names}
    with start_endpoint(own, models) as endpoint:
        console.print(f"[dim]evaluate: {', '.join(names)} answer after {endpoint.seconds:.0f} s[/dim]")
        yield QuestionClient(endpoint.base_url, config.evaluate, max_pixels, endpoint.api_key)


async def _collect(
    config: Config,
    stage: StageRunner,
    client: QuestionClient,
    todo: list[Asked],
    done: int,
) -> None:
    """Asks, and writes the answers in parts as they come."""
    by_id = {each.id: each for each in todo}
    questions = [each.question() for each in todo]
    schema = _schema(config)
    rows: list[dict[str, Any]] = []
    saved = started = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("evaluate", total=done + len(questions), completed=done, note="")
        async for reply in client.ask(questions):
            rows.append(_row(by_id[reply.answer_id], reply))
            bar.advance(task)
            if len(rows) >= config.ray.rows_per_part or time.monotonic() - saved > _SAVE_EVERY_S:
                stage.write_part(rows, schema, "answer_id")
                rows, saved = [], time.monotonic()
    if rows:
        stage.write_part(rows, schema, "answer_id")
    seconds = time.monotonic() - started
    log.info(
        "%d answers in %.0f s (%.1f a second)", len(questions), seconds, len(questions) / max(seconds, 1e-9)
    )


def _row(asked: Asked, reply: Reply) -> dict[str, Any]:
    sample = asked.sample
    row = {
        "answer_id": reply.answer_id,
        "model": asked.model,
        "sample_id": sample["sample_id"],
        "image_id": sample["image_id"],
        "task": sample["task"],
        "answer_type": sample["answer_type"],
        "reference": sample["answer"],
        "prediction": reply.text,
        "seconds": reply.seconds,
        schemas.DROP_REASON: reply.reason,
        schemas.DROP_DETAIL: reply.detail,
    }
    return row if asked.shown is None else row | {"shown": asked.shown.condition}


# ---------------------------------------------------------------------- scores


def _write_summary(config: Config, run: RunFolder, names: Sequence[str], key: str) -> None:
    samples = read_table(run.samples, schemas.SAMPLES, "samples")
    questions = dict(zip(samples["sample_id"].to_pylist(), samples["question"].to_pylist(), strict=True))
    settings = config.evaluate
    of_roles = dict(zip(ROLES, (config.model.name, settings.aligned_name, config.control.name), strict=True))
    summary = summarise(
        read_table(run.evaluate, _schema(config), "answers"),
        questions,
        names=of_roles,
        options=Options(settings.bootstrap, settings.confidence, config.run.seed),
        failed=failed_rows(run.evaluate),
    )
    summary |= {
        "names": {role: name for role, name in of_roles.items() if name in names},
        "bootstrap": settings.bootstrap,
        "confidence": settings.confidence,
        "command": _command(),
        "key": key,
    }
    text = json.dumps(summary, indent=2, allow_nan=False)
    storage.write_bytes(storage.join(run.evaluate, SUMMARY), text.encode())


def _read_summary(run: RunFolder) -> dict[str, Any]:
    try:
        return json.loads(storage.read_bytes(storage.join(run.evaluate, SUMMARY)))
    except FileNotFoundError:
        return {}


def _command() -> str:
    """The command line of this process, without the folder of the program."""
    program = Path(sys.argv[0]).name
    return shlex.join([program, *sys.argv[1:]] if not program.endswith(".py") else ["python", *sys.argv])
