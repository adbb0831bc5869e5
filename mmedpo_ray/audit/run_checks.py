"""All checks on one table → the content of ``audit.json``."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from mmedpo_ray import __version__
from mmedpo_ray.audit.checks.across_rows import ROW_CHECKS
from mmedpo_ray.audit.checks.answers import TEXT_CHECKS
from mmedpo_ray.audit.checks.shortcuts import SHORTCUT_CHECKS
from mmedpo_ray.audit.checks.visual import IMAGE_CHECKS, VISUAL_CHECKS, image_findings
from mmedpo_ray.audit.checks.weights import WEIGHT_CHECKS
from mmedpo_ray.audit.features import Features
from mmedpo_ray.audit.finding import SEVERITIES, Check, Finding, NotCheckedError, noun, share_severity
from mmedpo_ray.audit.samples import Samples
from mmedpo_ray.config.tree import Config
from mmedpo_ray.datasets.pair_table import PairTable
from mmedpo_ray.io import storage

# Raised when a key of audit.json changes its meaning.
SCHEMA = 1
CHECKS: dict[str, Check] = SHORTCUT_CHECKS | TEXT_CHECKS | ROW_CHECKS | WEIGHT_CHECKS | VISUAL_CHECKS
# Every name that a finding can have.
NAMES = (*CHECKS, *IMAGE_CHECKS, "malformed_row")


def audit_key(config: Config, pairs: PairTable, samples: Samples | None) -> str:
    """Changes with the tables, the thresholds and the version; an audit with the same key need not be made again."""
    settings = config.audit.model_dump(mode="json", exclude={"enabled", "fail_on"})
    facts = [
        SCHEMA,
        __version__,
        NAMES,
        pairs.fingerprint,
        samples.fingerprint if samples else None,
        settings,
    ]
    return hashlib.sha256(json.dumps([*facts, config.run.seed]).encode()).hexdigest()[:16]


def examine(config: Config, pairs: PairTable, features: Features, samples: Samples | None) -> dict[str, Any]:
    """Runs every check.

    Args:
        config: thresholds, number of examples, seed of the image sample.
        pairs: the table.
        features: its numbers.
        samples: the samples table, or None.

    Returns:
        The content of ``audit.json`` (docs/how-to/audit.md); the same table gives the same content.
    """
    findings: list[Finding] = []
    unchecked: list[dict[str, str]] = []
    for name, check in CHECKS.items():
        try:
            findings.append(check(features, config.audit))
        except NotCheckedError as reason:
            unchecked.append({"check": name, "reason": str(reason)})
    of_images, impossible = image_findings(
        pairs, features, samples, seed=config.run.seed, max_pixels=config.data.max_pixels
    )
    findings += of_images
    unchecked += [{"check": name, "reason": reason} for name, reason in impossible.items()]
    findings.append(_malformed(pairs))
    found = sorted((item for item in findings if item.severity), key=_rank)
    ids = _ids(pairs, {item.check: item.rows[: config.audit.examples] for item in found})
    return {
        "schema": SCHEMA,
        "version": __version__,
        "key": audit_key(config, pairs, samples),
        "table": storage.absolute(pairs.path),
        "samples": storage.absolute(samples.path) if samples else None,
        "rows": len(features),
        "text_pairs": int(features.text.sum()),
        "visual_pairs": int(features.visual.sum()),
        "counts": {level: sum(item.severity == level for item in found) for level in SEVERITIES},
        "findings": [
            {
                "check": item.check,
                "severity": item.severity,
                "figure": round(item.figure, 6),
                "says": item.says,
                "count": item.count,
                "of": item.of,
                "examples": ids[item.check],
                "remedy": item.remedy,
                "fixable": item.fixed,
                "details": item.details,
            }
            for item in found
        ],
        "passed": [
            {"check": item.check, "figure": round(item.figure, 6), "says": item.says.partition(": ")[0]}
            for item in findings
            if not item.severity
        ],
        "not_checked": unchecked,
    }


def _rank(item: Finding) -> tuple[int, float]:
    """Worst first; within a severity the larger share of the rows."""
    assert item.severity is not None
    return SEVERITIES.index(item.severity), -item.count / max(item.of, 1)


def _malformed(pairs: PairTable) -> Finding:
    count, of = len(pairs.malformed), pairs.num_rows + len(pairs.malformed)
    places = (
        f" (positions {', '.join(map(str, pairs.malformed[:5]))}{', …' if count > 5 else ''})"
        if count
        else ""
    )
    return Finding(
        check="malformed_row",
        severity=share_severity(count, of, high=0.05, medium=0.01),
        figure=count / of if of else 0.0,
        says=f"{noun(count, 'row')} that are no preference pair and were not audited{places}",
        count=count,
        of=of,
        rows=np.zeros(0, np.int64),
        remedy="mend the rows, or leave them out (--fix)",
        fixed=True,
    )


def _ids(pairs: PairTable, rows: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """Pair ids of the examples, read in one pass."""
    every = np.unique(np.concatenate([*rows.values(), np.zeros(0, np.int64)])).astype(np.int64)
    names = dict(zip(every.tolist(), map(str, pairs.values("pair_id", every)), strict=True))
    return {check: [names[int(row)] for row in positions] for check, positions in rows.items()}
