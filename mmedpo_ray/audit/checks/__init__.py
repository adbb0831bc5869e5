"""The checks of the audit, a file for each family.

A new file is a line in `_FAMILIES`. Another package adds a check by an entry point of the group
``mmedpo_ray.checks`` that names a :class:`~mmedpo_ray.audit.check.Check`.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from mmedpo_ray.audit.check import Check
from mmedpo_ray.audit.checks import answers, images, rows, samples, shortcuts, visual, weights

_FAMILIES = (shortcuts, answers, rows, samples, weights, visual, images)
_BUILTIN = [check for family in _FAMILIES for check in family.CHECKS]
_ADDED: list[Check] = [entry.load() for entry in entry_points(group="mmedpo_ray.checks")]
CHECKS: dict[str, Check] = {check.name: check for check in (*_BUILTIN, *_ADDED)}
