"""A cluster as a user starts it: `ray start --head`, with token authentication."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def head_node(**variables: str) -> Iterator[dict[str, str]]:
    """A head node whose servers want a token; yields the environment of a client, with ``RAY_ADDRESS``.

    ``variables``: further ones of the node's environment.
    """
    # A short path: Ray's sockets lie under it, and their addresses may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="mmedpo"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    dashboard, gcs = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    head = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}",
         "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder / 'ray'}",
         f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
         "--node-ip-address=127.0.0.1"],
        env=environment | variables, stdout=(folder / "head.log").open("w"), stderr=subprocess.STDOUT,
        start_new_session=True, cwd=folder,
    )  # fmt: skip
    try:
        _wait_for_port(dashboard, head, folder / "head.log")
        yield environment | {
            "RAY_ADDRESS": f"127.0.0.1:{gcs}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
    finally:
        head.terminate()
        try:
            head.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, 9)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_port(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"ray start ended with {process.returncode}: {log.read_text()[-2000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"the job server did not come up: {log.read_text()[-2000:]}")
