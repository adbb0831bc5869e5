"""Pictures as files that every decoder reads as training does, for engines and other programs."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmedpo_ray.io import pillow_images, png, storage
from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.images import MAX_PIXELS, decode, file_and_frame, to_rgb
from mmedpo_ray.io.pillow_images import TURNED
from mmedpo_ray.io.tiff import DEEP

_PLAIN = {"PNG": "image/png", "JPEG": "image/jpeg"}
_GREY = ("1", "L", "LA", *DEEP)
_PLAIN_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_SMALL = 4_000_000


def plain_bytes(uri: str, max_pixels: int | None = MAX_PIXELS) -> tuple[bytes, str]:
    """The picture at an address; see :func:`plain_file`.

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
    data: bytes,
    name: str,
    max_pixels: int | None = MAX_PIXELS,
    *,
    frame: int | None = None,
    max_bytes: int | None = None,
) -> tuple[bytes, str]:
    """A picture as a file that every decoder reads as training does: its bytes and their media type.

    Plain 8-bit PNG and JPEG files are taken as they are; everything else (16 bits, alpha, palette, EXIF
    rotation, DICOM, one frame of several, progressive JPEG, which is slow to decode) becomes a PNG of 8 bits
    by :func:`mmedpo_ray.io.images.to_rgb`, grey where the picture is.

    Args:
        data: the file's bytes.
        name: what messages call it.
        max_pixels: a larger image is not decoded.
        frame: which of several frames, from 1.
        max_bytes: as for :func:`mmedpo_ray.io.images.decode`.

    Raises:
        ImageError: see :func:`mmedpo_ray.io.images.decode`.
    """
    image = decode(data, name, max_pixels, frame=frame, max_bytes=max_bytes)
    kind = _PLAIN.get(image.format or "") if frame is None else None
    is_plain = image.mode in ("L", "RGB") and not {"transparency", "progression", TURNED} & set(image.info)
    if kind is not None and is_plain:
        return data, kind
    rgb = to_rgb(image)
    # All three channels of a grey picture are the same.
    picture = rgb.getchannel("R") if image.mode in _GREY and "transparency" not in image.info else rgb
    return png.encode_pixels(np.asarray(picture)), "image/png"


def is_small_and_plain(data: bytes) -> bool:
    """Whether a file is a PNG, or a JPEG in one pass, of at most 4 million pixels, by its head.

    Such files are decoded within some hundredths of a second, by decoders that everybody uses.
    """
    if not data.startswith(_PLAIN_MAGIC):
        return False
    try:
        image: Image.Image = pillow_images.open_header(data)
    except Exception:
        # Decoders raise anything on damaged files.
        return False
    width, height = image.size
    is_simple = image.format in _PLAIN and "progression" not in image.info
    return is_simple and width * height <= _SMALL and pillow_images.count_frames(image) == 1
