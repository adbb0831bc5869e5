"""Shared fixtures: nothing leaves the machine, real data where it is at hand, one Ray cluster a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Before Ray, vLLM or transformers are imported by any test.
for _key, _value in {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    # Ray Train prints a table of every worker otherwise.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    # Ray's workers otherwise get a thirtieth of a core on which anything else runs, other tests for instance.
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
