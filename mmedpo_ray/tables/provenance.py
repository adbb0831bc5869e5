"""What a `prepared` table was made with, kept in its manifest so that a message can say what changed since.

The table's key is a hash of this; two keys say that something differs and not what.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmedpo_ray.errors import UserError
from mmedpo_ray.tables.manifest import Manifest, read_manifest

MADE_WITH = "made_with"
MODEL_FILES, SCORED = "model files", "scored"
# Files named in a message; a sharded model has dozens.
_MOST_NAMED = 4

Parts = Mapping[str, Any]
"""Setting → value; :data:`MODEL_FILES` → hash by name of file; :data:`SCORED` → key of that table."""


def changes(before: Parts | None, now: Parts | None) -> str:
    """What differs between two tables: ``align.max_length 1024 → 512, the model's chat_template.jinja``."""
    if before is None or now is None:
        return "settings that were not recorded"
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == MODEL_FILES:
            found.append(f"the model's {_files(old or {}, new or {})}")
        elif name == SCORED:
            found.append("the table `scored`")
        else:
            found.append(f"{name} {_word(old)} → {_word(new)}")
    return ", ".join(found) or "the kind of table or of `scored`"


def by_name(name: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": 1}}`` → ``{"name.a.b": 1}``."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        full: leaf for key, part in value.items() for full, leaf in by_name(f"{name}.{key}", part).items()
    }


def check_prepared(folder: str, key: str | None, now: Parts | None) -> Manifest:
    """The manifest of a `prepared` table, which must be that of a key.

    Args:
        folder: of the table.
        key: expected; ``None``: any.
        now: what the expected one is made with.

    Raises:
        UserError: there is none, or it is of another key; says what changed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"align: {folder} is missing or unfinished on this node. All nodes must share the run's folder."
        )
    if key is not None and manifest.key != key:
        raise UserError(
            f"align: the table {folder} was made under other settings (key {manifest.key}, now {key}). "
            f"Changed: {changes(manifest.extra.get(MADE_WITH), now)}. Delete that folder and run align again."
        )
    return manifest


def _files(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    further = f" and {len(names) - _MOST_NAMED} more files" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + further


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)
