"""The findings of a phantom radiograph and the two worlds they are drawn from.

In the *uniform* world every finding is equally likely, on either side, in any zone, alone or with any other.
The *biased* world resembles a clinical archive: a finding is nearly always on one side (94 : 6), mostly in
one zone (88 : 7 : 5) and mostly comes with its usual companion (75 %). A model trained on the biased world
can answer most questions from the text alone; in the uniform world it then hallucinates. That is the modality
misalignment of MMedPO (arXiv 2412.06141, section 1), here by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["effusion", "pneumothorax", "consolidation", "nodule", "cardiomegaly"]
Side = Literal["left", "right"]
Zone = Literal["upper", "middle", "lower"]
Size = Literal["small", "large"]
Prior = Literal["biased", "uniform"]

KINDS: tuple[Kind, ...] = ("effusion", "pneumothorax", "consolidation", "nodule", "cardiomegaly")
SIDES: tuple[Side, ...] = ("left", "right")
ZONES: tuple[Zone, ...] = ("upper", "middle", "lower")
SIZES: tuple[Size, ...] = ("small", "large")

LATERAL_KINDS: frozenset[Kind] = frozenset(KINDS) - {"cardiomegaly"}
ZONED_KINDS: frozenset[Kind] = frozenset({"consolidation", "nodule"})
SIZED_KINDS: frozenset[Kind] = frozenset({"effusion", "pneumothorax"})

SIDE_PRIOR = 0.94
USUAL_SIDE: dict[Kind, Side] = {
    "effusion": "left",
    "pneumothorax": "right",
    "consolidation": "right",
    "nodule": "left",
}
ZONE_PRIOR: dict[Kind, dict[Zone, float]] = {
    "consolidation": {"lower": 0.88, "middle": 0.07, "upper": 0.05},
    "nodule": {"upper": 0.88, "middle": 0.07, "lower": 0.05},
}
LARGE_PRIOR: dict[Kind, float] = {"effusion": 0.80, "pneumothorax": 0.20}
COMPANION_PRIOR = 0.75
COMPANION: dict[Kind, Kind] = {
    "effusion": "cardiomegaly",
    "pneumothorax": "effusion",
    "consolidation": "effusion",
    "nodule": "consolidation",
    "cardiomegaly": "effusion",
}
# The zone of the lung that a finding hides.
COVERED_ZONE: dict[Kind, Zone] = {"effusion": "lower", "pneumothorax": "upper"}
NUM_FINDINGS_UNIFORM = (0.15, 0.40, 0.45)
NORMAL_SHARE_BIASED = 0.15


@dataclass(frozen=True)
class Finding:
    """One finding of a frontal radiograph.

    Attributes:
        kind: What it is.
        side: The patient's side (the left side is on the right of the image); None for cardiomegaly.
        zone: Third of the lung, for consolidation and nodule; None for the others.
        size: "small" or "large", for effusion and pneumothorax; None for the others.
    """

    kind: Kind
    side: Side | None = None
    zone: Zone | None = None
    size: Size | None = None


def sample_findings(rng: np.random.Generator, prior: Prior) -> tuple[Finding, ...]:
    """Draws 0 to 2 findings of different kinds, in the order of `KINDS`.

    Args:
        rng: Source of randomness; the same state gives the same findings.
        prior: "biased" for the world with side, zone and companion priors, "uniform" for the one without.

    Raises:
        ValueError: If `prior` is neither of the two.
    """
    if prior not in ("biased", "uniform"):
        raise ValueError(f"prior must be 'biased' or 'uniform', not {prior!r}")
    kinds = _sample_kinds(rng, prior)
    while True:
        findings = tuple(_place(rng, kind, prior) for kind in KINDS if kind in kinds)
        if not _is_hidden(findings):
            return findings


def _sample_kinds(rng: np.random.Generator, prior: Prior) -> set[Kind]:
    if prior == "uniform":
        count = int(rng.choice(3, p=NUM_FINDINGS_UNIFORM))
        return {KINDS[i] for i in rng.choice(len(KINDS), size=count, replace=False)}
    if rng.random() < NORMAL_SHARE_BIASED:
        return set()
    first = KINDS[rng.integers(len(KINDS))]
    return {first, COMPANION[first]} if rng.random() < COMPANION_PRIOR else {first}


def _place(rng: np.random.Generator, kind: Kind, prior: Prior) -> Finding:
    """Draws side, zone and size with three random numbers, so one attribute never shifts another's draw."""
    u_side, u_zone, u_size = rng.random(3)
    is_biased = prior == "biased"
    side: Side | None = None
    zone: Zone | None = None
    size: Size | None = None
    if kind in LATERAL_KINDS and is_biased:
        usual = USUAL_SIDE[kind]
        side = usual if u_side < SIDE_PRIOR else SIDES[1 - SIDES.index(usual)]
    elif kind in LATERAL_KINDS:
        side = SIDES[int(u_side * 2)]
    if kind in ZONED_KINDS:
        shares = ZONE_PRIOR[kind] if is_biased else dict.fromkeys(ZONES, 1 / 3)
        edges = np.cumsum([shares[name] for name in ZONES])
        zone = ZONES[min(int(np.searchsorted(edges, u_zone, side="right")), 2)]
    if kind in SIZED_KINDS:
        size = "large" if u_size < (LARGE_PRIOR[kind] if is_biased else 0.5) else "small"
    return Finding(kind, side, zone, size)


def _is_hidden(findings: tuple[Finding, ...]) -> bool:
    """Whether one finding covers another, so that no reader could tell them apart."""
    if len(findings) < 2 or findings[0].side is None or findings[0].side != findings[1].side:
        return False
    first, second = findings
    return first.kind == "consolidation" or COVERED_ZONE[first.kind] == second.zone
