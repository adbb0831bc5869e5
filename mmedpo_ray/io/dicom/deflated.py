"""Inflates deflated DICOM data sets (PS3.5 A.5) up to a limit, which pydicom's reader has not."""

from __future__ import annotations

import struct
import zlib

from mmedpo_ray.io.image_error import ImageError

_SYNTAX = (2, 0x10)
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_INFLATED = b"1.2.840.10008.1.2.1"
_HEADER = 132
_LONG = (b"OB", b"OW", b"UN", b"UT", b"SQ")
# A deflate stream without a header, as the standard says, or with that of zlib, as some write.
_WINDOWS = (-zlib.MAX_WBITS, zlib.MAX_WBITS)


def inflated(data: bytes, name: str, max_bytes: int) -> bytes:
    """The file with its data set inflated; as it is where none is deflated.

    Args:
        data: the file's bytes.
        name: what messages call it.
        max_bytes: of the data set inflated.

    Raises:
        ImageError: ``image_too_large``, or ``image_undecodable``.
    """
    start, syntax = _header(data)
    if syntax is None or data[syntax].rstrip(b"\0 ") != _DEFLATED:
        return data
    length = syntax.stop - syntax.start
    header = data[: syntax.start] + _INFLATED.ljust(length, b"\0") + data[syntax.stop : start]
    for window in _WINDOWS:
        inflate = zlib.decompressobj(window)
        try:
            content = inflate.decompress(data[start:], max_bytes)
        except zlib.error:
            continue
        if inflate.unconsumed_tail:
            raise ImageError("image_too_large", f"{name}: DICOM that inflates to more than {max_bytes} bytes")
        return header + content
    raise ImageError("image_undecodable", f"{name}: DICOM, its deflated part is damaged")


def _header(data: bytes) -> tuple[int, slice | None]:
    """Where the header's group 0002 ends, and where the value of its transfer syntax is."""
    if data[_HEADER - 4 : _HEADER] != b"DICM":
        return 0, None
    place, syntax = _HEADER, None
    while place + 12 <= len(data):
        group, element, kind, length = struct.unpack_from("<HH2sH", data, place)
        if group != 2:
            break
        value = place + 8
        if kind in _LONG:
            length, value = struct.unpack_from("<I", data, value)[0], value + 4
        if (group, element) == _SYNTAX:
            syntax = slice(value, value + length)
        place = value + length
    return place, syntax
