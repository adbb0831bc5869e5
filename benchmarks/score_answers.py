"""Seconds to score stored answers with intervals, on one core.

    taskset -c 0 python benchmarks/score_answers.py [--answers 1000000] [--resamples 2000] [--distinct]
        [--json FILE]

Two models, four questions an image, three closed to one open; every metric of these, the interval of each and
of the paired difference, the tests and counts. Reading the file is not in the figure.
Equal answers are scored once: by default there are few distinct ones, as with templated questions; with
``--distinct`` no two questions are alike.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from mmedpo_ray.evaluate import scoring
from mmedpo_ray.evaluate.scoring import Options, Row
from mmedpo_ray.metrics import Answer

_SIDES = ("left lung", "right lung", "left lower lobe", "right upper lobe")
_FINDINGS = ("nodule", "effusion", "pneumothorax", "mass", "fracture", "consolidation")


def make_rows(count: int, distinct: bool) -> list[Row]:
    """Seeded answers of two models, half each."""
    generator = np.random.default_rng(0)
    rows = []
    for model, right in (("base", 0.6), ("aligned", 0.65)):
        correct = generator.random(count // 2) < right
        picks = generator.integers(0, 4, (count // 2, 2))
        for number in range(count // 2):
            finding = _FINDINGS[(number // 4) % len(_FINDINGS)] + (f" of case {number}" if distinct else "")
            if number % 4:
                expected = "Yes" if picks[number, 0] < 2 else "No"
                said = expected if correct[number] else {"Yes": "No", "No": "Yes"}[expected]
                answer = Answer(expected, f"{said}.", f"Is there a {finding} in the {_SIDES[number % 4]}?")
            else:
                expected, other = _SIDES[picks[number, 0]], _SIDES[picks[number, 1]]
                answer = Answer(expected, expected if correct[number] else other, f"Where is the {finding}?")
            kind = "closed" if number % 4 else "open"
            rows.append(Row(model, f"q{number}", f"i{number // 4}", kind, answer))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=1_000_000)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--distinct", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    rows = make_rows(arguments.answers, arguments.distinct)
    options = Options(arguments.resamples, 0.95, 0)
    steps = {}
    started = time.perf_counter()
    scored = scoring.score(rows)
    steps["statistics"] = time.perf_counter() - started
    for name in ("base", "aligned"):
        scoring.estimates(scored, name, options)
        scoring.counts(row for row in rows if row.model == name)
    steps["intervals"] = time.perf_counter() - started - sum(steps.values())
    scoring.differences(scored, "aligned", "base", options)
    steps["differences"] = time.perf_counter() - started - sum(steps.values())
    for name, seconds in steps.items():
        print(f"{name:12} {seconds:7.1f} s")
    total = time.perf_counter() - started
    print(f"{'all':12} {total:7.1f} s  ({len(rows):,} answers, {len(rows) / total:,.0f} a second)")
    if arguments.json:
        figures = {"answers": len(rows), "distinct": arguments.distinct, "seconds": steps | {"all": total}}
        arguments.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
