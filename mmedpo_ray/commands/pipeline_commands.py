"""``mmedpo run`` and the command of each stage: options beyond the settings, and what a command starts."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from mmedpo_ray.commands.options import settings_of

RUN_SUMMARY = "the whole pipeline: ingest, curate, score, audit, align, export, evaluate, report"


def start(arguments: Namespace) -> Callable[[], int]:
    """Loads and checks the settings; returns the command."""
    from mmedpo_ray import pipeline
    from mmedpo_ray.config.load import resolve_run_folder
    from mmedpo_ray.stages import preflight
    from mmedpo_ray.stages.outcome import print_outcome
    from mmedpo_ray.stages.registry import stages

    name, config = arguments.command, settings_of(arguments)
    if name == "evaluate" and arguments.answers is not None:
        return _evaluate_answers(arguments)
    config = resolve_run_folder(config)
    if name == "audit":
        from mmedpo_ray.audit.stage import audit_command

        if arguments.table is None:
            preflight.announce(name, config)
        return lambda: audit_command(config, arguments.table, arguments.samples, arguments.out, arguments.fix)
    # The next two only read their input.
    if name == "align" and arguments.dry_run:
        from mmedpo_ray.align.plan.dry_run import dry_run

        preflight.announce(name, config)
        return _status_zero(dry_run, config)
    if name == "curate" and arguments.preview is not None:
        from mmedpo_ray.curate.visual.preview import preview

        preflight.announce(name, config)
        return _status_zero(preview, config, arguments.preview)
    if name == "run":
        return _status_zero(pipeline.run_all, config)
    stage = stages()[name]
    if not stage.in_pipeline:
        preflight.check(name, config)
        preflight.announce(name, config)
        return _status_zero(stage.run, config)

    def run() -> int:
        pipeline.run_stage(stage, config)
        print_outcome(stage, config)
        return 0

    return run


def _status_zero(function: Callable[..., object], *arguments: object) -> Callable[[], int]:
    """A command that calls the function and ends with status 0."""

    def run() -> int:
        function(*arguments)
        return 0

    return run


def _evaluate_answers(arguments: Namespace) -> Callable[[], int]:
    from mmedpo_ray.evaluate.answers_command import answers_command
    from mmedpo_ray.evaluate.scoring import Options

    config = settings_of(arguments)
    options = Options(config.evaluate.bootstrap, config.evaluate.confidence, config.run.seed)

    def run() -> int:
        answers_command(arguments.answers, options, json_path=arguments.json, rows_path=arguments.rows)
        return 0

    return run


def _ingest_options(parser: ArgumentParser) -> None:
    parser.add_argument("--format", metavar="F", help="the same as data.format=F")
    parser.add_argument("--root", metavar="DIR", help="the same as data.root=DIR")


def _curate_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--preview",
        type=int,
        metavar="N",
        help="only write an image sheet of N visual pairs (original, heat map, mask, noised) to preview.png",
    )


def _align_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print steps, tokens and expected memory from the scored pairs, and stop before loading "
        "anything",
    )


def _audit_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "table",
        nargs="?",
        metavar="TABLE",
        help="folder of Parquet files, a Parquet file, a released MMedPO JSON, or data of TRL, LLaMA-Factory "
        "or ms-swift; default: the run's scored/",
    )
    parser.add_argument(
        "--samples",
        metavar="TABLE",
        help="samples table, to compare chosen with the ground truth and train with test",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="findings as JSON (default: beside the table, audit.json of a run's scored/, else "
        "NAME.audit.json)",
    )
    parser.add_argument(
        "--fail-on",
        choices=["high", "medium", "low", "never"],
        help="end with status 1 at a finding of this severity or above",
    )
    parser.add_argument("--fix", metavar="DIR", help="write a cleaned table here, with a log of every change")


_ANSWERS_HELP = """\
example: mmedpo evaluate --config configs/phantom.yaml run.folder=runs/mine

With --answers no endpoint is asked: existing answers are scored, without a run, Ray or a GPU. One row of
FILE is one answer:
  {"answer_type": "closed", "question": "Is there an effusion?", "reference": "Yes", "prediction": "Yes.",
   "image_id": "study-7", "model": "base"}
answer_type is closed, open or report. Optional: image_id (intervals resample images), model (differences
between models), and sample_id or id (which pairs the rows of models). A prediction of null is a failed
request; it counts as wrong.

  mmedpo evaluate --answers answers.jsonl
  mmedpo evaluate --answers answers.jsonl --json scores.json --rows rows.jsonl evaluate.bootstrap=10000
  mmedpo evaluate --answers answers.jsonl --json - | jq .models
"""


def _evaluate_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--answers",
        metavar="FILE",
        help="score the answers in this file (JSON lines, a JSON list or Parquet) instead of asking an "
        "endpoint",
    )
    parser.add_argument(
        "--json", metavar="OUT", help="with --answers: write the scores here; - is the standard output"
    )
    parser.add_argument(
        "--rows",
        metavar="OUT",
        help="with --answers: write one line per answer, in the file's order, with the value of every metric",
    )
    parser.epilog = _ANSWERS_HELP


# Command → the options that it has beyond the settings.
OPTIONS = {
    "ingest": _ingest_options,
    "curate": _curate_options,
    "audit": _audit_options,
    "align": _align_options,
    "evaluate": _evaluate_options,
}
