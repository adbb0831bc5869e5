"""The `models` command: which architectures are supported, and what each can do."""

from __future__ import annotations

from rich.table import Table

from mmedpo_ray.console import console
from mmedpo_ray.models.architectures import ARCHITECTURES
from mmedpo_ray.models.architectures.base import Architecture


def abilities(architecture: Architecture) -> dict[str, bool]:
    """What can be done with an architecture, by column of the table."""
    return {
        "trained on packed trees": True,
        "served": True,
        "adapters served": architecture.serves_adapters,
        "exact in vLLM on CPU": architecture.exact_on_cpu,
    }


def models_command() -> int:
    """Prints the table; returns the exit status."""
    known = {kind: ARCHITECTURES[kind]() for kind in sorted(ARCHITECTURES)}
    table = Table("model_type", "models", *abilities(next(iter(known.values()))))
    for kind, architecture in known.items():
        marks = ["yes" if can else "no" for can in abilities(architecture).values()]
        table.add_row(kind, architecture.title, *marks)
    console.print(table)
    console.print("Supported is a model whose config.json has one of these as model_type.")
    return 0
