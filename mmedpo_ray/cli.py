"""The ``mmedpo`` command: runs a command, handles signals, and prints errors."""

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

# Nothing slow is imported here: a Ctrl-C can be answered only once `main` runs.
from mmedpo_ray.commands.parser import build_parser

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command whose options and key=value settings come in any order."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-") or "=" not in item]
    if unknown or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        arguments.overrides += rest
    if arguments.command == "evaluate" and arguments.answers is None and (arguments.json or arguments.rows):
        parser.error(
            "--json and --rows need --answers FILE; the scores of a run are in evaluate/summary.json"
        )
    if getattr(arguments, "table", None) and _OVERRIDE.match(arguments.table):
        # The first positional argument of `audit` may be a setting.
        arguments.overrides.insert(0, arguments.table)
        arguments.table = None
    return arguments


# ASCII spellings of the characters in messages, for terminals without UTF-8.
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
    """Error handler of an encoder: replaces a character by its ASCII spelling, or by "?"."""
    assert isinstance(error, UnicodeEncodeError)
    unknown = error.object[error.start : error.end]
    return "".join(_PLAIN_MARKS.get(letter, "?") for letter in unknown), error.end


def _make_printable() -> None:
    """Keeps a command from failing because the terminal's encoding lacks a character of its output."""
    codecs.register_error("mmedpo_plain_marks", _plain_marks)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="mmedpo_plain_marks")


class _Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, with another exit status."""


@contextlib.contextmanager
def _handling(number: signal.Signals, handler: Callable[..., None]) -> Iterator[None]:
    """Sets a signal handler for the block; only the main thread can, others do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _stop_loading(*_: object) -> None:
    # Not by an exception: imports may swallow or replace it. Nothing is written yet.
    os.write(2, b"interrupted before anything was started\n")
    os._exit(130)


def _terminate(*_: object) -> None:
    # A second SIGTERM ends the process at once.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    raise _Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0; 1 if an audit found what it should fail on, or for an unexpected error; 2 for an
        error that the user can correct; 130 after Ctrl-C; 143 after SIGTERM.
    """
    _make_printable()
    with _handling(signal.SIGINT, _stop_loading):
        arguments = _parse(argv)
        from mmedpo_ray import console, errors

        console.configure(verbose=arguments.verbose)
    try:
        with _handling(signal.SIGINT, _stop_loading):
            command = arguments.start(arguments)
        with _handling(signal.SIGTERM, _terminate):
            return command()
    except SystemExit as error:
        # Ray exits like this if it receives SIGTERM while it starts.
        if error.code != signal.SIGTERM:
            raise
        return _interrupted(arguments.command, 143)
    except KeyboardInterrupt as error:
        return _interrupted(arguments.command, 143 if isinstance(error, _Terminated) else 130)
    except Exception as error:
        if errors.was_interrupted(error):
            return _interrupted(arguments.command, 130)
        if arguments.debug:
            raise
        return _failed(error)


def _interrupted(command: str, status: int) -> int:
    """Prints what to do after an interruption; the next Ctrl-C ends the process at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    again = "starts again" if command in ("convert", "phantom") else "resumes where it stopped"
    if command != "serve":
        # Not through rich: it may be the library that was being imported.
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
