"""What every check of the audit returns, and how the share of rows concerned becomes a severity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mmedpo_ray.audit.features import Features
from mmedpo_ray.audit.settings import AuditConfig

Severity = Literal["high", "medium", "low", "info"]
SEVERITIES: tuple[Severity, ...] = ("high", "medium", "low", "info")

# A shortcut or an effect that shuffled labels reach more often than this is not reported.
CHANCE = 0.01


class NotCheckedError(Exception):
    """The table lacks what a check needs; the message says what."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: name of the check.
        severity: None where the check passed.
        figure: the number behind the severity.
        says: the figures in words, without any text of the data.
        count: rows concerned.
        of: rows that were checked.
        rows: positions of rows that show it, best examples first; may be fewer than ``count``.
        remedy: what to do.
        fixed: whether ``--fix`` mends it.
        details: further figures, JSON-able.
    """

    check: str
    severity: Severity | None
    figure: float
    says: str
    count: int
    of: int
    rows: np.ndarray
    remedy: str
    fixed: bool = False
    details: dict[str, Any] = field(default_factory=dict)


Check = Callable[[Features, AuditConfig], Finding]


def share_severity(
    count: int, of: int, *, high: float | None = None, medium: float | None = None, least: Severity = "low"
) -> Severity | None:
    """Severity by the share of rows concerned: ``least`` from the first row on, None without any."""
    if count == 0:
        return None
    share = count / of
    if high is not None and share >= high:
        return "high"
    return "medium" if medium is not None and share >= medium else least


def finding_of_rows(
    check: str, mask: np.ndarray, of: int, severity: Severity | None, says: str, remedy: str, **more: Any
) -> Finding:
    rows = np.flatnonzero(mask)
    return Finding(
        check=check,
        severity=severity,
        figure=len(rows) / of if of else 0.0,
        says=says,
        count=len(rows),
        of=of,
        rows=rows,
        remedy=remedy,
        **more,
    )


def percent(share: float) -> str:
    """A share in percent, never rounded to 0 or 100 unless it is."""
    if 0 < share < 0.0005:
        return "under 0.1 %"
    if 0.9995 < share < 1:
        return "over 99.9 %"
    return f"{100 * share:.1f} %"


def noun(count: int, name: str) -> str:
    """ "1 pair", "2,000 pairs"."""
    return f"{count:,} {name}" + ("" if count == 1 else "s")


def text_pairs(features: Features) -> np.ndarray:
    """(N,) bool, the pairs whose answers differ by design.

    Raises:
        NotCheckedError: there is none.
    """
    if not features.text.any():
        raise NotCheckedError("the table has no text pair")
    return features.text
