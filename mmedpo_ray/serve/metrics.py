"""What Prometheus reads at ``/metrics``: counts and seconds, nothing of a request's content."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class ServeMetrics:
    """The metrics of one ingress.

    Attributes:
        requests: requests that were let in, by kind (chat, completions) and model.
        rejections: refused requests by reason.
        tokens: tokens by model and side (prompt, completion).
        first_token: seconds until the first part of a streamed answer.
        duration: seconds of a whole request.
        images: seconds of decoding the images of a request.
        in_flight: requests in flight.
        engines_up: engines that answer.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mmedpo_requests", "Requests that were let in", ["kind", "model"], registry=registry
        )
        self.rejections = Counter("mmedpo_rejections", "Refused requests", ["reason"], registry=registry)
        self.tokens = Counter("mmedpo_tokens", "Tokens", ["model", "side"], registry=registry)
        self.first_token = _seconds("mmedpo_first_token_seconds", "Until the first streamed part", registry)
        self.duration = _seconds("mmedpo_request_seconds", "Whole requests", registry)
        self.images = _seconds("mmedpo_image_seconds", "Decoding of a request's images", registry)
        self.in_flight = Gauge("mmedpo_requests_in_flight", "Requests in flight", registry=registry)
        self.engines_up = Gauge("mmedpo_engines_up", "Engines that answer", registry=registry)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def _seconds(name: str, meaning: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, meaning, buckets=_SECONDS, registry=registry)
