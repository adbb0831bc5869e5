"""Who may send a request: API keys, the host that a request is for, and the origin of a web page."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
from collections.abc import Mapping
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
    if any(len(key) < _LEAST_KEY_LENGTH or not key.isascii() for key in keys):
        raise UserError(
            f"an API key has fewer than {_LEAST_KEY_LENGTH} characters or is not ASCII. Make one with "
            '`python -c "import secrets; print(secrets.token_urlsafe(32))"`.'
        )
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)


class Access:
    """Decides whether a request is let in.

    Args:
        settings: names of this server and origins that may use it.
        key_hashes: SHA-256 of the keys; empty: no key is asked for.
    """

    def __init__(self, settings: ServeConfig, key_hashes: frozenset[bytes]) -> None:
        own = {"localhost", socket.gethostname(), socket.getfqdn(), settings.host}
        self._hosts = {name.lower() for name in own | set(settings.allowed_hosts)}
        self._origins = frozenset(settings.allowed_origins)
        self._key_hashes = sorted(key_hashes)

    @property
    def wants_key(self) -> bool:
        """Whether requests need a key."""
        return bool(self._key_hashes)

    def check_source(self, headers: Mapping[str, str]) -> None:
        """Refuses requests for another host, and those that a web page of another origin sends.

        An address that is a number cannot be taken over by a foreign name server, so it is always accepted.

        Raises:
            RequestError: 421 for an unknown host, 403 for an origin that is not listed.
        """
        host = headers.get("host", "")
        if not self._is_own(host):
            raise RequestError(
                421, "the Host header names another server; see serve.allowed_hosts", reason="host"
            )
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            raise RequestError(
                403,
                "web pages of this origin may not use the endpoint; see serve.allowed_origins",
                reason="origin",
            )

    def check_key(self, headers: Mapping[str, str]) -> str:
        """Checks ``Authorization: Bearer KEY``; returns a name for the key that does not reveal it.

        Raises:
            RequestError: 401 if there is no key, or another one.
        """
        if not self.wants_key:
            return "anonymous"
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, so that the time tells nothing.
        is_known = sum(hmac.compare_digest(given, known) for known in self._key_hashes) > 0
        if scheme.lower() != "bearer" or not is_known:
            raise RequestError(401, "a valid API key is needed: Authorization: Bearer KEY", reason="key")
        return given.hex()[:8]

    def _is_own(self, host: str) -> bool:
        name = urlsplit(f"//{host}").hostname if host else None
        if name is None:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower() in self._hosts
        return True
