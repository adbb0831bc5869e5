"""Registries of parts: data formats, visual tools, judges, losses, metrics, audit checks, stages.

A part of this package is one line in its registry. Another package adds a part by an entry point, for
instance in its ``pyproject.toml``::

    [project.entry-points."mmedpo_ray.tools"]
    my_tool = "my_package.my_tool:MyTool"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any


class Registry(Mapping[str, Any]):
    """Parts of one kind by name; a part is imported when it is looked up.

    Args:
        kind: what a part is called in messages, such as "visual tool".
        group: group of the entry points by which other packages add parts.
        builtin: name → ``module:attribute`` of the parts of this package.
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = {name: EntryPoint(name, value, group) for name, value in builtin.items()}

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        # Looks into every installed distribution: only done for names that are not ours.
        return {entry.name: entry for entry in entry_points(group=self.group)}

    def __getitem__(self, name: str) -> Any:
        entry = self._builtin.get(name) or self._added[name]
        return entry.load()

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._added

    def __iter__(self) -> Iterator[str]:
        return iter(self._builtin | self._added)

    def __len__(self) -> int:
        return len(self._builtin | self._added)

    def check(self, name: str) -> str:
        """Returns the name if there is such a part.

        Raises:
            ValueError: there is none; the message lists the names and the nearest one.
        """
        if name in self:
            return name
        nearest = difflib.get_close_matches(name, list(self), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"there is no {self.kind} {name!r}. Known: {', '.join(self)}{hint}")
