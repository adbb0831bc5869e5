"""What Ray Data knows of the cluster's CPUs when a dataset begins."""

from __future__ import annotations

import uuid

import ray
from ray.data._internal.cluster_autoscaler import DefaultAutoscalingCoordinator


def test_a_dataset_knows_the_clusters_cpus_from_its_first_question(ray_cluster: None) -> None:
    """Without an answer Ray Data would run a single task until it asks again, a second later."""
    # The actor that answers is started by the first dataset of a cluster.
    ray.data.range(1).materialize()
    coordinator = DefaultAutoscalingCoordinator(f"data-{uuid.uuid4().hex}")
    coordinator.request_resources([], 60, request_remaining=["CPU", "GPU", "memory", "object_store_memory"])
    try:
        reserved = coordinator.get_reserved_resources()
    finally:
        coordinator.cancel_request()
    assert sum(node.get("CPU", 0) for node in reserved.values()) == ray.cluster_resources()["CPU"]
