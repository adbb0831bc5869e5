"""Settings of `serve`."""

from __future__ import annotations

from pydantic import Field

from mmedpo_ray.config.base import Section


class ServeConfig(Section):
    """The OpenAI-compatible endpoint (Ray Serve + vLLM)."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    models: tuple[str, ...] | None = Field(
        None, description="names of the run's models to serve; null: all (merged models have an engine each)"
    )
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: int = Field(
        32, ge=1, description="requests in flight per replica before another is started"
    )
    max_ongoing_requests: int = Field(128, ge=1)
    start_timeout_s: float = Field(600, gt=0)
