"""The parser of the ``mmedpo`` command line. Nothing slow is imported here."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from mmedpo_ray import __version__
from mmedpo_ray.commands import pipeline_commands, utility_commands
from mmedpo_ray.commands.options import add_common_options, add_settings_options
from mmedpo_ray.stages.registry import stages

_EPILOG = """\
start here
  mmedpo run --config configs/phantom.yaml              the whole method on the embedded synthetic world
  mmedpo run --config FILE run.folder=DIR align.beta=0.2  your own data, with two settings changed
  mmedpo config show --config FILE                      every setting with its default filled in

If a setting is a string (a path, a name, a choice), its value is used exactly as given: quote it for the
shell only, as in "data.root=/data/Ward #3". `null` or an empty value unsets it where it may be null. Any
other value is YAML: 1e-6, true, [a, b], {key: value}. The value of an option such as --root is always used
exactly as given.

A run is one folder (run.folder). Repeating a command skips what is finished and resumes what was interrupted.
Once the folder exists, `run.folder=DIR` is enough: its config.yaml is used.
"""


def build_parser() -> ArgumentParser:
    """The parser.

    What it returns has ``start``, a function of the arguments that returns the command to run.
    """
    parser = ArgumentParser(
        prog="mmedpo",
        description="Clinically weighted preference alignment of medical vision-language models on Ray.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mmedpo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_pipeline_command(
        commands, "run", pipeline_commands.RUN_SUMMARY, "the raw data named by data.*", "the whole run folder"
    )
    for stage in stages().values():
        _add_pipeline_command(commands, stage.name, stage.summary, stage.reads, stage.writes)
    for command in utility_commands.COMMANDS:
        added = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description or command.summary,
            epilog=command.example,
            formatter_class=RawDescriptionHelpFormatter,
        )
        added.set_defaults(start=command.start)
        command.add_options(added)
        (add_settings_options if command.has_settings else add_common_options)(added)
    return parser


def _add_pipeline_command(
    commands: argparse._SubParsersAction, name: str, summary: str, reads: str, writes: str
) -> None:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary}.\n\nreads   {reads}\nwrites  {writes}",
        epilog=f"example: mmedpo {name} --config configs/phantom.yaml run.folder=runs/mine",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.set_defaults(start=pipeline_commands.start)
    if (add_options := pipeline_commands.OPTIONS.get(name)) is not None:
        add_options(parser)
    add_settings_options(parser)
