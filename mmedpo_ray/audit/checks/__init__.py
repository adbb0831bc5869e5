"""The checks of the audit, a file for each family.

`CHECKS` lists them; a new file is added to `_FAMILIES`.
"""

from __future__ import annotations

from mmedpo_ray.audit.check import Check
from mmedpo_ray.audit.checks import answers, images, rows, samples, shortcuts, visual, weights

_FAMILIES = (shortcuts, answers, rows, samples, weights, visual, images)
CHECKS: dict[str, Check] = {check.name: check for family in _FAMILIES for check in family.CHECKS}
