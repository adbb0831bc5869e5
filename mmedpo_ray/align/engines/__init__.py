"""Optimizer steps: plain data parallelism, and DeepSpeed ZeRO."""

from __future__ import annotations

from mmedpo_ray.align.engines.base import Engine
from mmedpo_ray.align.policy import Policy, TrainingSpec


def make_engine(policy: Policy, spec: TrainingSpec) -> Engine:
    """The engine of ``align.strategy``."""
    if spec.align.strategy == "ddp":
        from mmedpo_ray.align.engines.ddp import DdpEngine

        return DdpEngine(policy, spec)
    from mmedpo_ray.align.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(policy, spec)
