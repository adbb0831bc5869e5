"""How many workers the nodes of a cluster hold."""

from __future__ import annotations

from typing import Any

import pytest

from mmedpo_ray.compat import cluster
from mmedpo_ray.config.tree import RayConfig

NODES = [
    {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}},
    {"Alive": True, "Resources": {"CPU": 1.0, "GPU": 4.0}},
    {"Alive": True, "Resources": {"CPU": 0.3}},
    {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


@pytest.mark.parametrize(
    ("resources", "room"),
    [
        ({"CPU": 1.0}, 9),
        ({"CPU": 0.1}, 93),
        ({"CPU": 8.0}, 1),
        ({"CPU": 9.0}, 0),  # 9.3 CPUs in all, but a worker lives on one node
        ({"CPU": 1.0, "GPU": 1.0}, 3),
        ({"CPU": 4.0, "GPU": 1.0}, 2),
    ],
)
def test_a_worker_fits_on_one_living_node(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], room: int
) -> None:
    monkeypatch.setattr(cluster.ray, "nodes", lambda: NODES)
    assert cluster.room_for(resources) == room


@pytest.mark.parametrize(
    ("address", "environment"),
    [
        ("10.0.0.7:6379", {"RAY_ADDRESS": "10.0.0.7:6379"}),
        ("ray://head:10001", {}),
        ("auto", {}),
    ],
)
def test_workers_know_the_cluster_that_the_driver_joined(
    monkeypatch: pytest.MonkeyPatch, address: str, environment: dict[str, str]
) -> None:
    options: dict[str, Any] = {}
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **given: options.update(given))
    monkeypatch.setattr(cluster, "_check_reachable", lambda address: None)
    monkeypatch.setattr(cluster, "_WORKER_ENVIRONMENT", ())
    cluster.start(RayConfig(address=address))
    assert (options["runtime_env"] or {}).get("env_vars", {}) == environment
