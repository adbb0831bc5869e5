"""Reading and writing image files: every mode in, nothing huge decoded, nothing lossy out."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmedpo_ray import storage

MAX_PIXELS = 100_000_000


class ImageError(Exception):
    """An image cannot be used; ``reason`` is the drop reason of its rows."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a whole image in its own mode.

    Raises:
        ImageError: ``image_undecodable`` (also truncated files) or ``image_too_large`` (before decoding).
    """
    try:
        with warnings.catch_warnings():
            # The limit below is ours; Pillow's own only warns at first.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError("image_too_large", f"{name}: {width}×{height} pixels, limit {max_pixels}")
            image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ImageError("image_undecodable", f"{name}: {type(error).__name__}") from error
    return image


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
    """The image as PNG bytes, in its own mode; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()
