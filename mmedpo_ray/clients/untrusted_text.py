"""Text by others: as data that gives no instruction in prompts, and as checked values from answers."""

from __future__ import annotations

import json
from typing import Any, TypeGuard


def as_data(record: dict[str, Any]) -> str:
    """A record as one line of ASCII JSON without the characters that chat templates use to mark turns.

    Texts written by others go into a prompt in this form: none can end its JSON string, open a turn, or spell
        a special token. The prompt must still say that nothing in the record is an instruction.

    Args:
        record: strings, numbers and further records; no lists, whose brackets would be escaped too.
    """
    text = json.dumps(record, ensure_ascii=True)
    # Without lists these occur inside strings only, where an escape means the same.
    for letter in "<>[]|&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def read_json(text: str | bytes, **options: Any) -> Any:
    """The JSON value of a text; None if the text is not JSON or nests too deep to be read.

    Args:
        options: of :func:`json.loads`.
    """
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError):
        return None


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a string that a table can hold: JSON allows half of a surrogate pair, UTF-8 not."""
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode("utf-8")
