"""How many requests may wait or run at once, overall and for each API key, and how many bytes they hold."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator

from mmedpo_ray.serve.request_error import RequestError

# Weight of the latest request in the running mean of their seconds.
_NEWEST = 0.05
_MIB = 2**20
_POLL_S = 0.05
# Until another server may answer at this address.
_STOP_S = 5.0


class Admission:
    """Counts requests in flight and refuses those beyond the limits.

    Args:
        most: requests in flight overall.
        most_per_key: requests in flight for one key; None: as many as overall.
        most_mib: MiB of all bodies in flight.
    """

    def __init__(self, most: int, most_per_key: int | None, most_mib: float) -> None:
        self._most = most
        self._most_per_key = most_per_key if most_per_key is not None else most
        self._most_bytes = int(most_mib * _MIB)
        self._of_key: Counter[str] = Counter()
        self._mean_s = 1.0
        self.in_flight = 0
        self.held_bytes = 0
        self.is_closed = False

    @contextlib.contextmanager
    def enter(self, key: str) -> Iterator[Place]:
        """Holds a place for a request of ``key`` while the block runs.

        Raises:
            RequestError: 429 with Retry-After if there is none; 503 once the server stops.
        """
        if self.is_closed:
            raise RequestError(503, "the server stops", reason="draining", retry_after_s=_STOP_S)
        if self.in_flight >= self._most:
            raise self.refused("the server has too many requests in flight", "queue_full")
        if self._of_key[key] >= self._most_per_key:
            raise self.refused("this key has too many requests in flight", "key_queue_full")
        self.in_flight += 1
        self._of_key[key] += 1
        started = time.monotonic()
        place = Place(self)
        try:
            yield place
        finally:
            self.held_bytes -= place.size
            self.in_flight -= 1
            self._of_key[key] -= 1
            if not self._of_key[key]:
                del self._of_key[key]
            self._mean_s += _NEWEST * (time.monotonic() - started - self._mean_s)

    async def drain(self, timeout_s: float) -> int:
        """Lets no request in any more, and waits for those in flight; returns how many are left."""
        self.is_closed = True
        deadline = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        return self.in_flight

    def has_room(self, size: int) -> bool:
        """Whether so many more bytes fit."""
        return self.held_bytes + size <= self._most_bytes

    def refused(self, message: str, reason: str) -> RequestError:
        """A 429 that says when to try again."""
        # About the time until places are free: that of a request.
        wait = min(60.0, max(1.0, self._mean_s))
        return RequestError(429, f"{message}; try again after Retry-After", reason=reason, retry_after_s=wait)


class Place:
    """The place of one request in the queue.

    Attributes:
        size: bytes that the request holds.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.size = 0

    def hold(self, size: int) -> None:
        """Says that the request holds ``size`` bytes, or more already.

        Raises:
            RequestError: 429, all requests together hold too many.
        """
        more = size - self.size
        if more <= 0:
            return
        if not self._admission.has_room(more):
            raise self._admission.refused("the server holds too many large requests", "memory_full")
        self._admission.held_bytes += more
        self.size = size
