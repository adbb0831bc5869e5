"""Text that every file format here can hold."""

from __future__ import annotations


def storable(text: str) -> str:
    """The text with "?" for each lone surrogate: JSON allows them, UTF-8 (and so Parquet) does not."""
    return text.encode("utf-8", "replace").decode("utf-8")
