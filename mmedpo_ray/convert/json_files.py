"""Reading a checkpoint's JSON files: what is missing or cannot be is told with its file, key and value."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmedpo_ray.errors import UserError

_SHOWN = 80
_GIT_LFS = b"version https://git-lfs"
# As JSON calls them, not Python.
_TYPES = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Kind:
    """What the value of a setting may be.

    Attributes:
        fits: whether a value is of this kind; takes whatever JSON can hold.
        text: the kind in words, as in "expected is a whole number".
    """

    fits: Callable[[Any], bool]
    text: str


def whole(low: int, high: int) -> Kind:
    """A whole number from ``low`` to ``high``, both included."""
    return Kind(
        lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"
    )


def number(low: float, high: float, *, above: bool = False) -> Kind:
    """A number from ``low`` to ``high``; ``low`` itself is left out with ``above``. NaN is none."""

    def fits(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high and not (above and value == low)

    return Kind(fits, f"a number {'above' if above else 'from'} {low:g} {'and' if above else 'to'} {high:g}")


def one_of(*values: str) -> Kind:
    """One of some texts."""
    shown = " or ".join(map(repr, values))
    return Kind(lambda value: isinstance(value, str) and value in values, shown)


def maybe(kind: Kind) -> Kind:
    """A kind, or null."""
    return Kind(lambda value: value is None or kind.fits(value), f"{kind.text}, or null")


FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
TEXT = Kind(lambda value: isinstance(value, str), "a text")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")
LIST = Kind(lambda value: isinstance(value, list), "a list")


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: the file cannot be read, is not valid JSON, or holds something else.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or error}. Mend that or download it again."
        ) from error
    if is_lfs_pointer(raw):
        raise UserError(lfs_message(path))
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({one_line(error)}). Download it again.") from error
    if not isinstance(content, dict):
        found = _TYPES.get(type(content), "a number")
        raise UserError(f"{path} holds {found}, not an object. Download it again.")
    return content


def take(
    content: Mapping[str, Any],
    kinds: Mapping[str, Kind],
    path: Path,
    *,
    required: Collection[str] = (),
    within: str = "",
) -> dict[str, Any]:
    """The settings of known names, each of its kind.

    Args:
        content: of the file, or of an object in it.
        kinds: of every setting that is read.
        path: the file.
        required: which of them must be there.
        within: where in the file ``content`` is, in front of keys in messages.

    Raises:
        UserError: a setting is missing or of another kind.
    """
    for key, kind in kinds.items():
        if key in content:
            if not kind.fits(content[key]):
                raise bad_setting(path, within + key, content[key], kind.text)
        elif key in required:
            raise UserError(
                f"{path} has no {within}{key}; expected is {kind.text}. The file is incomplete: download it again."
            )
    return {key: content[key] for key in kinds if key in content}


def bad_setting(path: Path, key: str, value: Any, expected: str) -> UserError:
    """The error for a setting whose value cannot be."""
    return UserError(
        f"{path} cannot be understood: {key}={shorten(value)}, expected is {expected}. Correct it or download the file "
        "again."
    )


def shorten(value: Any) -> str:
    """A value as it may stand in a message, however long it is."""
    # Whole numbers of thousands of digits have no repr.
    text = f"{value:#x}" if type(value) is int and value.bit_length() > 4 * _SHOWN else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that starts so is what a checkout without git lfs leaves in place of the file itself."""
    return start.startswith(_GIT_LFS)


def lfs_message(path: Path) -> str:
    """What to say about a pointer."""
    return f"{path} is a git lfs pointer, not the file itself. Run `git lfs pull` in the checkpoint."


def one_line(error: Exception) -> str:
    """An error's text on one line, without a full stop; its class where it has no text."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def is_vector(value: Any, length: int, *, above: float = -math.inf) -> bool:
    """Whether a value is a list of so many finite numbers above a bound."""
    return (
        isinstance(value, list)
        and len(value) == length
        and all(type(item) in (int, float) and above < item < math.inf for item in value)
    )
