"""Image files that Pillow decodes: JPEG, PNG, TIFF, GIF, WebP and others."""

from __future__ import annotations

import io
import struct

from PIL import ExifTags, Image, ImageOps

from mmedpo_ray.io import png, tiff
from mmedpo_ray.io.image_error import MADE_BY, ImageError, check_frame, check_size

# What to_rgb makes a picture of; Pillow cannot convert the others (LAB).
_MODES = {
    "1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV",
    "I", "F", "I;16", "I;16B", "I;16L",
}  # fmt: skip
# Formats whose further frames are pictures of their own. Those of others are previews, layers or sizes of the
# same picture.
_FRAMED = ("TIFF", "GIF", "WEBP", "PNG", "AVIF")
# Where files of several formats keep EXIF and XMP, which may say how to turn the stored pixels.
_METADATA = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
# In ``info`` of an image whose file as it is may look otherwise to another reader: it was turned, or its EXIF
# is damaged.
TURNED = "turned"


def count_frames(image: Image.Image) -> int:
    """How many pictures of its own an opened file holds."""
    return getattr(image, "n_frames", 1) if image.format in _FRAMED else 1


def decode(data: bytes, name: str, max_pixels: int | None, frame: int | None) -> Image.Image:
    """Decodes a file, or one frame of it; for the arguments see :func:`mmedpo_ray.io.images.decode`.

    Raises:
        ImageError: see there. Or whatever a decoder raises on a damaged file.
    """
    try:
        image = open_header(data)
    except Exception:
        if not data.startswith(tiff.MAGIC):
            raise
        return tiff.decode(data, name, max_pixels, frame)
    if tiff.is_misread(image):
        return tiff.decode(data, name, max_pixels, frame)
    check_size(name, *image.size, max_pixels)
    if image.mode not in _MODES:
        raise ImageError("image_undecodable", f"{name}: colours as {image.mode}; convert it to RGB")
    frames = count_frames(image)
    check_frame(name, frames, frame)
    made_by = [image.format or "image"]
    if frames > 1:
        made_by.append(f"frame {frame} of {frames}")
        image = _one_frame(image, (frame or 1) - 1)
        check_size(name, *image.size, max_pixels)
    elif image.format == "PNG" and (faster := png.unpacked(data)) is not data:
        image = open_header(faster)
    image.load()
    if tiff.is_white_zero(image):
        image = tiff.inverted(image)
        made_by.append("white is zero: inverted")
    _set_upright(image)
    if TURNED in image.info:
        made_by.append("turned as its EXIF says")
    image.info[MADE_BY] = made_by
    return image


def size_in_header(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG or JPEG file that nothing turns; ``None``: it has to be decoded."""
    try:
        image = open_header(data)
    except Exception:
        return None
    is_plain = image.format in ("PNG", "JPEG") and count_frames(image) == 1
    return image.size if is_plain and not any(key in image.info for key in _METADATA) else None


def _one_frame(image: Image.Image, index: int) -> Image.Image:
    image.seek(index)
    found = image.copy()
    # A copy forgets what it was read from.
    found.format = image.format
    if image.format == "TIFF":
        found.info[tiff.WHITE_IS_ZERO] = tiff.is_white_zero(image)
    return found


def _set_upright(image: Image.Image) -> None:
    """Turns a loaded image in place as viewers (and Pillow, and vLLM) do, and forgets what said so."""
    if not any(key in image.info for key in _METADATA):
        return
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Damaged in any way: viewers show the pixels as they are stored.
        orientation = None
    for key in _METADATA:
        image.info.pop(key, None)
    if orientation == 1:
        return
    image.info[TURNED] = True
    if orientation is not None:
        ImageOps.exif_transpose(image, in_place=True)


def open_header(data: bytes) -> Image.Image:
    """The image behind a file's header, nothing decoded, as ``Image.open`` gives it.

    That has a limit on pixels of its own, a global of the process which other threads and libraries rely on.
    Here the limit is the caller's, so Pillow's decoders are asked one by one.

    Raises:
        ValueError: no decoder knows the file. Or whatever a decoder raises on a damaged one.
    """
    file = io.BytesIO(data)
    asked: set[str] = set()
    # The common decoders first: importing all of them takes a while.
    for load_decoders in (Image.preinit, Image.init):
        load_decoders()
        for kind in [kind for kind in Image.ID if kind not in asked]:
            asked.add(kind)
            factory, accepts = Image.OPEN[kind]
            try:
                accepted = accepts is None or accepts(data[:16])
                # A decoder that would accept the file, but is not installed, answers with a text.
                if accepted and not isinstance(accepted, str):
                    file.seek(0)
                    return factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                # Not of this kind after all.
                continue
    raise ValueError("no image")
