"""Why an image cannot be used, and how one that can was made."""

from __future__ import annotations

# In ``info`` of a decoded image: a list of texts that say how its pixels were made, without anything of the
# patient.
MADE_BY = "made_by"


class ImageError(Exception):
    """An image cannot be used; ``reason`` is the drop reason of its rows."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def check_frame(name: str, frames: int, frame: int | None) -> None:
    """Whether a file of so many frames can be read as one picture.

    Raises:
        ImageError: ``image_multi_frame`` where no frame is named, ``image_no_such_frame``.
    """
    if frames > 1 and frame is None:
        raise ImageError(
            "image_multi_frame", f"{name}: {frames} frames; set data.frames, or export the one that is meant"
        )
    if frame is not None and frame > frames:
        raise ImageError("image_no_such_frame", f"{name}: frame {frame} of {frames}")


def check_size(name: str, width: int, height: int, max_pixels: int | None) -> None:
    """Whether an image may be decoded.

    Raises:
        ImageError: ``image_too_large``.
    """
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError("image_too_large", f"{name}: {width}×{height} pixels, limit {max_pixels}")
