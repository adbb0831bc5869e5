"""Settings of `serve`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mmedpo_ray.config.base import Section


class ServeConfig(Section):
    """The OpenAI-compatible endpoint (Ray Serve + vLLM)."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; other machines reach 0.0.0.0, which needs API keys"
    )
    port: int = Field(8000, ge=0, le=65535, description="0: any free port")
    http: Literal["direct", "proxy"] = Field(
        "direct",
        description="clients reach the ingress itself, which halves the CPU time per request, or a proxy of "
        "Ray Serve, behind which several applications share a port and an ingress that dies is waited for",
    )
    route_prefix: str = Field(
        "/",
        pattern=r"^/[A-Za-z0-9_-]*$",
        description="names the endpoint: one with another prefix starts beside the first on the same "
        "cluster. With serve.http=proxy also the path before /v1",
    )
    models: tuple[str, ...] | None = Field(
        None, description="names of the run's models to serve; null: all (merged models have an engine each)"
    )
    min_replicas: int = Field(
        1, ge=0, description="0: the engine stops when nobody asks; the next start is cold"
    )
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: int = Field(
        32, ge=1, description="requests in flight per replica before another is started"
    )
    upscale_delay_s: float = Field(
        10, ge=0, description="seconds above the target before a replica is started"
    )
    downscale_delay_s: float = Field(
        60, ge=0, description="seconds below the target before a replica is stopped (Ray's default is 600)"
    )
    max_ongoing_requests: int = Field(
        2048, ge=1, description="requests in flight per replica; vLLM itself decides how many run at once"
    )
    router: Literal["image", "power_of_two"] = Field(
        "image",
        description="which of several replicas gets a request: that which had the image before (its prefix "
        "cache has the image's tokens), or the less busy of two at random",
    )
    start_timeout_s: float = Field(600, gt=0)
    drain_timeout_s: float = Field(
        30, gt=0, description="longest time that an engine or endpoint that stops goes on with its requests"
    )
    api_keys_file: str | None = Field(
        None,
        description="file with one API key per line; the variable MMEDPO_API_KEYS adds keys (commas between "
        "them). Without keys only this machine may ask",
    )
    allowed_hosts: tuple[str, ...] = Field(
        (), description="further names of this server in the Host header, besides its own and addresses"
    )
    allowed_origins: tuple[str, ...] = Field(
        (), description="web pages that may send requests, such as https://viewer.hospital.example"
    )
    allowed_image_hosts: tuple[str, ...] = Field(
        (), description="public hosts from which images may be fetched over HTTPS; by default only data URLs"
    )
    votes_folder: str | None = Field(
        None, description="where the page writes readers' votes; null: votes/ of the run. Empty: no votes"
    )
    heat_map: str | None = Field(
        None,
        description="visual tool whose heat map the page can lay over an image: self_attention, medklip, "
        "text_prompted, or a tool of another package (settings: curate.visual)",
    )
    image_timeout_s: float = Field(10, gt=0, description="longest time to fetch or to decode an image")
    image_workers: int = Field(2, ge=1, description="processes that decode large and rare images")
    max_image_mib: float = Field(32, gt=0, description="largest image file of a request")
    max_image_pixels: int = Field(
        40_000_000, ge=1, description="largest image of a request; data.max_pixels where that is less"
    )
    max_images: int = Field(1, ge=0, description="images of a request; engines reserve memory for so many")
    max_body_mib: float = Field(64, gt=0, description="largest body of a request")
    max_pending_mib: float = Field(1024, gt=0, description="bodies of all requests in flight")
    body_timeout_s: float = Field(30, gt=0, description="longest time for a body to arrive")
    request_timeout_s: float = Field(600, gt=0, description="longest time for an answer")
    max_prompt_chars: int = Field(100_000, ge=1, description="characters of all texts of a request")
    max_output_tokens: int = Field(4096, ge=1, description="largest max_tokens of a request")
    max_samples: int = Field(8, ge=1, description="answers of a request (n times prompts)")
    max_schema_kib: int = Field(32, ge=1, description="largest JSON schema of an answer")
    max_schema_depth: int = Field(16, ge=1, description="levels of a JSON schema")
    max_queue: int = Field(2048, ge=1, description="requests in flight; more get 429 with Retry-After")
    max_queue_per_key: int | None = Field(
        None, ge=1, description="requests in flight for one API key; null: as many as overall"
    )

    @property
    def app_name(self) -> str:
        """Name of the Serve application."""
        return "mmedpo" if self.route_prefix == "/" else f"mmedpo-{self.route_prefix[1:]}"

    @model_validator(mode="after")
    def _combinations(self) -> ServeConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError("serve.max_replicas is below serve.min_replicas")
        if self.max_pending_mib < self.max_body_mib:
            raise ValueError("serve.max_pending_mib is below serve.max_body_mib")
        return self
