"""What requests to an endpoint cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from mmedpo_ray.clients.settings import EndpointConfig


@dataclass
class Usage:
    """What a client sent and was charged for.

    Attributes:
        requests: HTTP requests sent, retries included.
        retries: those of them that repeat another.
        input_tokens: as the endpoint counts, of all answers, unusable ones included.
        output_tokens: the same.
    """

    requests: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    @classmethod
    def of(cls, figures: dict[str, Any]) -> Usage:
        """The counters in the result of :meth:`figures`."""
        return cls(**{item.name: figures.get(item.name, 0) for item in fields(cls)})

    def figures(self, settings: EndpointConfig) -> dict[str, Any]:
        """For a manifest: the counters, the model, and the cost at the configured prices in US dollars."""
        cost = (
            self.input_tokens * settings.usd_per_million_input
            + self.output_tokens * settings.usd_per_million_output
        ) / 1e6
        return {"model": settings.model, **asdict(self), "cost_usd": round(cost, 6)}
