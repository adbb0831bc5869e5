"""Commands beside the pipeline: settings, image files, conversions, the embedded model."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmedpo_ray.commands.options import settings_of

Run = Callable[[], int]


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: what a user types.
        summary: one line of the help.
        add_options: adds its options to its parser.
        start: loads what it needs from the arguments; returns what runs it and returns the exit status.
        description: longer text of its own help.
        example: last line of its own help.
        has_settings: whether it takes ``--config`` and ``key=value`` settings.
    """

    name: str
    summary: str
    add_options: Callable[[ArgumentParser], None]
    start: Callable[[Namespace], Run]
    description: str = ""
    example: str = ""
    has_settings: bool = False


def _config_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=["show", "validate"], help="show: print every setting; validate: only check"
    )


def _config(arguments: Namespace) -> Run:
    config = settings_of(arguments)

    def run() -> int:
        from mmedpo_ray.config.load import dump
        from mmedpo_ray.console import console

        if arguments.action == "show":
            sys.stdout.write(dump(config))
        else:
            console.print("the settings are valid")
        return 0

    return run


def _show_options(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="image file (path, s3://, gs://)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the PNG files")
    parser.add_argument(
        "--frames",
        choices=["refuse", "first", "middle", "all"],
        default="refuse",
        help="which frames of files with several, as data.frames (default refuse)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of words")


def _show(arguments: Namespace) -> Run:
    from mmedpo_ray.ingest.show import show

    return lambda: show(arguments.files, arguments.out, frames=arguments.frames, as_json=arguments.json)


def _convert_pairs_options(parser: ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="a run's pairs/ or scored/, or a Parquet file")
    parser.add_argument(
        "--to", required=True, choices=["trl", "llama-factory", "swift"], help="the project that reads it"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")


def _convert_pairs(arguments: Namespace) -> Run:
    from mmedpo_ray.convert.preference_pairs import convert_pairs_command

    return lambda: convert_pairs_command(arguments.table, arguments.to, arguments.out)


def _convert_options(parser: ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="the original checkpoint")
    _add_model_folder(parser)
    parser.add_argument(
        "--vision-tower",
        metavar="DIR",
        help="CLIP folder whose tower replaces the checkpoint's, or supplies one if it has none",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the written weights (default: as they are)",
    )


def _convert(arguments: Namespace) -> Run:
    from mmedpo_ray.convert.checkpoint import convert_command

    def run() -> int:
        convert_command(
            arguments.source, arguments.out, vision_tower=arguments.vision_tower, dtype=arguments.dtype
        )
        return 0

    return run


def _submit_options(parser: ArgumentParser) -> None:
    # Without `choices`: a setting may come first.
    parser.add_argument("stage", nargs="?", default="run", metavar="STAGE", help="default: run, all stages")
    parser.add_argument(
        "--address",
        metavar="URL",
        help="of the dashboard (default: RAY_API_SERVER_ADDRESS, or this machine)",
    )
    parser.add_argument(
        "--runtime-env", type=Path, metavar="FILE", help="YAML: variables and packages of the job"
    )
    parser.add_argument("--no-follow", action="store_true", help="return once the job is submitted")


def _submit(arguments: Namespace) -> Run:
    from mmedpo_ray.commands.submit import submit

    return lambda: submit(arguments)


def _rollout_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--name", metavar="NAME", help="under which it is to answer (default: evaluate.aligned_name)"
    )
    parser.add_argument("--back", action="store_true", help="let the version answer that did before")


def _rollout(arguments: Namespace) -> Run:
    from mmedpo_ray.config.load import resolve_run_folder
    from mmedpo_ray.serve.rollout import rollout_command

    config = resolve_run_folder(settings_of(arguments))

    def run() -> int:
        rollout_command(config, name=arguments.name, back=arguments.back)
        return 0

    return run


def _no_options(parser: ArgumentParser) -> None:
    """Takes none."""


def _models(_arguments: Namespace) -> Run:
    from mmedpo_ray.models.list_architectures import models_command

    return models_command


def _phantom_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=["build"],
        help="build: pre-train the tiny LLaVA on the synthetic radiograph world",
    )
    _add_model_folder(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of data order and initialisation (default 0)"
    )


def _phantom(arguments: Namespace) -> Run:
    from mmedpo_ray.phantom.build_model import build_command

    def run() -> int:
        build_command(arguments.out, seed=arguments.seed)
        return 0

    return run


def _add_model_folder(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the model; must be empty or not exist",
    )


COMMANDS = (
    Command("config", "show or check the settings", _config_options, _config, has_settings=True),
    Command(
        "show",
        "image files → PNG as the models will see them, and how each was decoded",
        _show_options,
        _show,
        description="Writes what the models will see of image files (PNG, JPEG, TIFF, DICOM, …) as 8-bit "
        "RGB PNG, named\n"
        "after the file's stem, and prints one line on how each was decoded: decoder, rescale, window or "
        "table,\n"
        "inversion, padding, palette, EXIF. Exit status 2 if a file cannot be used; its line has the reason.",
        example="example: mmedpo show study/*.dcm --out shown --frames middle",
    ),
    Command(
        "convert-pairs",
        "preference pairs → data that TRL, LLaMA-Factory or ms-swift train on",
        _convert_pairs_options,
        _convert_pairs,
        description="Writes a table of pairs as another project reads it: trl (.jsonl, .json, or .parquet "
        "with the\n"
        "images in it), llama-factory (with dataset_info.json beside it) or swift. Weight and score are "
        "kept.\n"
        "Images that other decoders would read differently (DICOM, 16 bits, EXIF) are written as PNG beside "
        "the\n"
        "file. Visual pairs need swift; the other formats count them and leave them out.",
        example="example: mmedpo convert-pairs runs/mine/scored --to trl --out mine.parquet",
    ),
    Command(
        "convert",
        "original LLaVA-Med 1.5 checkpoint → a model that transformers and vLLM load",
        _convert_options,
        _convert,
        description="Converts an original LLaVA-Med 1.5 checkpoint (llava_mistral) shard by shard.",
        example="example: mmedpo convert --source /models/llava-med-v1.5 --out /models/llava-med-v1.5-hf",
    ),
    Command(
        "submit",
        "a stage or the pipeline as a job of a Ray cluster, followed to its end",
        _submit_options,
        _submit,
        description="Runs the command on a cluster where mmedpo-ray is installed. Uploads the file of\n"
        "--config; paths in settings are the cluster's. Ctrl-C stops the job, which saves first.\n"
        "The same command again follows a job that is still there, and otherwise resumes the run.",
        example="example: mmedpo submit --address http://HEAD:8265 --config FILE run.folder=/shared/run",
        has_settings=True,
    ),
    Command(
        "rollout",
        "the adapter of a run → answers on the running endpoint, without a gap",
        _rollout_options,
        _rollout,
        description="Loads the adapter of a run into the engines of the running endpoint beside the one that "
        "answers,\n"
        "and switches its name over once the new one has answered on every replica.",
        example="example: mmedpo rollout run.folder=runs/second ray.address=127.0.0.1:6379",
        has_settings=True,
    ),
    Command(
        "models",
        "the supported model architectures, and what each can do",
        _no_options,
        _models,
        description="Lists the supported architectures by the model_type of config.json.",
    ),
    Command(
        "phantom",
        "build the embedded model again",
        _phantom_options,
        _phantom,
        description="Pre-trains the embedded LLaVA from random weights (minutes on two cores, reproducible "
        "by seed).",
        example="example: mmedpo phantom build --out /models/phantom --seed 1",
    ),
)
