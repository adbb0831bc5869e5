"""Reading and writing image files: every mode in, DICOM too, nothing huge decoded, nothing lossy out."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from mmedpo_ray import storage

MAX_PIXELS = 100_000_000
_DICOM_MAGIC = slice(128, 132)
# First group (0002 or 0008) of a file without preamble, in both byte orders.
_DICOM_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08")
_FILTER_UP = 2
# PNG's colour type by the number of bands: grey, grey with alpha, RGB, RGBA.
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


class ImageError(Exception):
    """An image cannot be used; ``reason`` is the drop reason of its rows."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a whole image in its own mode; DICOM as :mod:`mmedpo_ray.dicom` shows it.

    Raises:
        ImageError: ``image_undecodable`` (also truncated files), ``image_too_large`` (before decoding), or
            ``image_multi_frame`` (DICOM).
    """
    if is_dicom(data):
        from mmedpo_ray import dicom  # pydicom is loaded only where there is a DICOM file

        return dicom.decode(data, name, max_pixels)
    try:
        with warnings.catch_warnings():
            # The limit below is ours; Pillow's own only warns at first.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError("image_too_large", f"{name}: {width}×{height} pixels, limit {max_pixels}")
            image.load()
    except ImageError:
        raise
    except Exception as error:
        # Decoders of rare formats raise anything on damaged files.
        raise ImageError("image_undecodable", f"{name}: {type(error).__name__}") from error
    return image


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are a DICOM file, by content; without preamble only if they are no other image."""
    if data[_DICOM_MAGIC] == b"DICM":
        return True
    if data[:2] not in _DICOM_GROUPS:
        return False
    try:
        Image.open(io.BytesIO(data)).close()
    except Exception:
        return True
    return False


def load_image(uri: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image file in its own mode.

    Raises:
        ImageError: ``image_missing``, ``image_undecodable`` or ``image_too_large``.
    """
    try:
        data = storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ImageError("image_missing", uri) from error
    return decode(data, uri, max_pixels)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB as models take it: 16-bit and float images scaled by their range, alpha laid over black."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        pixels = np.asarray(image, dtype=np.float64)
        low, high = float(pixels.min()), float(pixels.max())
        scaled = (pixels - low) * (255.0 / (high - low)) if high > low else np.zeros_like(pixels)
        return Image.fromarray(np.round(scaled).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def load_rgb(uri: str) -> Image.Image:
    """Reads an image file as 8-bit RGB.

    Raises:
        ImageError: see :func:`load_image`.
    """
    return to_rgb(load_image(uri))


def encode_png(image: Image.Image) -> bytes:
    """The image as PNG bytes, in its own mode, as Pillow writes it; equal pixels give equal bytes. Slow: see :func:`encode_pixels`."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def encode_pixels(pixels: np.ndarray) -> bytes:
    """PNG bytes of an L, LA, RGB, RGBA or 16-bit grey image; equal pixels give equal bytes.

    Pillow tries five filters on every row and searches long, which takes several times all the rest of a visual pair. One
    filter (the difference from the row above) and the fastest deflate make files of about the same size (0.96 to 1.06 of
    Pillow's default on noised radiographs) in about a tenth of the time. In one band only runs are looked for: noise repeats
    nothing longer.

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
    deflate = zlib.compressobj(
        level=1, memLevel=9, strategy=zlib.Z_RLE if bands == 1 else zlib.Z_DEFAULT_STRATEGY
    )
    data = deflate.compress(filtered.data) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 16 if wide else 8, _COLOUR_TYPES[bands], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))
        for name, body in chunks
    )
