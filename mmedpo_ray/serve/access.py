"""Who may send a request: API keys, the host that a request is for, and the origin of a web page."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from mmedpo_ray.errors import UserError
from mmedpo_ray.serve.request_error import RequestError
from mmedpo_ray.serve.settings import ServeConfig

KEYS_VARIABLE = "MMEDPO_API_KEYS"
_LEAST_KEY_LENGTH = 16


def read_key_hashes(settings: ServeConfig) -> frozenset[bytes]:
    """SHA-256 of every API key, from ``serve.api_keys_file`` and ``MMEDPO_API_KEYS``; empty without keys.

    The file has one key per line; empty lines and lines that start with # are ignored. The variable has keys
    with commas between them.

    Raises:
        UserError: the file cannot be read, holds no key, or a key has fewer than 16 characters.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if settings.api_keys_file is not None:
        path = Path(settings.api_keys_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"serve.api_keys_file: {path} cannot be read ({type(error).__name__}). "
                "It is a text file with one key per line."
            ) from error
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise UserError(f"serve.api_keys_file: {path} holds no key. Write one key per line.")
        keys += found
    if any(len(key) < _LEAST_KEY_LENGTH or not key.isascii() or " " in key for key in keys):
        raise UserError(
            f"an API key has fewer than {_LEAST_KEY_LENGTH} characters, a space, or is not ASCII. Make one "
            'with `python -c "import secrets; print(secrets.token_urlsafe(32))"`.'
        )
    return frozenset(map(hash_key, keys))


def hash_key(key: str) -> bytes:
    """SHA-256 of a key, which is what the server keeps of it; long random keys need no slower hash."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Access:
    """Decides whether a request is let in.

    Args:
        settings: names of this server and origins that may use it.
        key_hashes: SHA-256 of the keys; empty: no key is asked for, and only this machine may ask.
        open_paths: paths that need no key.
    """

    def __init__(
        self, settings: ServeConfig, key_hashes: frozenset[bytes], open_paths: Iterable[str] = ()
    ) -> None:
        self._open_paths = frozenset(open_paths)
        own = {"localhost", socket.gethostname(), socket.getfqdn(), settings.host}
        self._hosts = {name.lower() for name in own | set(settings.allowed_hosts)}
        self._origins = frozenset(settings.allowed_origins)
        self._key_hashes = sorted(key_hashes)

    def is_open(self, path: str) -> bool:
        """Whether a path needs no key."""
        return path in self._open_paths

    def check_source(self, headers: Mapping[str, str]) -> None:
        """Refuses requests for another host, and those that a web page of another origin sends.

        A foreign name server can point its own names here, but never a number, so a Host header with an
        address is always accepted.

        Raises:
            RequestError: 421 for an unknown host, 403 for an origin that is not listed.
        """
        host = headers.get("host", "")
        if not self._is_own(host):
            raise RequestError(
                421, "the Host header names another server; see serve.allowed_hosts", reason="host"
            )
        origin = headers.get("origin")
        if origin is None or origin in self._origins or _netloc(origin) == host.lower():
            return
        raise RequestError(
            403,
            "web pages of this origin may not use the endpoint; see serve.allowed_origins",
            reason="origin",
        )

    def check_client(self, client: tuple[str, int] | None) -> None:
        """Refuses other machines while there is no key.

        Raises:
            RequestError: 403.
        """
        if self._key_hashes or client is None or _is_this_machine(client[0]):
            return
        raise RequestError(
            403,
            "no API keys are set, so only this machine may ask; see serve.api_keys_file",
            reason="no_keys",
        )

    def check_key(self, headers: Mapping[str, str]) -> str:
        """Checks ``Authorization: Bearer KEY``; returns a name for the key that does not reveal it.

        Raises:
            RequestError: 401 if there is no key, or another one.
        """
        if not self._key_hashes:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hash_key(key.strip())
        # Every key is compared, so that the time tells nothing.
        is_known = sum(hmac.compare_digest(given, known) for known in self._key_hashes) > 0
        if scheme.lower() != "bearer" or not is_known:
            raise RequestError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                reason="key",
                code="invalid_api_key",
            )
        return given.hex()[:16]

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name is not None and (_address(name) is not None or name.lower() in self._hosts)


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_this_machine(name: str) -> bool:
    address = _address(name)
    address = getattr(address, "ipv4_mapped", None) or address
    return address is not None and address.is_loopback
