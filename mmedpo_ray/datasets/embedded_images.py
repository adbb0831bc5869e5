"""Images that lie in the rows of a data set, as bytes or as base64 text."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any
from urllib.parse import unquote

from mmedpo_ray.datasets.unusable import UnusableError

_DATA_URL = re.compile(r"\s*data:[^,]{0,200},", re.IGNORECASE)
# How base64 begins of PNG, JPEG, GIF, TIFF, WebP, BMP and DICOM, and how short no picture is.
_BEGINS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "SUkq", "TU0AK", "UklGR", "Qk", "AAAAAAAAAAAAAAAAAAAA")
_BEGINS_AS_BYTES = tuple(begin.encode() for begin in ("data:", *_BEGINS))
_SHORTEST = 64
# With the letters of base64 in addresses.
_ALPHABET = re.compile(r"[A-Za-z0-9+/_\-\s]+=*\s*")
# The longest name of an object in S3 and GCS; paths of files are shorter still.
LONGEST_NAME = 1024


def embedded_bytes(text: str) -> bytes | None:
    """The bytes of an image given as a data URL or base64; None for a string that may be a name.

    Raises:
        UnusableError: it is a data URL, or no name for its length, but no base64.
    """
    head = _DATA_URL.match(text[:300])
    if head is None:
        begins_like_one = len(text) >= _SHORTEST and text.lstrip().startswith(_BEGINS)
        if not (begins_like_one or len(text) > LONGEST_NAME) or not _ALPHABET.fullmatch(text):
            return None
    content = "".join(unquote(text[head.end() :] if head else text).split()).rstrip("=")
    try:
        padded = content + "=" * (-len(content) % 4)
        return base64.b64decode(padded.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        raise UnusableError("image_undecodable", "its base64 is damaged or cut off") from None


def only_element(value: Any) -> Any:
    """The element of a list of one; what is no list is returned as it is.

    Raises:
        UnusableError: the list has several.
    """
    if not isinstance(value, list):
        return value
    if len(value) > 1:
        raise UnusableError("several_images", f"{len(value)} images for one question")
    return value[0] if value else None


def bytes_or_name(value: Any) -> Any:
    """The image of a row: bytes (also base64 or a data URL) or a name; a list of one is unpacked.

    Raises:
        UnusableError: a list of several, or a data URL without base64.
    """
    value = only_element(value)
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, bytes) and value.startswith(_BEGINS_AS_BYTES):
        value = value.decode("latin-1")
    embedded = embedded_bytes(value) if isinstance(value, str) else None
    return value if embedded is None else embedded
