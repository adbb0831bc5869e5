"""The noise schedules of diffusion models: how much signal is left after some steps."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_TOTAL_STEPS = 1000


@lru_cache(maxsize=64)
def signal_share(steps: int, schedule: str) -> float:
    """ξ̄: the share of the signal's variance that is left after ``steps`` of 1,000 diffusion steps, 1 to 0.

    Args:
        steps: 1 to 1,000.
        schedule: ``linear`` (Ho et al. 2020: β from 1e-4 to 0.02), ``sigmoid`` (β from 1e-5 to 5e-3 along a
            sigmoid, the one used with contrastive decoding of LVLMs, arXiv 2311.16922), or ``cosine`` (Nichol
            & Dhariwal 2021).

    Raises:
        ValueError: an argument is out of range.
    """
    if not 1 <= steps <= _TOTAL_STEPS:
        raise ValueError(f"steps must be 1 to {_TOTAL_STEPS}, not {steps}")
    if schedule == "cosine":
        offset = 0.008
        t = np.array([0.0, steps / _TOTAL_STEPS])
        start, now = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
        return float(max(now / start, 0.0))
    if schedule == "linear":
        beta = np.linspace(1e-4, 0.02, _TOTAL_STEPS)
    elif schedule == "sigmoid":
        beta = 1 / (1 + np.exp(-np.linspace(-6, 6, _TOTAL_STEPS))) * (0.5e-2 - 1e-5) + 1e-5
    else:
        raise ValueError(f"unknown schedule {schedule!r}: use sigmoid, linear or cosine")
    return float(np.prod(1 - beta[:steps]))
