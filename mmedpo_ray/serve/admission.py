"""How many requests may wait or run at once, overall and for each API key."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

from mmedpo_ray.serve.request_error import RequestError

# Weight of the latest request in the running mean of their seconds.
_NEWEST = 0.05


class Admission:
    """Counts requests in flight and refuses those beyond the limits.

    Args:
        most: requests in flight overall.
        most_per_key: requests in flight for one key; None: as many as overall.
    """

    def __init__(self, most: int, most_per_key: int | None) -> None:
        self._most = most
        self._most_per_key = most_per_key if most_per_key is not None else most
        self._of_key: Counter[str] = Counter()
        self._mean_s = 1.0
        self.in_flight = 0

    @contextlib.contextmanager
    def enter(self, key: str) -> Iterator[None]:
        """Holds a place for a request of ``key`` while the block runs.

        Raises:
            RequestError: 429 with Retry-After if there is none.
        """
        if self.in_flight >= self._most:
            raise self._refused("the server has too many requests in flight", "queue_full")
        if self._of_key[key] >= self._most_per_key:
            raise self._refused("this key has too many requests in flight", "key_queue_full")
        self.in_flight += 1
        self._of_key[key] += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self.in_flight -= 1
            self._of_key[key] -= 1
            if not self._of_key[key]:
                del self._of_key[key]
            self._mean_s += _NEWEST * (time.monotonic() - started - self._mean_s)

    def _refused(self, message: str, reason: str) -> RequestError:
        # About the time until places are free: that of a request.
        wait = min(60.0, max(1.0, self._mean_s))
        return RequestError(429, f"{message}; try again after Retry-After", reason=reason, retry_after_s=wait)
