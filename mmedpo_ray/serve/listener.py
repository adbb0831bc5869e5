"""The ingress's own HTTP server: clients reach it without Serve's proxy in between."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

_BACKLOG = 2048
_KEEP_ALIVE_S = 90


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's signals belong to Ray."""
        yield


def listen(app: ASGIApp, host: str, port: int) -> asyncio.Task[None]:
    """Serves an application at an address, in the running event loop, as long as the task is kept.

    Args:
        app: the application.
        host: address to listen on.
        port: a free port.

    Raises:
        OSError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        app,
        lifespan="off",
        access_log=False,
        log_config=None,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    return asyncio.get_running_loop().create_task(_Server(config).serve(sockets=[listener]))
