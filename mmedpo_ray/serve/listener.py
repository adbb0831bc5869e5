"""The ingress's own HTTP server: clients reach it without Serve's proxy in between."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import cast

import uvicorn
from starlette.types import ASGIApp

_BACKLOG = 2048
_KEEP_ALIVE_S = 90


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's signals belong to Ray."""
        yield


class Listener:
    """Serves an application at an address as long as the process lives. Must be made in a running event loop.

    Args:
        app: the application.
        host: address to listen on.
        port: a free port.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_config=None,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        self._server = _Server(config)
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))

    @property
    def port(self) -> int:
        """Where it listens."""
        return cast(int, self._socket.getsockname()[1])
