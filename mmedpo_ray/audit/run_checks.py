"""All checks on one table → the content of ``audit.json``."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from mmedpo_ray import __version__
from mmedpo_ray.audit.check import SEVERITIES, Audited, Finding
from mmedpo_ray.audit.checks import CHECKS
from mmedpo_ray.audit.features import Features, NotCheckedError
from mmedpo_ray.audit.samples import Samples
from mmedpo_ray.config.tree import Config
from mmedpo_ray.datasets.pair_table import PairTable
from mmedpo_ray.io import storage

# Raised when a key of audit.json changes its meaning.
SCHEMA = 1


def audit_key(config: Config, pairs: PairTable, samples: Samples | None) -> str:
    """Changes with the tables, the thresholds and the version; an equal key needs no new audit."""
    settings = config.audit.model_dump(mode="json", exclude={"enabled", "fail_on"})
    tables = [pairs.fingerprint, samples.fingerprint if samples else None]
    facts = [SCHEMA, __version__, list(CHECKS), *tables, settings, config.run.seed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


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
    audited = Audited(pairs, features, config.audit, samples, config.run.seed, config.data.max_pixels)
    results: list[Finding] = []
    not_checked: list[dict[str, str]] = []
    for name, check in CHECKS.items():
        try:
            results.append(check.run(audited))
        except NotCheckedError as reason:
            not_checked.append({"check": name, "reason": str(reason)})
    findings = sorted((result for result in results if result.severity), key=_rank)
    examples = [result.measured.rows[: config.audit.examples] for result in findings]
    ids = _pair_ids(pairs, examples)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "key": audit_key(config, pairs, samples),
        "table": storage.absolute(pairs.path),
        "samples": storage.absolute(samples.path) if samples else None,
        "rows": len(features),
        "text_pairs": int(features.text.sum()),
        "visual_pairs": int(features.visual.sum()),
        "counts": {level: sum(result.severity == level for result in findings) for level in SEVERITIES},
        "findings": [
            {
                "check": result.check.name,
                "severity": result.severity,
                "figure": round(result.figure, 6),
                "says": result.says,
                "count": result.count,
                "of": result.measured.of,
                "examples": [ids[row] for row in rows.tolist()],
                "remedy": result.remedy,
                "fixable": result.check.fixable,
                "details": result.measured.details,
            }
            for result, rows in zip(findings, examples, strict=True)
        ],
        "passed": [
            {
                "check": result.check.name,
                "figure": round(result.figure, 6),
                "says": result.says.partition(": ")[0],
            }
            for result in results
            if not result.severity
        ],
        "not_checked": not_checked,
    }


def _rank(finding: Finding) -> tuple[int, float]:
    """Worst first; within a severity the larger share of the rows."""
    assert finding.severity is not None
    return SEVERITIES.index(finding.severity), -finding.count / max(finding.measured.of, 1)


def _pair_ids(pairs: PairTable, examples: list[np.ndarray]) -> dict[int, str]:
    """Row → pair id of all examples, read in one pass."""
    rows = np.unique(np.concatenate([np.zeros(0, np.int64), *examples]))
    return dict(zip(rows.tolist(), map(str, pairs.values("pair_id", rows)), strict=True))
