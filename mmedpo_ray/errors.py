"""The two kinds of failure a user meets."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """Something the user can correct: the message says what is wrong, where, and what to do.

    The command line prints the message alone (the traceback comes with ``--debug``) and exits with 2.
    """


class DroppedShareError(UserError):
    """More rows of a stage were dropped than its configuration allows."""


# How the remote traceback, which Ray hands over as text only, ends when a task raised one of the above.
_REMOTE = re.compile(
    rf"^{re.escape(__name__)}\.(?:UserError|DroppedShareError): (.+?)(?=\n\n|\nray\.|\Z)",
    re.MULTILINE | re.DOTALL,
)


def user_message(error: BaseException) -> str | None:
    """The message of the :class:`UserError` behind ``error``, also from a Ray task; else None."""
    for seen in _causes(error):
        if isinstance(seen, UserError) and type(seen).__module__ == __name__:
            return str(seen)
    found = _REMOTE.findall(str(error))
    return found[0].strip() if found else None


def system_message(error: BaseException) -> str | None:
    """The path and reason of an operating system error, also from a Ray task; else None."""
    for seen in _causes(error):
        # An error of Ray's that stands for a task's has the class of that one, and all of the remote
        # traceback as its text.
        if isinstance(seen, OSError) and not hasattr(seen, "cause"):
            what = " ".join(str(seen).split())[:500]
            named = f"{seen.filename}: {seen.strerror}" if seen.filename is not None else what
            return (
                f"{named or type(seen).__name__}. Check that the path is right, that you may use it, and "
                "that its disk has room; then the same command goes on. --debug shows the traceback."
            )
    return None


def unexpected_message(error: BaseException) -> str:
    """Describes an unexpected error; its traceback goes to a file that only the user can read.

    The error's own text stays in that file: it may quote the data.
    """
    innermost = list(_causes(error))[-1]
    ours = [
        frame for frame in traceback.extract_tb(innermost.__traceback__) if "mmedpo_ray" in frame.filename
    ]
    place = f" in {os.path.basename(ours[-1].filename)}, line {ours[-1].lineno}" if ours else ""  # noqa: PTH119
    where = "--debug shows the traceback"
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", prefix="mmedpo-", suffix=".log", delete=False) as file:
            file.write("".join(traceback.format_exception(error)))
        where = f"the traceback is in {file.name}, which may quote your data"
    return (
        f"unexpected {type(innermost).__name__}{place}; {where}. What is finished stays: the same command "
        "goes on. If it fails again, report it."
    )


def was_interrupted(error: BaseException) -> bool:
    """Whether a Ctrl-C caused ``error``: libraries wrap one that interrupts their imports or tasks."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen is not None


def first_line(error: BaseException) -> str:
    """The first line of an error's text without a full stop; its class if it has no text."""
    return str(error).strip().split("\n", 1)[0].rstrip(".") or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those it was raised from, the outermost first."""
    seen: Any = error
    while isinstance(seen, BaseException):
        yield seen
        seen = getattr(seen, "cause", None) or seen.__cause__
