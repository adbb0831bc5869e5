"""Object stores on this machine, for tests that read and write a bucket: moto's S3 server and an emulator of
GCS."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Literal

from pyarrow import fs

_SECONDS = 120
_MODULES = {
    "s3": "moto.server -H 127.0.0.1 -p {port}",
    "gs": "gcp_storage_emulator start --host=127.0.0.1 --port={port}",
}


@contextlib.contextmanager
def running(bucket: str, kind: Literal["s3", "gs"] = "s3") -> Iterator[str]:
    """Starts a server and makes an empty bucket.

    This process and those it starts find the server through their environment.

    Yields:
        The bucket's address.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = _MODULES[kind].format(port=port).split()
    if kind == "gs":
        options += ["--in-memory", f"--default-bucket={bucket}"]
    server = subprocess.Popen(
        [sys.executable, "-m", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    endpoint = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL" if kind == "s3" else "CLOUD_STORAGE_EMULATOR_ENDPOINT": endpoint,
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        _wait(server, port)
        if kind == "s3":
            fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir(bucket)
        yield f"s3://{bucket}" if kind == "s3" else f"gs://anonymous@{bucket}"
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        server.terminate()
        server.wait()


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise RuntimeError("the server did not start")
