"""The asynchronous client of OpenAI-compatible endpoints: requests in parallel, paced, retried, counted."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from itertools import islice
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from mmedpo_ray.clients.usage import Usage
from mmedpo_ray.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# What an error message may repeat of an answer: an identifier, never a sentence, which could hold an answer
# sent.
_IDENTIFIER = re.compile(r"[\w.\-]{1,60}")


class Limits(Protocol):
    """The settings of an endpoint that every client needs."""

    concurrency: int
    timeout_s: float
    retries: int


class HttpClient:
    """Sends requests to one endpoint; the ``openai`` package does the protocol and the retries.

    Args:
        base_url: address up to ``/v1``; None: OpenAI's own.
        key: the endpoint's key.
        limits: most requests in flight, longest silence of one try in seconds, tries after the first one
            (with growing pauses or the endpoint's ``Retry-After``).
        requests_per_minute: most tries that start per minute; None: any number.

    Raises:
        UserError: the environment names a proxy that cannot be used.
    """

    def __init__(
        self, base_url: str | None, key: str, limits: Limits, requests_per_minute: float | None = None
    ) -> None:
        import openai

        self.usage = Usage()
        self._concurrency = limits.concurrency
        self._gap = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next_start = time.monotonic()
        self._openai = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key,
            timeout=limits.timeout_s,
            max_retries=limits.retries,
            # Every try passes the hook, so retries are paced and counted too.
            http_client=async_client(base_url, event_hooks={"request": [self._before_try]}),
        )

    async def model_names(self) -> list[str]:
        """Names of the models that the endpoint offers; raises the errors of ``openai``."""
        return [model.id async for model in self._openai.models.list()]

    async def chat(self, **arguments: Any) -> bytes:
        """The body of the answer to a chat request, unparsed; raises the errors of ``openai``."""
        response = await self._openai.chat.completions.with_raw_response.create(**arguments)
        return response.content

    async def as_completed(
        self, work: Callable[[Item], Awaitable[Result]], items: Iterable[Item]
    ) -> AsyncIterator[Result]:
        """Results as they become ready, at most ``concurrency`` at work; the first error cancels the rest."""
        todo = iter(items)
        running: set[asyncio.Task[Result]] = set()
        try:
            while True:
                starts = islice(todo, self._concurrency - len(running))
                running |= {asyncio.ensure_future(work(item)) for item in starts}
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    result = task.result()
                    running.remove(task)
                    yield result
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def close(self) -> None:
        """Closes the connections."""
        await self._openai.close()

    async def _before_try(self, request: Any) -> None:
        """Waits until the next try may start, so that starts are spread evenly, and counts it."""
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + self._gap
        if start > now:
            await asyncio.sleep(start - now)
        self.usage.requests += 1
        self.usage.retries += request.headers.get("x-stainless-retry-count", "0") != "0"


def async_client(base_url: str | None, **options: Any) -> Any:
    """An ``httpx.AsyncClient`` as the ``openai`` package makes its own.

    The environment's proxies (``http_proxy``, ``ALL_PROXY``, …) are used for an endpoint on another machine,
    as ``no_proxy`` allows. An endpoint on this machine is asked directly: a proxy would look for it on its
    own machine.

    Args:
        base_url: of the endpoint; None: OpenAI's own.
        **options: of ``httpx.AsyncClient``, such as ``event_hooks``.

    Raises:
        UserError: the environment names a proxy that cannot be used.
    """
    from openai import DefaultAsyncHttpxClient

    try:
        return DefaultAsyncHttpxClient(trust_env=not is_loopback(base_url or ""), **options)
    except (ImportError, ValueError) as error:
        # httpx needs another package for SOCKS proxies, and refuses schemes that it does not know.
        raise UserError(
            f"{base_url or 'the endpoint'} cannot be asked through the proxy that the environment names "
            f"(http_proxy, https_proxy, ALL_PROXY): {type(error).__name__}. For a SOCKS proxy run `pip "
            "install httpx[socks]`; to use no proxy, unset the variable or add the host to no_proxy."
        ) from error


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own: localhost, 127.0.0.0/8, ::1 or 0.0.0.0."""
    host = (urlsplit(url).hostname or "").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # ::ffff:127.0.0.1 is 127.0.0.1 in an IPv6 address.
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def error_code(error: Any) -> str:
    """The code or type in the body of an ``openai.APIStatusError``; its message may repeat the request."""
    body = error.body if isinstance(error.body, dict) else {}
    return as_identifier(body.get("code")) or as_identifier(body.get("type"))


def as_identifier(value: Any) -> str:
    """The value if it is a short identifier, which may be shown; "" otherwise."""
    return value if isinstance(value, str) and _IDENTIFIER.fullmatch(value) else ""
