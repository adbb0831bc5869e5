"""Writes and unpacks PNG with the deflate of ISA-L, which is several times as fast as zlib's.

Both ways the file format is the ordinary one: any reader opens what is written here, and what is read here
Pillow decodes.
"""

from __future__ import annotations

import struct

import numpy as np
from isal import isal_zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = ">IIBBBBB"
_FILTER_UP = 2
# ISA-L's levels go from 0 to 3; from 2 on nothing gets smaller here.
_LEVEL = 1
# PNG's colour type by the number of bands: grey, grey with alpha, RGB, RGBA; and back, with palettes.
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
_BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# A larger image is left to Pillow, which holds a row at a time.
_MOST_BYTES = 64 * 2**20
# The longest stored block of a deflate stream.
_BLOCK = 65_535


def encode_pixels(pixels: np.ndarray) -> bytes:
    """PNG bytes of an L, LA, RGB, RGBA or 16-bit grey image; equal pixels give equal bytes.

    Pillow tries five filters on every row and searches long, which takes several times all the rest of a
    visual pair. Here it is one filter (the difference from the row above) and ISA-L: about 2 ms a megabyte, a
    quarter of zlib's fastest level, for files of about the same size (0.96 to 1.2 of Pillow's on noised
    radiographs). ISA-L deflates alike on every x86-64 with SSE 4.2, which NumPy and PyArrow need too, so the
    bytes are the same on all such machines. There is no other deflate to fall back to: its bytes would
    differ.

    Args:
        pixels: uint8 (H, W) or (H, W, 2 to 4), or uint16 (H, W).
    """
    height, width = pixels.shape[:2]
    bands = 1 if pixels.ndim == 2 else pixels.shape[2]
    wide = pixels.dtype == np.uint16
    rows = (pixels.astype(">u2").view(np.uint8) if wide else pixels).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = _FILTER_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(_HEADER, width, height, 16 if wide else 8, _COLOUR_TYPES[bands], 0, 0, 0)
    data = isal_zlib.compress(filtered.data, _LEVEL)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def unpacked(data: bytes) -> bytes:
    """The same PNG with its pixels stored instead of deflated: Pillow decodes it faster, this call included.

    Anything out of the ordinary (damaged, interlaced, animated, very large, no PNG at all) comes back as it
    is, for Pillow to judge. Never more is inflated than the header announces.
    """
    try:
        return _unpacked(data) or data
    except (KeyError, struct.error, isal_zlib.error):  # type: ignore[misc]  # its stub says less than it is
        return data


def _unpacked(data: bytes) -> bytes | None:
    """None where the file is out of the ordinary.

    Raises:
        KeyError: there is no such colour type. struct.error: a chunk is cut off. isal_zlib.error: the pixels
        cannot be inflated, or their checksum is wrong.
    """
    if data[:8] != _SIGNATURE or data[12:16] != b"IHDR":
        return None
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(_HEADER, data, 16)
    size = height * (1 + -(-width * depth * _BANDS[colour] // 8))
    parts, start, end = _deflated(data)
    if interlaced or not 0 < size <= _MOST_BYTES or not parts:
        return None
    inflater = isal_zlib.decompressobj()
    pixels = inflater.decompress(parts[0] if len(parts) == 1 else b"".join(parts), size)
    if len(pixels) != size or not inflater.eof:
        return None
    return b"".join((data[:start], _chunk(b"IDAT", _stored(pixels)), data[end:]))


def _deflated(data: bytes) -> tuple[list[memoryview], int, int]:
    """The bodies of the IDAT chunks, their start and their end; none if out of the ordinary."""
    view, parts = memoryview(data), list[memoryview]()
    place, start, end = len(_SIGNATURE), 0, 0
    name = b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, place)
        after = place + 12 + length
        if after > len(data) or name == b"acTL":
            return [], 0, 0
        if name == b"IDAT":
            if parts and place != end:
                return [], 0, 0
            start, end = start or place, after
            parts.append(view[place + 8 : after - 4])
        place = after
    return parts, start, end


def _stored(data: bytes) -> bytes:
    """A zlib stream (RFC 1950) of stored blocks (RFC 1951, section 3.2.4)."""
    view, blocks = memoryview(data), list[bytes | memoryview]([b"\x78\x01"])
    for start in range(0, len(data), _BLOCK):
        body = view[start : start + _BLOCK]
        last = start + _BLOCK >= len(data)
        blocks += [struct.pack("<BHH", last, len(body), len(body) ^ 0xFFFF), body]
    blocks.append(struct.pack(">I", isal_zlib.adler32(data)))
    return b"".join(blocks)


def _chunk(name: bytes, body: bytes) -> bytes:
    checksum = isal_zlib.crc32(body, isal_zlib.crc32(name))
    return b"".join((struct.pack(">I", len(body)), name, body, struct.pack(">I", checksum)))
