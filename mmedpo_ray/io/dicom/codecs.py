"""A decoder for pydicom: imagecodecs, which binds libjpeg-turbo, CharLS and OpenJPEG.

It reads lossless and 12-bit JPEG, JPEG-LS, and the JPEG 2000 that Pillow does not. GDCM does too, but ends
the process on some damaged files and on lossless JPEG of fewer than 8 bits, which takes all other images of a
task down; libjpeg of pylibjpeg is GPL.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
from pydicom import uid
from pydicom.pixels import get_decoder

if TYPE_CHECKING:
    from pydicom.pixels.decoders.base import DecodeRunner

NAME = "imagecodecs"
_JPEG = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
_JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
# Markers of JPEG and JPEG-LS that begin a header with the size of the frame, and those without anything
# behind them.
_SIZES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_BARE = {0x01, *range(0xD0, 0xD9)}
# pydicom asks for this name.
DECODER_DEPENDENCIES = dict.fromkeys((*_JPEG, *_JPEG_LS, *_JPEG_2000), (NAME,))


def is_available(syntax: str) -> bool:
    """Whether there is a decoder for a transfer syntax; pydicom asks."""
    return syntax in DECODER_DEPENDENCIES


def register() -> None:
    """Makes the decoder known to pydicom; again is nothing."""
    for syntax in DECODER_DEPENDENCIES:
        decoder = get_decoder(syntax)
        if NAME not in decoder.available_plugins:
            decoder.add_plugin(NAME, (__name__, "decode_frame"))


def decode_frame(source: bytes, runner: DecodeRunner) -> bytes:
    """The pixels of one compressed frame, colours as they are stored, each pixel's samples side by side.

    Raises:
        ValueError: the frame is damaged, or its size is not the declared one, which is looked at before any
            memory is asked for.
    """
    pixels = _pixels(source, runner)
    runner.set_option("bits_allocated", 8 * pixels.dtype.itemsize)
    runner.set_option("planar_configuration", 0)
    if runner.transfer_syntax in _JPEG_2000 and runner.photometric_interpretation.startswith(
        ("YBR_ICT", "YBR_RCT")
    ):
        runner.set_option("photometric_interpretation", "RGB")
    return pixels.tobytes()


def _pixels(source: bytes, runner: DecodeRunner) -> np.ndarray:
    import imagecodecs

    shape: tuple[int, ...] = (runner.rows, runner.columns)
    if runner.samples_per_pixel > 1:
        shape = (*shape, runner.samples_per_pixel)
    if runner.transfer_syntax in _JPEG_2000:
        kind = "i" if runner.get_option("j2k_is_signed", False) else "u"
        size = _bytes_of(runner.get_option("j2k_precision", runner.bits_stored))
        return imagecodecs.jpeg2k_decode(source, out=np.empty(shape, f"{kind}{size}"))
    # What the frame says, not the file, which may declare another depth.
    bits, *size_of_frame = _frame_header(source)
    if tuple(size_of_frame) != (*shape, 1)[:3]:
        raise ValueError("another size than declared")
    out = np.empty(shape, f"u{_bytes_of(bits)}")
    if runner.transfer_syntax in _JPEG_LS:
        return imagecodecs.jpegls_decode(source, out=out)
    if len(shape) == 2:
        return imagecodecs.jpeg8_decode(source, out=out)
    # The same colours in as out: pydicom converts them.
    return imagecodecs.jpeg8_decode(source, colorspace="YCBCR", outcolorspace="YCBCR", out=out)


def _frame_header(source: bytes) -> tuple[int, int, int, int]:
    """Bits, rows, columns and samples per pixel that a JPEG or JPEG-LS frame declares (T.81, B.2.2)."""
    place = 2
    while place + 10 <= len(source):
        marker = source[place + 1]
        if source[place] != 0xFF or marker in _BARE or marker == 0xFF:
            place += 1 if marker == 0xFF else 2
            continue
        if marker in _SIZES:
            return struct.unpack_from(">xxxxBHHB", source, place)
        place += 2 + int.from_bytes(source[place + 2 : place + 4], "big")
    raise ValueError("no header of a frame")


def _bytes_of(bits: int) -> int:
    return 1 if bits <= 8 else 2 if bits <= 16 else 4
