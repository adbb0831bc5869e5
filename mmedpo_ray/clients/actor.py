"""How Ray Data runs the client of an endpoint."""

from __future__ import annotations

from typing import Any

# Requests handed to the client together, as a multiple of those in flight: once per batch it waits for the
# slowest.
ROUNDS = 8
_CPUS = 0.25


def actor_resources() -> dict[str, Any]:
    """Keyword arguments of ``map_batches`` for an actor that only waits for the network.

    It prefers the driver's node: a local server runs there, and often it is the only one with a way out.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        return {"num_cpus": _CPUS}
    node = ray.get_runtime_context().get_node_id()
    return {
        "num_cpus": _CPUS,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
    }
