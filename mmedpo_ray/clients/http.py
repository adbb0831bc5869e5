"""The HTTP client of every OpenAI-compatible endpoint: proxies are for other machines, never for this one."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from mmedpo_ray.errors import UserError


def async_client(base_url: str | None, **options: Any) -> Any:
    """An ``httpx.AsyncClient`` as the ``openai`` package makes its own.

    The environment's proxies (``http_proxy``, ``ALL_PROXY``, …) are used for an endpoint elsewhere, as ``no_proxy`` allows. One on
    this machine is always asked directly: a proxy would look for it on its own machine.

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
        # httpx speaks to SOCKS proxies with a package of its own, and refuses schemes that it does not know.
        raise UserError(
            f"{base_url or 'the endpoint'} cannot be asked through the proxy that the environment names (http_proxy, https_proxy, ALL_PROXY): "
            f"{type(error).__name__}. For a SOCKS proxy run `pip install httpx[socks]`; to do without, unset the variable or "
            "add the host to no_proxy."
        ) from error


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own: localhost, 127.0.0.0/8, ::1, or any of its addresses (0.0.0.0)."""
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
