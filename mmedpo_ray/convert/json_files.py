"""Reading a checkpoint's JSON files: an error names the file, the key and the value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from mmedpo_ray.errors import UserError

_SHOWN = 80
_GIT_LFS = b"version https://git-lfs"
_OBJECT = TypeAdapter(dict[str, Any])


class JsonSettings(BaseModel):
    """Settings in a JSON file, each of exactly its type (no "64" for 64); other keys are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


_Settings = TypeVar("_Settings", bound=JsonSettings)


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: the file cannot be read, is not valid JSON, or holds something else.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}. Correct that or download it again."
        ) from error
    check_not_lfs_pointer(path, raw)
    try:
        return _OBJECT.validate_json(raw)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise UserError(f"{path} is not valid JSON with an object ({reason}). Download it again.") from error


def checked(kind: type[_Settings], content: Mapping[str, Any], path: Path, *, within: str = "") -> _Settings:
    """The settings of a file or of an object in it.

    Args:
        kind: the settings to read.
        content: what holds them.
        path: the file, for messages.
        within: where in the file ``content`` is, such as ``vision_config.``; put before keys in messages.

    Raises:
        UserError: a setting is missing, has another type, or is out of its range.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = within + ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise UserError(f"{path} has no {key}. The file is incomplete: download it again.") from error
        raise bad_setting(path, key, first["input"], first["msg"].removeprefix("Value error, ")) from error


def bad_setting(path: Path, key: str, value: Any, reason: str) -> UserError:
    """The error for a setting that cannot have its value."""
    return UserError(
        f"{path} cannot be understood: {key}={shorten(value)} ({reason}). Correct it or download the file "
        "again."
    )


def shorten(value: Any) -> str:
    """A value's ``repr`` for a message, cut if it is long."""
    # Whole numbers of thousands of digits have no repr.
    text = f"{value:#x}" if type(value) is int and value.bit_length() > 4 * _SHOWN else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def check_not_lfs_pointer(path: Path, start: bytes) -> None:
    """Checks that a file with this beginning is not what a checkout without git lfs leaves in its place.

    Raises:
        UserError: it is.
    """
    if start.startswith(_GIT_LFS):
        raise UserError(
            f"{path} is a git lfs pointer, not the file itself. Run `git lfs pull` in the checkpoint."
        )
