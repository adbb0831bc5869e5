"""Checks that the images of rows can be decoded, and writes those that are embedded in rows as files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.ingest.settings import DataConfig
from mmedpo_ray.io import images, storage

UNREADABLE = images.UNREADABLE
# Drop reasons that copying, repairing or uploading an image file ends, or a store that answers again.
IMAGE_REASONS = (
    "image_missing",
    UNREADABLE,
    "image_undecodable",
    "image_too_large",
    "image_multi_frame",
    "image_no_such_frame",
)

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFacts:
    """What ingest knows of an image file that can be decoded.

    Attributes:
        uri: its address.
        sha256: of its bytes, hex.
        image_id: name of the image (or study) inside the data set.
        mask_uri: lesion mask that lies beside it or that its row names.
    """

    uri: str
    sha256: str
    image_id: str
    mask_uri: str | None = None


class ImageChecker:
    """Decodes images to know that they can be used, each once in its life, which is that of a unit.

    Args:
        data: its limits on the size of images, and which frames are wanted.
        raw: folder for images that lie in rows.
    """

    def __init__(self, data: DataConfig, raw: str = "") -> None:
        self._data = data
        self._raw = raw
        # File or hash of bytes → its hash and the wanted frames, or why it cannot be used.
        self._known: dict[str, tuple[str, tuple[int, ...]] | UnusableError] = {}
        self._present: dict[str, bool] = {}
        self._patience = images.Patience()

    def sha256(self, uri: str) -> str:
        """SHA-256 of an image file that can be decoded.

        Raises:
            UnusableError: it is missing, cannot be read, or is broken or too large.
        """
        return self._facts(uri, lambda: self._load(uri)[1:])[0]

    def frames(self, uri: str) -> tuple[int, ...]:
        """The frames of an image file that are wanted, from 1; none where it is one picture.

        Raises:
            UnusableError: as for :meth:`sha256`.
        """
        return self._facts(uri, lambda: self._load(uri)[1:])[1]

    def load(self, uri: str) -> Image.Image:
        """An image in its own mode; of a file of several frames the one that is wanted.

        Raises:
            UnusableError: as for :meth:`sha256`; or several frames are wanted.
        """
        image, _, frames = self._load(uri)
        if len(frames) > 1:
            raise UnusableError("image_multi_frame", f"{uri}: {len(frames)} frames", uri)
        return image

    def exists(self, uri: str) -> bool:
        """Whether there is such a file.

        Raises:
            UnusableError: the store does not say.
        """
        if uri not in self._present:
            self._present[uri] = self._answer(uri, lambda: images.exists(uri, self._patience.waits))
        return self._present[uri]

    def write(self, data: bytes) -> tuple[str, str]:
        """Writes an image that can be decoded as a file, once; returns its address and SHA-256.

        Raises:
            UnusableError: it is broken or too large.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        uri, _ = self._facts(f"sha256:{sha256}", lambda: (self._written(data), ()))
        return uri, sha256

    def write_file(self, data: bytes, suffix: str) -> tuple[str, str]:
        """Writes bytes as a file named by their hash; returns its address and SHA-256."""
        sha256 = hashlib.sha256(data).hexdigest()
        uri = storage.join(self._raw, sha256[:2], f"{sha256}.{suffix}")
        if not storage.exists(uri):
            storage.write_bytes(uri, data)
        return uri, sha256

    def _written(self, data: bytes) -> str:
        if len(data) > self._data.max_image_bytes:
            raise UnusableError("image_too_large")
        try:
            image, _ = images.decode_wanted(data, "an image in a row", self._data)
        except images.ImageError as error:
            raise UnusableError(error.reason) from None
        suffix = "dcm" if images.is_dicom(data) else (image.format or "image").lower()
        return self.write_file(data, suffix)[0]

    def _facts(
        self, key: str, find: Callable[[], tuple[str, tuple[int, ...]]]
    ) -> tuple[str, tuple[int, ...]]:
        if key not in self._known:
            try:
                self._known[key] = find()
            except UnusableError as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, UnusableError):
            raise UnusableError(known.reason, known.detail, known.image_uri)
        return known

    def _load(self, uri: str) -> tuple[Image.Image, str, tuple[int, ...]]:
        limits = self._data
        _, frame = images.file_and_frame(uri)

        def decoded() -> tuple[Image.Image, str, tuple[int, ...]]:
            data = images.read_file(uri, limits.max_image_bytes, self._patience.waits)
            sha256 = hashlib.sha256(data).hexdigest()
            if frame is None:
                image, frames = images.decode_wanted(data, uri, limits)
                return image, sha256, frames
            # The address names the frame, so none is wanted of its file.
            only = images.decode(data, uri, limits.max_pixels, frame=frame, max_bytes=limits.max_image_bytes)
            return only, sha256, ()

        return self._answer(uri, decoded)

    def _answer(self, uri: str, ask: Callable[[], T]) -> T:
        """What storage and decoder say of a file.

        Raises:
            UnusableError: the file cannot be used, or storage fails.
        """
        try:
            return ask()
        except images.ImageError as error:
            found = error
        except OSError as error:
            found = self._patience.withheld(uri, error)
        raise UnusableError(found.reason, found.detail, uri)
