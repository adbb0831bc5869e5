"""Settings of a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmedpo_ray.config.base import Section


class EndpointConfig(Section):
    """A chat model behind an OpenAI-compatible endpoint: a hosted one, or a local vLLM server."""

    base_url: str | None = Field(
        None, description="address up to /v1; null: OPENAI_BASE_URL, else OpenAI's own"
    )
    model: str = Field("gpt-4o", description="model name the endpoint knows")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key; never write a key here"
    )
    concurrency: int = Field(16, ge=1, description="requests in flight")
    requests_per_minute: float | None = Field(
        None, gt=0, description="rate limit over all workers, retries included; null: none"
    )
    timeout_s: float = Field(60, gt=0, description="longest silence of one try of a request")
    retries: int = Field(
        4,
        ge=0,
        description="after rate limits, time-outs and server errors, with growing pauses or the endpoint's "
        "Retry-After",
    )
    temperature: float | None = Field(0.0, ge=0, description="null: not sent, for models that refuse it")
    max_tokens: int = Field(
        1024,
        ge=16,
        description="longest answer in tokens; a rewrite repeats the reference, so room for twice that",
    )
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="name of that limit; OpenAI's reasoning models want max_completion_tokens"
    )
    usd_per_million_input: float = Field(0.0, ge=0, description="price, for the cost in the manifest")
    usd_per_million_output: float = Field(0.0, ge=0, description="price, for the cost in the manifest")
