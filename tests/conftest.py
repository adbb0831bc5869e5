"""Shared fixtures: no network, real data if it is there, one Ray cluster per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# The time of an example depends on the load of the machine, so there is no deadline. CI repeats the same
# examples.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Before Ray, vLLM or transformers are imported by any test.
for _key, _value in {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    # Without this Ray Train prints a table of every worker.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    # By default Ray's workers get a thirtieth of a core that anything else uses, such as other tests.
    "RAY_worker_niceness": "0",
    # Otherwise Ray Train looks after its workers every two seconds, and waits half a minute for one that
    # hangs.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}.items():
    os.environ.setdefault(_key, _value)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Small real samples kept outside the project."""
    folder = Path(os.environ.get("MMEDPO_SHARED", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set MMEDPO_SHARED to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster, shut down at the end."""
    import ray

    from mmedpo_ray.compat import cluster
    from mmedpo_ray.config.tree import RayConfig

    os.environ.pop("RAY_ADDRESS", None)
    cluster.start(RayConfig())
    yield
    ray.shutdown()
