"""Fetches images from the hosts that ``serve.allowed_image_hosts`` names: HTTPS, public addresses only."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

import httpx

from mmedpo_ray.serve.request_error import RequestError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# IPv6 addresses that stand for an IPv4 address behind a translator (RFC 6052) or a tunnel (RFC 3056, 4380).
_TRANSLATED = [
    ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
]


def is_public(address: Address) -> bool:
    """Whether an address is of the open internet, so that no machine of the own network is asked."""
    is_translated = any(address.version == net.version and address in net for net in _TRANSLATED)
    return address.is_global and not address.is_multicast and not is_translated


class ImageFetcher:
    """Downloads images, without redirects, within bounds of size and time.

    Args:
        hosts: the only hosts that are asked.
        most_bytes: of an image.
        timeout_s: from the look-up of the name to the last byte.
        verify: whether, or with which context, certificates are checked.
        is_allowed: which addresses may be asked.
    """

    def __init__(
        self,
        hosts: tuple[str, ...],
        most_bytes: int,
        timeout_s: float,
        *,
        verify: object = True,
        is_allowed: Callable[[Address], bool] = is_public,
    ) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._most_bytes = most_bytes
        self._timeout_s = timeout_s
        self._verify = verify
        self._is_allowed = is_allowed

    async def fetch(self, url: str, param: str) -> bytes:
        """The bytes at an address.

        Args:
            url: the address.
            param: the field of the request that holds it, for messages.

        Raises:
            RequestError: it is not allowed, cannot be fetched, or is too large.
        """
        target = _split(url, param)
        host = (target.hostname or "").lower()
        if host not in self._hosts:
            raise RequestError(
                400,
                "an image is a data URL; other addresses need their host in serve.allowed_image_hosts",
                param=param,
                reason="image_address",
            )
        if target.scheme != "https" or target.username is not None:
            raise RequestError(
                400, "images are fetched over HTTPS, without a name in the address", param=param,
                reason="image_address",
            )  # fmt: skip
        try:
            async with asyncio.timeout(self._timeout_s):
                address = await self._look_up(host, target.port or 443, param)
                return await self._download(url, target, address, param)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise RequestError(
                400,
                f"the image cannot be fetched ({type(error).__name__})",
                param=param,
                reason="image_fetch",
            ) from None

    async def _download(self, url: str, target: SplitResult, address: str, param: str) -> bytes:
        # The checked address itself is asked, since the name may lead elsewhere a moment later.
        request = httpx.Request(
            "GET",
            httpx.URL(url).copy_with(host=address),
            headers={"Host": target.netloc, "Accept-Encoding": "identity"},
            extensions={"sni_hostname": target.hostname},
        )
        content = bytearray()
        async with httpx.AsyncClient(trust_env=False, verify=self._verify) as client:  # type: ignore[arg-type]
            answer = await client.send(request, stream=True, follow_redirects=False)
            try:
                if answer.status_code != 200:
                    raise RequestError(
                        400,
                        f"the image's server answers {answer.status_code}",
                        param=param,
                        reason="image_fetch",
                    )
                async for piece in answer.aiter_raw():
                    content += piece
                    if len(content) > self._most_bytes:
                        raise RequestError(
                            413,
                            f"the image has more than {self._most_bytes} bytes",
                            param=param,
                            reason="limit",
                        )
            finally:
                await answer.aclose()
        return bytes(content)

    async def _look_up(self, host: str, port: int, param: str) -> str:
        """An address of the host; all of them must be allowed."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(item[4][0]).partition("%")[0] for item in found]
        if not addresses or not all(self._is_allowed(ipaddress.ip_address(each)) for each in addresses):
            raise RequestError(
                400, "the image's host is not at a public address", param=param, reason="image_address"
            )
        return addresses[0]


def _split(url: str, param: str) -> SplitResult:
    try:
        found = urlsplit(url)
        found.port  # noqa: B018 - raises for a port that is no number
    except ValueError:
        raise RequestError(400, "the address is not valid", param=param, reason="image_address") from None
    return found
