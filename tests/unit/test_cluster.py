"""How many workers the nodes of a cluster hold."""

from __future__ import annotations

import pytest

from mmedpo_ray import cluster

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
