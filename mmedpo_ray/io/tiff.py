"""TIFF where Pillow is not enough: kinds that it does not know or misreads, and white that is zero."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from mmedpo_ray.io.image_error import MADE_BY, check_frame, check_size
from mmedpo_ray.io.pixels import finite

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Pillow's modes of more than 8 bits, or floats.
DEEP = ("I;16", "I;16B", "I;16L", "I", "F")
# TIFF's tags BitsPerSample, PhotometricInterpretation, PlanarConfiguration and SampleFormat, and values of
# the last two.
_BITS, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339
_APART, _UNSIGNED, _SIGNED = 2, 1, 2
_ORIENTATION = 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# In ``info`` of a copied page, whose tags are gone.
WHITE_IS_ZERO = "white_is_zero"


def is_misread(image: Image.Image) -> bool:
    """Whether Pillow misreads this TIFF: signed bytes, unsigned 32 bits, planar 16-bit colours."""
    if image.format != "TIFF":
        return False
    tags = getattr(image, "tag_v2", {})
    bits, signs = (set(tags.get(tag, (usual,))) for tag, usual in ((_BITS, 1), (_SAMPLE_FORMAT, _UNSIGNED)))
    is_signed = _SIGNED in signs
    return (
        (bits == {8} and is_signed)
        or (bits == {32} and image.mode == "I" and not is_signed)
        or (bits == {16} and tags.get(_PLANES) == _APART)
    )


def count_pages(data: bytes) -> int:
    """How many pages a file has that Pillow does not know; 1 if it is damaged."""
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            return len(file.pages)
    except Exception:
        # The parser raises anything on damaged files.
        return 1


def decode(data: bytes, name: str, max_pixels: int | None, frame: int | None) -> Image.Image:
    """Decodes a TIFF that Pillow cannot open (64-bit floats) or misreads: grey as floats, colour as RGB."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        check_frame(name, len(file.pages), frame)
        page = file.pages[(frame or 1) - 1].aspage()
        check_size(name, page.imagewidth, page.imagelength, max_pixels)
        pixels = page.asarray()
        if pixels.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels, 0, -1)
        is_white_zero = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        orientation = page.tags.get(_ORIENTATION)
        turn = _TURNS.get(orientation.value) if orientation is not None else None
    if pixels.ndim == 3 and pixels.dtype == np.uint16:
        image = Image.fromarray((pixels[..., :3] >> 8).astype(np.uint8))
    else:
        # From its darkest value, that a narrow range far from 0 keeps its levels.
        pixels = finite(pixels.astype(np.float64))
        image = Image.fromarray((pixels - pixels.min()).astype(np.float32))
    made_by = ["TIFF"]
    if turn is not None:
        image = image.transpose(turn)
        made_by.append("turned as its EXIF says")
    image.format = "TIFF"
    if is_white_zero:
        image = inverted(image)
        made_by.append("white is zero: inverted")
    image.info[MADE_BY] = made_by
    return image


def is_white_zero(image: Image.Image) -> bool:
    """Whether a TIFF of more than 8 bits says WhiteIsZero; up to 8 bits Pillow inverts it itself."""
    if image.format != "TIFF" or image.mode not in DEEP:
        return False
    tags = getattr(image, "tag_v2", {})
    return image.info.get(WHITE_IS_ZERO, tags.get(_PHOTOMETRIC) == 0)


def inverted(image: Image.Image) -> Image.Image:
    """Bright for dark within the range of the image, in its own mode."""
    pixels = finite(np.asarray(image))
    turned = Image.fromarray((pixels.max() - (pixels - pixels.min())).astype(pixels.dtype))
    turned.format, turned.info = image.format, image.info
    return turned
