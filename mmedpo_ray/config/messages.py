"""Messages about invalid settings: pydantic's errors in plain words, and the line of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_SECTION = "is a section: set its keys, not itself"
_WORDS = {
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "dict_type": _SECTION,
    "missing": "is missing",
    "union_tag_not_found": "needs a key `kind`",
}


def in_words(item: Mapping[str, Any]) -> str:
    """An item of pydantic's ``ValidationError.errors()`` as a message, without the name of the setting."""
    words = _WORDS.get(item["type"])
    if words is not None:
        return f"{words.format(**item.get('ctx', {}))} (got {item['input']!r})"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    # A rule about several keys of a section names them itself.
    return message if isinstance(item["input"], Mapping) else f"{message} (got {item['input']!r})"


def line_of(path: str | Path | None, location: Sequence[str | int]) -> int | None:
    """The line of a YAML file, from 1, that sets this key; ``None`` if no file sets it."""
    if path is None:
        return None
    with Path(path).open(encoding="utf-8") as file:
        node = yaml.compose(file, Loader=yaml.SafeLoader)
    line = None
    for name in location:
        if isinstance(node, yaml.MappingNode):
            # The last of several keys counts.
            found = [pair for pair in node.value if pair[0].value == str(name)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(name, int) and name < len(node.value):
            found = [(node.value[name], node.value[name])]
        else:
            found = []
        if not found:
            return None
        key, node = found[-1]
        line = key.start_mark.line + 1
    return line
