"""Settings of `evaluate`."""

from __future__ import annotations

from pydantic import Field

from mmedpo_ray.config.base import Section


class EvaluateConfig(Section):
    """endpoint + samples → answers and scores."""

    endpoint: str | None = Field(
        None, description="base URL (…/v1) of a running endpoint; null: one is started for the run"
    )
    aligned_name: str = Field("aligned", description="name under which the aligned model is served")
    max_samples: int | None = Field(
        None, ge=1, description="evaluate a seeded sample of the test images' questions"
    )
    look: bool = Field(
        False,
        description="ask every closed and open question again about a blank image, another image of the set, "
        "and (where the sample has a lesion mask) a lesion-noised one (curate.visual.noise)",
    )
    concurrency: int = Field(32, ge=1, description="requests in flight")
    max_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)
    timeout_s: float = Field(120, gt=0)
    retries: int = Field(3, ge=0)
    bootstrap: int = Field(2000, ge=100, description="resamples of images for the intervals")
    confidence: float = Field(0.95, gt=0.5, lt=1)
