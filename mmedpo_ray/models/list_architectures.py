"""The `models` command: which architectures are supported, and what each can do."""

from __future__ import annotations

import sys

from mmedpo_ray.models.architectures import ARCHITECTURES
from mmedpo_ray.models.architectures.base import Architecture


def abilities(architecture: Architecture) -> str:
    """What can be done with an architecture, in words."""
    adapters = "served with adapters" if architecture.serves_adapters else "served merged only"
    on_cpu = "exact" if architecture.exact_on_cpu else "another model"
    return f"trained on packed trees; {adapters}; vLLM on CPU: {on_cpu}"


def models_command() -> int:
    """Prints a line for each ``model_type``; returns the exit status."""
    width = max(map(len, ARCHITECTURES))
    for kind in sorted(ARCHITECTURES):
        architecture: Architecture = ARCHITECTURES[kind]()
        sys.stdout.write(f"{kind:{width}}  {architecture.title}: {abilities(architecture)}\n")
    return 0
