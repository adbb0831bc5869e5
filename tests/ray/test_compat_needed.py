"""What the changes to Ray and vLLM are for still happens without them."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHUTDOWN = """
import logging, time
import ray
from ray import serve
options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
ray.init(address="local", num_cpus=2, **options)
serve.start(proxy_location="Disabled")
serve.run(serve.deployment(type("Empty", (), {})).bind(), route_prefix=None)
serve.shutdown()
time.sleep(2)
"""

SPAWN = """
import os
from vllm.utils import system_utils
system_utils.is_in_ray_actor = lambda: True
import ray
ray.get_runtime_context = lambda: type("Context", (), {"gcs_address": "127.0.0.1:1"})
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
print("METHOD", system_utils.get_mp_context().get_start_method())
"""


def output_of(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_ray_still_reports_the_shutdown_of_serve_as_a_failure() -> None:
    assert "ServeController.graceful_shutdown failed" in output_of(SHUTDOWN)


@pytest.mark.engine
def test_vllm_still_starts_new_interpreters_in_a_ray_actor() -> None:
    assert "METHOD spawn" in output_of(SPAWN)
