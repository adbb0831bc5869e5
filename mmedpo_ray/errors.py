"""The two kinds of failure a user meets."""

from __future__ import annotations

import re


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do.

    The command line prints the message alone (the traceback comes with ``--debug``) and exits with 2.
    """


class DroppedShareError(UserError):
    """More rows of a station were dropped than its configuration allows."""


# How the remote traceback, which Ray hands over as text only, ends when a task raised one of the above.
_REMOTE = re.compile(
    rf"^{re.escape(__name__)}\.(?:UserError|DroppedShareError): (.+?)(?=\n\n|\nray\.|\Z)",
    re.MULTILINE | re.DOTALL,
)


def user_message(error: BaseException) -> str | None:
    """The message of the :class:`UserError` behind ``error``, also one raised in a Ray task; ``None`` if there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError) and type(seen).__module__ == __name__:
            return str(seen)
        seen = getattr(seen, "cause", None) or seen.__cause__
    found = _REMOTE.findall(str(error))
    return found[0].strip() if found else None
