"""``mmedpo evaluate --answers FILE``: scores answers that exist, without endpoint, Ray, GPU or settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from mmedpo_ray.console import console
from mmedpo_ray.evaluate import scoring
from mmedpo_ray.evaluate.answers_file import Given, read
from mmedpo_ray.evaluate.pairing import pair
from mmedpo_ray.evaluate.scoring import Options, Row
from mmedpo_ray.evaluate.summary import score_table
from mmedpo_ray.io import storage
from mmedpo_ray.metrics import METRICS, verdict


def evaluate_file(uri: str, options: Options) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores the answers of a file.

    Args:
        uri: JSON lines, JSON list (.json) or Parquet (.parquet).
        options: of intervals and tests.

    Returns:
        The summary and a row an answer, in the file's order: ``model``, ``id`` and ``sample_id`` if given,
        and every metric's value. The summary is ``{"models": {name: {metric: {"value", "low", "high", "n"}}},
        "counts": {name: …}, "differences": [{"first", "second", "paired", "unpaired", "metrics": {metric: {…,
        "p", "p_holm", "verdict"}}}], …}``.

    Raises:
        UserError: the file is missing, a row cannot be used, or is in a script that cannot be scored; it
            names file and row.
    """
    given = read(uri)
    for row in given:
        scoring.check_script(f"{uri}, {row.where}{row.id_in_words}", row.question, row.reference)
    pairing = pair(given, uri)
    scored = scoring.score(pairing.rows)
    models = list(dict.fromkeys(row.model for row in pairing.rows))
    summary = {
        "answers": uri,
        "models": {name: scoring.estimates(scored, name, options) for name in models},
        "counts": {name: scoring.counts(row for row in pairing.rows if row.model == name) for name in models},
        "findings": {name: found for name in models if (found := scoring.findings(pairing.rows, name))},
        "differences": [_difference(scored, pairing.rows, first, models[0], options) for first in models[1:]],
        "paired_by": pairing.by if len(models) > 1 else None,
        "clusters": "images" if pairing.clustered else "answers",
        "left_out": scored.left_out,
        "questions": len({row.question_id for row in pairing.rows}),
        "images": len({row.cluster for row in pairing.rows}) if pairing.clustered else None,
        "bootstrap": options.resamples,
        "confidence": options.confidence,
        "seed": options.seed,
    }
    return summary, _rows(given, pairing.rows, scored)


def _difference(
    scored: scoring.Scored, rows: Sequence[Row], first: str, second: str, options: Options
) -> dict[str, Any]:
    questions = [{row.question_id for row in rows if row.model == model} for model in (first, second)]
    return {
        "first": first,
        "second": second,
        "paired": len(questions[0] & questions[1]),
        "unpaired": {first: len(questions[0] - questions[1]), second: len(questions[1] - questions[0])},
        "metrics": scoring.differences(scored, first, second, options),
    }


def _rows(given: Sequence[Given], rows: Sequence[Row], scored: scoring.Scored) -> list[dict[str, Any]]:
    # Metrics that were not computed are null too, so that every file has the same columns.
    columns = dict.fromkeys(METRICS)
    return [
        item.ids | {"model": row.model} | columns | values
        for item, row, values in zip(given, rows, scoring.row_values(scored), strict=True)
    ]


def _write(path: str, text: str) -> None:
    storage.write_bytes(storage.absolute(path), text.encode("utf-8"))


def answers_command(uri: str, options: Options, *, json_path: str | None, rows_path: str | None) -> None:
    """Scores a file of answers, prints the table and the verdicts, and writes the files that are asked for.

    Args:
        uri: the answers.
        options: of intervals and tests.
        json_path: where the summary goes; ``-``: the standard output; None: nowhere.
        rows_path: where the answers with their scores go; None: nowhere.
    """
    summary, rows = evaluate_file(uri, options)
    if rows_path:
        lines = (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
        _write(rows_path, "".join(lines))
    if json_path:
        # ASCII, since the standard output may not know more.
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        if json_path == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            _write(json_path, text)
    compared = [(item["first"], item["second"], item["metrics"]) for item in summary["differences"]]
    console.print(score_table(summary, list(summary["models"]), compared, summary["clusters"]))
    if summary["clusters"] != "images":
        console.print(
            "There is no image_id: each question counts as an image of its own. If images have several "
            "questions, the intervals are too narrow."
        )
    for item in summary["differences"]:
        unpaired = sum(item["unpaired"].values())
        left = f"; {unpaired:,} answers have no partner and take no part in differences" if unpaired else ""
        console.print(
            f"{item['first']} and {item['second']}: {item['paired']:,} questions paired by "
            f"{summary['paired_by']}{left}.",
            markup=False,
        )
        found = verdict.compare(
            item["metrics"], other=item["second"], other_is="", confidence=options.confidence
        )
        if found is not None:
            console.print(Text(f"{item['first']}: ", "bold") + Text(found.headline))
