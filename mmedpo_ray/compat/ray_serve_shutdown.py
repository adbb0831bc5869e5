"""Ray 2.60: a driver that shuts Serve down prints that the controller died; no setting prevents it.

Serve kills the controller while its ``graceful_shutdown`` call is running, and the ``listen_for_change`` of a
driver that holds a handle, so Ray reports these calls as failed. Ray's listener for errors
(``ray._private.worker.listen_error_messages``) prints the reports on the driver's output.
"""

from __future__ import annotations

from typing import Any

from ray._private import worker

_CALLS = ("ServeController.graceful_shutdown", "ServeController.listen_for_change")


def install() -> None:
    """Makes Ray's listener leave these reports out. Does nothing a second time."""
    show = worker.print_to_stdstream
    if hasattr(show, "leaves_out"):
        return

    def show_others(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
        if not any(call in line for call in _CALLS for line in data["lines"]):
            show(data, *arguments, **options)

    show_others.leaves_out = _CALLS  # type: ignore[attr-defined]
    worker.print_to_stdstream = show_others
