"""Settings of `serve`, `evaluate` and `report`."""

from __future__ import annotations

from pydantic import Field

from mmedpo_ray.settings.base import Section


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


class EvaluateConfig(Section):
    """endpoint + samples → answers and scores."""

    endpoint: str | None = Field(
        None, description="base URL (…/v1) of a running endpoint; null: one is started for the run"
    )
    aligned_name: str = Field("aligned", description="name under which the aligned model is served")
    max_samples: int | None = Field(
        None, ge=1, description="evaluate a seeded sample of the test images' questions"
    )
    concurrency: int = Field(32, ge=1, description="requests in flight")
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)
    timeout_s: float = Field(120, gt=0)
    retries: int = Field(3, ge=0)
    bootstrap: int = Field(2000, ge=100, description="resamples of images for the intervals")
    confidence: float = Field(0.95, gt=0.5, lt=1)


class ReportConfig(Section):
    """report.html."""

    gallery: int = Field(6, ge=0, description="examples shown of each kind of pair")
    show_text: bool = Field(
        True, description="show questions, answers and images; set false for identifiable data"
    )
