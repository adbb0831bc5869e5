"""Why a row cannot become a sample."""

from __future__ import annotations


class UnusableError(Exception):
    """A row cannot become a sample.

    Args:
        reason: short machine-readable drop reason.
        detail: what is wrong, without patient text.
        image_uri: the image file to blame; mending it makes the row worth another try.
    """

    def __init__(self, reason: str, detail: str = "", image_uri: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.image_uri = image_uri
