"""Settings of a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from pydantic import Field

from mmedpo_ray.settings.base import Section


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
        None, gt=0, description="rate limit over all workers; null: none"
    )
    timeout_s: float = Field(60, gt=0, description="of one request")
    retries: int = Field(
        4, ge=0, description="after rate limits, time-outs and server errors, with growing pauses"
    )
    temperature: float = Field(0.0, ge=0)
    max_tokens: int = Field(256, ge=16)
    usd_per_million_input: float = Field(0.0, ge=0, description="price, for the cost in the manifest")
    usd_per_million_output: float = Field(0.0, ge=0, description="price, for the cost in the manifest")
