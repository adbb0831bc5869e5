"""``mmedpo <verb>``: every stage of the road, the whole road, and the settings."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Nothing slow is imported here: a Ctrl-C can be answered only once `main` runs.
from mmedpo_ray.cli_parser import build_parser

if TYPE_CHECKING:
    from mmedpo_ray.config.tree import Config

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=")


def settings_of(arguments: argparse.Namespace) -> Config:
    """The settings a command names; a finished run's own where only its folder is given."""
    from mmedpo_ray.config.load import load

    path = arguments.config
    if path is None:
        for override in arguments.overrides:
            key, _, folder = override.partition("=")
            saved = Path(folder).expanduser() / "config.yaml"
            if key == "run.folder" and saved.is_file():
                path = saved
    return load(path, arguments.overrides, _options_as_values(arguments))


def _options_as_values(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings that options stand for, by key."""
    given = {
        "data.format": getattr(arguments, "format", None),
        "data.root": getattr(arguments, "root", None),
        "audit.fail_on": getattr(arguments, "fail_on", None),
    }
    return {key: value for key, value in given.items() if value is not None}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command whose options and key=value settings come in any order."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-") or "=" not in item]
    if unknown or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        arguments.overrides += rest
    if arguments.verb == "evaluate" and arguments.answers is None and (arguments.json or arguments.rows):
        parser.error(
            "--json and --rows belong to --answers FILE; a run's scores are in evaluate/summary.json"
        )
    if getattr(arguments, "table", None) and _OVERRIDE.match(arguments.table):
        # The first positional argument of `audit` may be a setting.
        arguments.overrides.insert(0, arguments.table)
        arguments.table = None
    return arguments


def _command(arguments: argparse.Namespace) -> Callable[[], int]:
    """Loads and checks what a command needs; returns the command, which returns the exit status."""
    if arguments.verb == "phantom":
        from mmedpo_ray.phantom.build_model import build_command

        return _always_zero(build_command, arguments.out, seed=arguments.seed)
    if arguments.verb == "show":
        from mmedpo_ray.ingest.show import show

        return lambda: show(arguments.files, arguments.out, frames=arguments.frames, as_json=arguments.json)
    if arguments.verb == "convert-pairs":
        from mmedpo_ray.convert.preference_pairs import convert_pairs_command

        return lambda: convert_pairs_command(arguments.table, arguments.to, arguments.out)
    if arguments.verb == "convert":
        from mmedpo_ray.convert.checkpoint import convert_command

        given = {"vision_tower": arguments.vision_tower, "dtype": arguments.dtype}
        return _always_zero(convert_command, arguments.source, arguments.out, **given)
    from mmedpo_ray.config.load import resolve_run_folder

    config = settings_of(arguments)
    if arguments.verb == "config":
        return lambda: _show_or_check(config, arguments.action)
    if arguments.verb == "evaluate" and arguments.answers is not None:
        return _answers_command(arguments, config)
    return _stage_command(arguments, resolve_run_folder(config))


def _always_zero(command: Callable[..., object], *given: object, **named: object) -> Callable[[], int]:
    """The command with these arguments, whose exit status is 0 where it returns."""

    def run() -> int:
        command(*given, **named)
        return 0

    return run


def _show_or_check(config: Config, action: str) -> int:
    from mmedpo_ray import console
    from mmedpo_ray.config.load import dump

    if action == "show":
        sys.stdout.write(dump(config))
    else:
        console.console.print("the settings are valid")
    return 0


def _answers_command(arguments: argparse.Namespace, config: Config) -> Callable[[], int]:
    from mmedpo_ray.evaluate.answers_command import answers_command
    from mmedpo_ray.evaluate.scoring import Options

    options = Options(config.evaluate.bootstrap, config.evaluate.confidence, config.run.seed)
    outputs = {"json_path": arguments.json, "rows_path": arguments.rows}
    return _always_zero(answers_command, arguments.answers, options, **outputs)


def _stage_command(arguments: argparse.Namespace, config: Config) -> Callable[[], int]:
    from mmedpo_ray.stages import preflight

    verb = arguments.verb
    if verb == "audit":
        from mmedpo_ray.audit.stage import audit_command

        if arguments.table is None:
            preflight.announce(verb, config)
        given = (arguments.table, arguments.samples, arguments.out, arguments.fix)
        return lambda: audit_command(config, *given)
    # These two start and write nothing before they have read their input.
    if verb == "align" and arguments.dry_run:
        from mmedpo_ray.align.plan.dry_run import dry_run

        preflight.announce(verb, config)
        return _always_zero(dry_run, config)
    if verb == "curate" and arguments.preview is not None:
        from mmedpo_ray.curate.visual.preview import preview

        preflight.announce(verb, config)
        return _always_zero(preview, config, arguments.preview)
    if verb == "serve":
        from mmedpo_ray.serve.endpoint import serve

        preflight.check(verb, config)
        preflight.announce(verb, config)
        return _always_zero(serve, config)
    from mmedpo_ray import pipeline
    from mmedpo_ray.stages import registry

    def run() -> int:
        if verb == "run":
            pipeline.run_all(config)
        else:
            pipeline.run_step(verb, config)
            registry.print_outcome(verb, config)
        return 0

    return run


# What a terminal that knows only ASCII gets in place of the marks that messages are written with.
_PLAIN_MARKS = {
    "→": "->",
    "−": "-",
    "–": "-",
    "×": "x",
    "·": "*",
    "…": "...",
    "²": "2",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
}


def _plain_marks(error: UnicodeError) -> tuple[str, int]:
    """Error handler of an encoder: marks in their ASCII spelling, "?" for other letters."""
    assert isinstance(error, UnicodeEncodeError)
    unknown = error.object[error.start : error.end]
    return "".join(_PLAIN_MARKS.get(letter, "?") for letter in unknown), error.end


def _make_printable() -> None:
    """Lets output lose a letter rather than end a command where the terminal's encoding lacks it."""
    codecs.register_error("mmedpo_plain_marks", _plain_marks)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="mmedpo_plain_marks")


class _Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, with another exit status."""


@contextlib.contextmanager
def _handling(number: signal.Signals, handler: Callable[..., None]) -> Iterator[None]:
    """Handles a signal so; outside the main thread nothing can be changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _stop_loading(*_: object) -> None:
    # No exception: imports swallow one or make another of it. Nothing is written yet.
    os.write(2, b"interrupted before anything was started\n")
    os._exit(130)


def _terminate(*_: object) -> None:
    # A second one does not wait for the end.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    raise _Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 1 where an audit found what it should fail on, or for an error nobody foresaw; 2 for one that the user can mend; 130
        after Ctrl-C, 143 after SIGTERM.
    """
    _make_printable()
    with _handling(signal.SIGINT, _stop_loading):
        arguments = _parse(argv)
        from mmedpo_ray import console, errors

        console.configure(verbose=arguments.verbose)
    try:
        with _handling(signal.SIGINT, _stop_loading):
            command = _command(arguments)
        with _handling(signal.SIGTERM, _terminate):
            return command()
    except SystemExit as error:
        # So Ray takes a SIGTERM while it starts.
        if error.code != signal.SIGTERM:
            raise
        return _interrupted(arguments.verb, 143)
    except KeyboardInterrupt as error:
        return _interrupted(arguments.verb, 143 if isinstance(error, _Terminated) else 130)
    except Exception as error:
        if errors.was_interrupted(error):
            return _interrupted(arguments.verb, 130)
        if arguments.debug:
            raise
        return _failed(error)


def _interrupted(verb: str, status: int) -> int:
    """Says what an interruption leaves; the next Ctrl-C ends the process at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    again = "starts anew" if verb in ("convert", "phantom") else "resumes where it stopped"
    if verb != "serve":
        # Not by the console: its library may be what was being imported.
        sys.stderr.write(f"interrupted; the same command {again}\n")
    return status


def _failed(error: Exception) -> int:
    """Prints the message of an error; returns the exit status."""
    from rich.text import Text

    from mmedpo_ray import errors
    from mmedpo_ray.console import console

    message, status = errors.user_message(error) or errors.system_message(error), 2
    if message is None:
        message, status = errors.unexpected_message(error), 1
    console.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
