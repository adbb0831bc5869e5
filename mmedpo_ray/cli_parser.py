"""The command line of ``mmedpo``: its commands, their options and their help."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmedpo_ray import __version__

_EPILOG = """\
start here
  mmedpo run --config configs/phantom.yaml              the whole method on the embedded synthetic world
  mmedpo run --config FILE run.folder=DIR align.beta=0.2  your own data, with two settings changed
  mmedpo config show --config FILE                      every setting with its default filled in

The value of a setting that holds a text (a path, a name, a choice) is taken as it is: quote it for the shell alone,
as in "data.root=/data/Station #3". `null` or nothing unsets it where it may be null. Any other value is YAML: 1e-6,
true, [a, b], {key: value}. The value of an option such as --root is always taken as it is.

A run lives in one folder (run.folder). Repeating a command skips what is finished and resumes what was
interrupted. Once the folder exists, `run.folder=DIR` alone is enough: its config.yaml is used.
"""

_STAGES = {
    "run": "the whole road: ingest, curate, score, audit, align, export, evaluate, report",
    "ingest": "raw data set → samples: one row a question, images checked, unusable rows dropped with a reason",
    "curate": "samples → preference pairs: hallucinated answers and images with noise in the lesion",
    "score": "pairs → scored pairs: judges debate the clinical relevance, scores become weights",
    "audit": "preference pairs → shortcuts and faults that would teach the wrong thing, with their remedies",
    "align": "scored pairs → trained weights: weighted DPO (Ray Train, DeepSpeed ZeRO-3), and the SFT control",
    "export": "trained weights → model/merged (transformers, vLLM), and model/adapter (peft) where LoRA is all",
    "serve": "OpenAI-compatible endpoint for the base and the aligned model (Ray Serve, vLLM)",
    "evaluate": "endpoint + test samples → answers, metrics with confidence intervals",
    "report": "everything above → one self-contained report.html",
}

_READS_WRITES = {
    "run": ("the raw data named by data.*", "the whole run folder"),
    "ingest": (
        "data.root (or nothing, for data.format=phantom)",
        "samples/ (released/ where pairs come with the data)",
    ),
    "curate": ("samples/", "candidates/, visual/, pairs/, noised/"),
    "score": ("pairs/", "scored/"),
    "audit": ("a table of pairs (a run's scored/ unless given)", "audit.json; with --fix a cleaned table"),
    "align": ("scored/", "prepared/, align/ and control/align/"),
    "export": ("align/", "model/ and control/model/"),
    "serve": (
        "the base model and model/",
        "nothing; answers on serve.host:serve.port until interrupted",
    ),
    "evaluate": (
        "samples/ (split test) and the models, or evaluate.endpoint; with --answers that file alone",
        "evaluate/ (answers), evaluate/summary.json; with --answers what --json and --rows name",
    ),
    "report": ("every table and metric of the run", "report.html"),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="mmedpo",
        description="Clinically weighted preference alignment of medical vision-language models on Ray.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mmedpo {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in _STAGES.items():
        reads, writes = _READS_WRITES[name]
        verb = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary}.\n\nreads   {reads}\nwrites  {writes}",
            epilog=f"example: mmedpo {name} --config configs/phantom.yaml run.folder=runs/mine",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _OPTIONS.get(name, lambda _: None)(verb)
        _add_settings(verb)
    settings = verbs.add_parser("config", help="show or check the settings")
    settings.add_argument(
        "action", choices=["show", "validate"], help="show: print every setting; validate: only check"
    )
    _add_settings(settings)
    _add_show(verbs)
    _add_convert_pairs(verbs)
    _add_convert(verbs)
    _add_phantom(verbs)
    return parser


def _add_ingest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", metavar="F", help="the same as data.format=F")
    parser.add_argument("--root", metavar="DIR", help="the same as data.root=DIR")


def _add_curate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preview",
        type=int,
        metavar="N",
        help="only write an image sheet of N visual pairs (original, heat map, mask, noised) to preview.png",
    )


def _add_align(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print steps, tokens and expected memory from the scored pairs, and stop before loading anything",
    )


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "table",
        nargs="?",
        metavar="TABLE",
        help="folder of Parquet files, a Parquet file, a released MMedPO JSON, or data of TRL, LLaMA-Factory or ms-swift; "
        "default: the run's scored/",
    )
    parser.add_argument(
        "--samples",
        metavar="TABLE",
        help="samples table, to compare chosen with the ground truth and train with test",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="findings as JSON (default: beside the table, audit.json of a run's scored/, else NAME.audit.json)",
    )
    parser.add_argument(
        "--fail-on",
        choices=["high", "medium", "low", "never"],
        help="end with status 1 at a finding of this severity or above",
    )
    parser.add_argument("--fix", metavar="DIR", help="write a cleaned table here, with a log of every change")


_ANSWERS_HELP = """\
example: mmedpo evaluate --config configs/phantom.yaml run.folder=runs/mine

With --answers nothing is asked: answers that exist are scored, without a run, an endpoint, Ray or a GPU. A row of FILE is one answer:
  {"answer_type": "closed", "question": "Is there an effusion?", "reference": "Yes", "prediction": "Yes.",
   "image_id": "study-7", "model": "base"}
answer_type is closed, open or report. image_id (intervals are drawn over images), model (differences between models) and
sample_id or id (what pairs their rows) may be left out. A prediction of null is a request that failed; it counts as wrong.

  mmedpo evaluate --answers answers.jsonl
  mmedpo evaluate --answers answers.jsonl --json scores.json --rows rows.jsonl evaluate.bootstrap=10000
  mmedpo evaluate --answers answers.jsonl --json - | jq .models
"""


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--answers",
        metavar="FILE",
        help="score the answers in this file (JSON lines, a JSON list or Parquet) instead of asking an endpoint",
    )
    parser.add_argument(
        "--json", metavar="OUT", help="with --answers: write the scores here; - is the output"
    )
    parser.add_argument(
        "--rows",
        metavar="OUT",
        help="with --answers: write a line an answer, in the file's order, with every metric's value",
    )
    parser.epilog = _ANSWERS_HELP


_OPTIONS = {
    "ingest": _add_ingest,
    "curate": _add_curate,
    "audit": _add_audit,
    "align": _add_align,
    "evaluate": _add_evaluate,
}


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with the settings that differ from the defaults"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, such as run.folder=DIR align.beta=0.2"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--verbose", action="store_true", help="show the libraries' own log lines too")


def _add_show(verbs: argparse._SubParsersAction) -> None:
    show = verbs.add_parser(
        "show",
        help="image files → PNG as the models will see them, and how each was made",
        description="Writes what the models will see of image files (PNG, JPEG, TIFF, DICOM, …) as 8-bit RGB PNG, named\n"
        "after the file's stem, and prints in a line how it was made: decoder, rescale, window or table, inversion,\n"
        "padding, palette, EXIF. Exit status 2 if a file cannot be used; its line has the reason.",
        epilog="example: mmedpo show study/*.dcm --out shown --frames middle",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("files", nargs="+", metavar="FILE", help="image file (path, s3://, gs://)")
    show.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the PNG files")
    show.add_argument(
        "--frames",
        choices=["refuse", "first", "middle", "all"],
        default="refuse",
        help="of files with several frames, as data.frames (default refuse)",
    )
    show.add_argument("--json", action="store_true", help="print an object a line instead of words")
    _add_common(show)


def _add_convert_pairs(verbs: argparse._SubParsersAction) -> None:
    convert = verbs.add_parser(
        "convert-pairs",
        help="preference pairs → data that TRL, LLaMA-Factory or ms-swift train on",
        description="Writes a table of pairs as another project reads it: trl (.jsonl, .json, or .parquet with the\n"
        "pictures in it), llama-factory (with dataset_info.json beside it) or swift. Weight and score go along.\n"
        "Pictures that other decoders would read otherwise (DICOM, 16 bits, EXIF) are written as PNG beside the\n"
        "file. Visual pairs need swift; the others count and leave them out.",
        epilog="example: mmedpo convert-pairs runs/mine/scored --to trl --out mine.parquet",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("table", metavar="TABLE", help="a run's pairs/ or scored/, or a Parquet file")
    convert.add_argument(
        "--to", required=True, choices=["trl", "llama-factory", "swift"], help="who reads it"
    )
    convert.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    _add_common(convert)


def _add_convert(verbs: argparse._SubParsersAction) -> None:
    convert = verbs.add_parser(
        "convert",
        help="original LLaVA-Med 1.5 checkpoint → a model that transformers and vLLM load",
        description="Converts an original LLaVA-Med 1.5 checkpoint (llava_mistral) shard by shard.",
        epilog="example: mmedpo convert --source /models/llava-med-v1.5 --out /models/llava-med-v1.5-hf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("--source", type=Path, required=True, metavar="DIR", help="the original checkpoint")
    convert.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the model; must not exist or be empty",
    )
    convert.add_argument(
        "--vision-tower",
        metavar="DIR",
        help="CLIP folder whose tower replaces the checkpoint's, or supplies it where it has none",
    )
    convert.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the written weights (default: as they are)",
    )
    _add_common(convert)


def _add_phantom(verbs: argparse._SubParsersAction) -> None:
    phantom = verbs.add_parser("phantom", help="build the embedded model anew")
    actions = phantom.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build",
        help="pre-train the tiny LLaVA on the synthetic radiograph world",
        description="Pre-trains the embedded LLaVA from nothing (minutes on two cores, reproducible by seed).",
    )
    build.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the model; must not exist or be empty",
    )
    build.add_argument(
        "--seed", type=int, default=0, help="seed of data order and initialisation (default 0)"
    )
    _add_common(build)
