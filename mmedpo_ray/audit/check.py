"""What a check of the audit is, and what it needs to know of the audited table."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mmedpo_ray.audit.features import Features, NotCheckedError
from mmedpo_ray.audit.image_sample import ImageSample, measure_images
from mmedpo_ray.audit.samples import Samples
from mmedpo_ray.audit.settings import AuditConfig
from mmedpo_ray.datasets.pair_table import PairTable

Severity = Literal["high", "medium", "low", "info"]
SEVERITIES: tuple[Severity, ...] = ("high", "medium", "low", "info")

# A shortcut or an effect that shuffled labels reach more often than this is not reported.
CHANCE = 0.01


@dataclass(frozen=True)
class Audited:
    """A table of pairs and all that checks may look at.

    Attributes:
        pairs: the table.
        features: its numbers.
        settings: thresholds.
        samples: the samples table, or None.
        seed: draws the visual pairs whose images are read.
        max_pixels: larger images are not decoded.
    """

    pairs: PairTable
    features: Features
    settings: AuditConfig
    samples: Samples | None
    seed: int
    max_pixels: int

    @cached_property
    def images(self) -> ImageSample:
        """The images of some visual pairs; they are read once for all checks."""
        return measure_images(self.pairs, self.features, self.samples, self.seed, self.max_pixels)


@dataclass(frozen=True)
class Measured:
    """What a check counts.

    Attributes:
        rows: positions of rows that show it, best examples first.
        of: how many rows were checked.
        count: how many rows show it; None: all of ``rows``.
        figure: the number behind the severity; None: ``count`` / ``of``.
        severity: of checks without `Check.shares`; None: the check passed.
        values: what fills the placeholders of the message.
        causes: which of the check's remedies apply, where it has several.
        details: further figures, JSON-able.
    """

    rows: np.ndarray
    of: int
    count: int | None = None
    figure: float | None = None
    severity: Severity | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    causes: tuple[Hashable, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One check: what it looks for, how bad that is, and what to do about it.

    Attributes:
        name: of the finding.
        message: the finding in words, without any text of the data: ``{n:pair}`` is the count with its noun,
            other placeholders are `Measured.values`. What follows a colon is left out where the check passes.
        remedy: what to do; several remedies by their cause.
        measure: (N,) bool, the rows that show it, or `Measured` where there is more to tell. May raise
            `NotCheckedError`.
        shares: least share of the checked rows for each severity, worst first; 0: from the first row on.
            Empty: ``measure`` says the severity.
        kind: which pairs are checked.
        columns: columns that the table must have.
        fixable: whether ``--fix`` removes or repairs the rows.
    """

    name: str
    message: str
    remedy: str | Mapping[Any, str]
    measure: Callable[[Audited], np.ndarray | Measured]
    shares: Mapping[Severity, float] = field(default_factory=dict)
    kind: Literal["all", "text", "visual"] = "all"
    columns: tuple[str, ...] = ()
    fixable: bool = False

    def run(self, audited: Audited) -> Finding:
        """Makes the check.

        Raises:
            NotCheckedError: the table lacks what the check needs.
        """
        features = audited.features
        missing = [name for name in self.columns if name not in features.columns]
        if missing:
            raise NotCheckedError(f"the table has no column {' or '.join(missing)}")
        checked = {"text": features.text, "visual": features.visual}.get(self.kind)
        if checked is not None and not checked.any():
            raise NotCheckedError(f"the table has no {self.kind} pair")
        found = self.measure(audited)
        return Finding(self, found if isinstance(found, Measured) else count_rows(found, checked))


@dataclass(frozen=True)
class Finding:
    """A check with what it counted."""

    check: Check
    measured: Measured

    @property
    def count(self) -> int:
        """Rows that show it."""
        return len(self.measured.rows) if self.measured.count is None else self.measured.count

    @property
    def figure(self) -> float:
        """The number behind the severity, by default the share of the rows."""
        if self.measured.figure is not None:
            return self.measured.figure
        return self.count / self.measured.of if self.measured.of else 0.0

    @property
    def severity(self) -> Severity | None:
        """None where the check passed."""
        if not self.check.shares:
            return self.measured.severity
        reached = (level for level, share in self.check.shares.items() if 0 < self.figure >= share)
        return next(reached, None)

    @property
    def says(self) -> str:
        """The finding in words."""
        return self.check.message.format(n=Count(self.count), **self.measured.values)

    @property
    def remedy(self) -> str:
        """What to do."""
        remedy = self.check.remedy
        if isinstance(remedy, str):
            return remedy
        return "; ".join(dict.fromkeys(remedy[cause] for cause in self.measured.causes))


class Count(int):
    """A number whose format is a noun: ``f"{Count(2000):pair}"`` is "2,000 pairs"."""

    def __format__(self, noun: str) -> str:
        return f"{int(self):,} {noun}{'' if self == 1 else 's'}" if noun else f"{int(self):,}"


def count_rows(mask: np.ndarray, checked: np.ndarray | None = None, **more: Any) -> Measured:
    """Counts rows.

    Args:
        mask: (N,) bool, rows that show something.
        checked: (N,) bool, rows that were checked; None: all.
        more: further attributes of `Measured`.
    """
    shown = mask if checked is None else mask & checked
    return Measured(np.flatnonzero(shown), len(mask) if checked is None else int(checked.sum()), **more)


def percent(share: float) -> str:
    """A share in percent, never rounded to 0 or 100 unless it is."""
    if 0 < share < 0.0005:
        return "under 0.1 %"
    if 0.9995 < share < 1:
        return "over 99.9 %"
    return f"{100 * share:.1f} %"
