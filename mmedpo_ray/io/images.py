"""Reading and writing image files: every mode in, DICOM too, nothing huge decoded, nothing lossy out.

The address of one frame of several is that of its file and ``#frame=N``, from 1; whoever reads it by these
functions sees the same picture.
"""

from __future__ import annotations

import errno
import io
import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar

import numpy as np
from PIL import Image

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import pillow_images, storage, tiff
from mmedpo_ray.io.image_error import ImageError
from mmedpo_ray.io.pixels import finite, read_off
from mmedpo_ray.io.tiff import DEEP

T = TypeVar("T")

MAX_PIXELS = 100_000_000
# Seconds before each further try to read a file; a store that throttles asks for growing ones.
WAITS = (0.25, 1.0, 4.0)
# Drop reason of rows whose image a store does not give out now, but may another time.
UNREADABLE = "image_unreadable"
_DICOM_MAGIC = slice(128, 132)
# First group (0002 or 0008) of a file without preamble, in both byte orders.
_DICOM_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08")
_GZIP_MAGIC = b"\x1f\x8b"
# Error numbers and errors that say that there is no such file, or can be none of this name.
_NO_SUCH_NAME = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_FRAME = re.compile(r"#frame=([1-9]\d*)\Z")


def with_frame(uri: str, frame: int) -> str:
    """The address of a frame of a file, from 1."""
    return f"{uri}#frame={frame}"


def file_and_frame(uri: str) -> tuple[str, int | None]:
    """The file that an address is about, and the frame that it names, from 1, if any."""
    found = _FRAME.search(uri)
    return (uri[: found.start()], int(found.group(1))) if found else (uri, None)


def decode(
    data: bytes,
    name: str,
    max_pixels: int | None = MAX_PIXELS,
    *,
    frame: int | None = None,
    max_bytes: int | None = None,
) -> Image.Image:
    """Decodes an image in its own mode, rotated by EXIF; DICOM as :mod:`mmedpo_ray.io.dicom` shows it.

    No EXIF or XMP is left in ``info``, so nobody turns it once more. ``info`` has ``TURNED`` where the file
    itself may look otherwise, and says how the pixels were made (``MADE_BY``).

    Args:
        data: the file's bytes.
        name: what messages call it.
        max_pixels: a larger image is not decoded; None: any size is. Pillow's own limit does not count, but
            for uncompressed TIFF and MPO, which end at its double (358 million pixels).
        frame: which of several frames, from 1; None: the file must have one.
        max_bytes: deflated DICOM that inflates to more is refused; None: 1 GB.

    Raises:
        ImageError: ``image_undecodable`` (also truncated files), ``image_too_large`` (before decoding),
            ``image_multi_frame`` (several pages, an animation, DICOM with several frames), or
            ``image_no_such_frame``.
    """
    if is_dicom(data):
        from mmedpo_ray.io import dicom  # pydicom is loaded only where there is a DICOM file

        return dicom.decode(data, name, max_pixels, frame, max_bytes)
    if data.startswith(_GZIP_MAGIC):
        raise ImageError("image_undecodable", f"{name}: compressed with gzip; unpack it first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = pillow_images.decode(data, name, max_pixels, frame)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        # Some decoders ask for Pillow's limit once more: for the tiles of a raw TIFF, for pictures inside an
        # icon.
        raise ImageError(
            "image_too_large", f"{name}: more pixels than Pillow decodes of this format"
        ) from error
    except Exception as error:
        # Decoders of rare formats raise anything on damaged files.
        raise ImageError("image_undecodable", f"{name}: {type(error).__name__}") from error
    return image


def count_frames(data: bytes, name: str, max_bytes: int | None = None) -> int:
    """How many pictures a file holds: pages, frames of an animation or of DICOM; 1 for what cannot be opened.

    Args:
        data: the file's bytes.
        name: what messages call it.
        max_bytes: as for :func:`decode`.

    Raises:
        ImageError: DICOM that cannot be read.
    """
    if is_dicom(data):
        from mmedpo_ray.io import dicom

        return dicom.count_frames(data, name, max_bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pillow_images.count_frames(pillow_images.open_header(data))
        except Exception:
            # Whoever decodes it says what is wrong.
            return tiff.count_pages(data) if data.startswith(tiff.MAGIC) else 1


def wanted_frames(data: bytes, name: str, policy: str, max_bytes: int | None = None) -> tuple[int, ...]:
    """The wanted frames of a file, from 1; empty for one picture, or where several are refused.

    Args:
        data: the file's bytes.
        name: what messages call it.
        policy: refuse, first, middle or all.
        max_bytes: as for :func:`decode`.

    Raises:
        ImageError: DICOM that cannot be read.
    """
    count = 1 if policy == "refuse" else count_frames(data, name, max_bytes)
    if count == 1:
        return ()
    return {"first": (1,), "middle": ((count + 1) // 2,), "all": tuple(range(1, count + 1))}[policy]


class ImageLimits(Protocol):
    """What a caller wants of image files, such as the settings of ingest.

    Attributes:
        max_pixels: larger images are not decoded.
        max_image_bytes: deflated DICOM that inflates to more is refused.
        frames: refuse, first, middle or all.
    """

    max_pixels: int
    max_image_bytes: int
    frames: Literal["refuse", "first", "middle", "all"]


def decode_wanted(data: bytes, name: str, limits: ImageLimits) -> tuple[Image.Image, tuple[int, ...]]:
    """Decodes what is wanted of an image file.

    Args:
        data: the file's bytes.
        name: what messages call it.
        limits: on the size, and which frames are wanted.

    Returns:
        The last image decoded, and the numbers of the frames, from 1; none where the file is one picture.

    Raises:
        ImageError: an image cannot be decoded.
    """
    wanted = wanted_frames(data, name, limits.frames, limits.max_image_bytes)
    *_, last = (
        decode(data, name, limits.max_pixels, frame=frame, max_bytes=limits.max_image_bytes)
        for frame in wanted or (None,)
    )
    return last, wanted


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are a DICOM file, by content; without preamble only if they are no other image."""
    if data[_DICOM_MAGIC] == b"DICM":
        return True
    if data[:2] not in _DICOM_GROUPS:
        return False
    try:
        pillow_images.open_header(data).close()
    except Exception:
        return True
    return False


def read_file(uri: str, max_bytes: int | None = None, waits: Sequence[float] | None = None) -> bytes:
    """The bytes of an image file, whole where the address names a frame.

    Errors of a store that may pass (throttling, time-outs) are waited out.

    Args:
        uri: its address.
        max_bytes: a larger file is not read.
        waits: seconds before each further try; None: ``WAITS``.

    Raises:
        ImageError: ``image_missing`` or ``image_too_large``.
        OSError: whether it is there is not known, or it cannot be read: permission, credentials, a store that
            keeps failing.
    """
    try:
        return _patiently(lambda: storage.read_bytes(file_and_frame(uri)[0], max_bytes), uri, waits)
    except storage.FileTooLargeError as error:
        raise ImageError("image_too_large", str(error)) from None


def exists(uri: str, waits: Sequence[float] | None = None) -> bool:
    """Whether there is such a file; for ``waits`` see :func:`read_file`.

    Raises:
        OSError: the store does not say.
    """
    try:
        return _patiently(lambda: storage.exists(file_and_frame(uri)[0]), uri, waits)
    except ImageError:
        return False


def _patiently(look: Callable[[], T], uri: str, waits: Sequence[float] | None) -> T:
    """What ``look`` returns at last.

    Raises:
        ImageError: ``image_missing``.
        OSError: it fails to the end, or for lack of permission.
    """
    left = list(WAITS if waits is None else waits)
    while True:
        try:
            return look()
        except (OSError, ValueError, UserError) as error:
            # Of the UserErrors, a store that cannot be reached has an OSError behind it, an unknown scheme
            # has not.
            failure = error.__cause__ if isinstance(error, UserError) else error
            if (
                not isinstance(failure, OSError)
                or isinstance(failure, _NOT_THERE)
                or failure.errno in _NO_SUCH_NAME
            ):
                raise ImageError("image_missing", uri) from error
            if not left or isinstance(failure, PermissionError):
                raise failure from None
        time.sleep(left.pop(0))


def load_image(
    uri: str, max_pixels: int | None = MAX_PIXELS, waits: Sequence[float] | None = None
) -> Image.Image:
    """Reads an image file in its own mode; for ``waits`` see :func:`read_file`.

    Raises:
        ImageError: ``image_missing``, ``image_undecodable``, ``image_too_large``, ``image_multi_frame`` or
            ``image_no_such_frame``.
        OSError: it cannot be read; see :func:`read_file`.
    """
    return decode(read_file(uri, waits=waits), uri, max_pixels, frame=file_and_frame(uri)[1])


class Patience:
    """How long to wait for a store's files: after a few that it withheld, the others get one try each."""

    _MOST_IN_VAIN = 3

    def __init__(self) -> None:
        self._in_vain = 0

    @property
    def waits(self) -> Sequence[float]:
        """Seconds before each further try of the next file."""
        return WAITS if self._in_vain < self._MOST_IN_VAIN else ()

    def given(self) -> None:
        """The store has given out a file, so it is worth waiting for again."""
        self._in_vain = 0

    def withheld(self, uri: str, error: OSError) -> ImageError:
        """The error ``image_unreadable`` for a file that the store does not give out."""
        self._in_vain += 1
        return unreadable(uri, error)


class ImageLoader:
    """Loads images one after another; why one cannot be used is an answer here, not an error.

    A store that has failed for good a few times running is not waited for again until it gives out a file.

    Args:
        max_pixels: a larger image is not decoded.
    """

    def __init__(self, max_pixels: int | None = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels
        self._patience = Patience()

    def load(self, uri: str) -> Image.Image | ImageError:
        """The image in its own mode, or an error of :func:`load_image`, or ``image_unreadable``."""
        try:
            image = load_image(uri, self._max_pixels, self._patience.waits)
        except ImageError as error:
            return error
        except PermissionError as error:
            # Says nothing of the store.
            return unreadable(uri, error)
        except OSError as error:
            return self._patience.withheld(uri, error)
        self._patience.given()
        return image


def unreadable(uri: str, error: OSError) -> ImageError:
    """The error ``image_unreadable`` for a file that a store does not give out, without the store's words."""
    return ImageError(UNREADABLE, f"{uri}: {type(error).__name__}")


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB as models take it: 16-bit and float images scaled by their range, alpha laid over black."""
    if image.mode == "I;16":
        return _spread(image).convert("RGB")
    if image.mode in DEEP:
        pixels = finite(np.asarray(image, dtype=np.float64))
        low, high = float(pixels.min()), float(pixels.max())
        return Image.fromarray(_shares(pixels, low, high)).convert("RGB")
    if has_alpha(image):
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _spread(image: Image.Image) -> Image.Image:
    """16 bits scaled to 8 by their range: computed for each value that there may be, and read off."""
    grey = read_off(_shares(np.arange(1 << 16, dtype=np.float64), *image.getextrema()), np.asarray(image))
    return Image.fromarray(grey)


def _shares(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Pixels scaled to 0 to 255, uint8; those outside the range are at its ends."""
    if high <= low:
        return np.zeros(pixels.shape, np.uint8)
    return np.round((np.clip(pixels, low, high) - low) * (255.0 / (high - low))).astype(np.uint8)


def has_alpha(image: Image.Image) -> bool:
    """Whether pixels are transparent, by a band of the image or by a transparent colour (PNG's tRNS)."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info


def load_rgb(uri: str) -> Image.Image:
    """Reads an image file of a table, of any size, as 8-bit RGB: what was too large was left out before.

    Raises:
        ImageError: see :func:`load_image`.
    """
    return to_rgb(load_image(uri, max_pixels=None))


def read_size(uri: str) -> tuple[int, int]:
    """Width and height of :func:`load_rgb`'s image, from the file's header where that tells.

    Raises:
        ImageError: see :func:`load_image`.
    """
    data = read_file(uri)
    if not is_dicom(data) and (size := pillow_images.size_in_header(data)) is not None:
        return size
    return decode(data, uri, max_pixels=None, frame=file_and_frame(uri)[1]).size


def encode_png(image: Image.Image) -> bytes:
    """The image as PNG bytes, in its own mode, as Pillow writes it; equal pixels give equal bytes.

    Slow: see :func:`mmedpo_ray.io.png.encode_pixels`.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()
