"""Images as files that every other decoder reads as training here does."""

from __future__ import annotations

from mmedpo_ray.io import storage
from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.images import MAX_PIXELS, decode, encode_png, file_and_frame, to_rgb
from mmedpo_ray.io.pillow_images import TURNED

_PLAIN = {"PNG": "image/png", "JPEG": "image/jpeg"}


def plain_bytes(uri: str, max_pixels: int | None = MAX_PIXELS) -> tuple[bytes, str]:
    """The picture of a file as every decoder reads it like training; see :func:`plain_file`.

    Raises:
        ImageError: the file is missing, damaged or too large.
    """
    file, frame = file_and_frame(uri)
    try:
        data = storage.read_bytes(file)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ImageError("image_missing", uri) from error
    return plain_file(data, uri, max_pixels, frame=frame)


def plain_file(
    data: bytes, name: str, max_pixels: int | None = MAX_PIXELS, *, frame: int | None = None
) -> tuple[bytes, str]:
    """A picture as a file that every decoder reads as training does: its bytes and their media type.

    Plain 8-bit PNG and JPEG files are taken as they are; everything else (16 bits, alpha, palette, EXIF
    rotation, DICOM, one frame of several) becomes an RGB PNG by :func:`to_rgb`.

    Args:
        data: the file's bytes.
        name: what messages call it.
        max_pixels: a larger image is not decoded.
        frame: which of several frames, from 1.

    Raises:
        ImageError: see :func:`decode`.
    """
    image = decode(data, name, max_pixels, frame=frame)
    kind = _PLAIN.get(image.format or "") if frame is None else None
    if kind is None or image.mode not in ("L", "RGB") or "transparency" in image.info or TURNED in image.info:
        return encode_png(to_rgb(image)), "image/png"
    return data, kind
