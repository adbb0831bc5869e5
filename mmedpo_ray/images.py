"""Reading and writing image files: every mode in, DICOM too, nothing huge decoded, nothing lossy out."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

from mmedpo_ray import png, storage

MAX_PIXELS = 100_000_000
_DICOM_MAGIC = slice(128, 132)
# First group (0002 or 0008) of a file without preamble, in both byte orders.
_DICOM_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08")


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
            if image.format == "PNG" and (faster := png.unpacked(data)) is not data:
                image = Image.open(io.BytesIO(faster))
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
    """The image as PNG bytes, in its own mode, as Pillow writes it; equal pixels give equal bytes. Slow: see :func:`mmedpo_ray.png.encode_pixels`."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()
