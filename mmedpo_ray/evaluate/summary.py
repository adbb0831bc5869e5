"""The scores of a run: ``summary.json`` and the table at the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.table import Table
from rich.text import Text

from mmedpo_ray.evaluate import scoring
from mmedpo_ray.evaluate.look import CONDITIONS
from mmedpo_ray.evaluate.look_scores import headline, look_figures
from mmedpo_ray.evaluate.scoring import Options, Row
from mmedpo_ray.io import storage
from mmedpo_ray.metrics import METRICS, Answer, verdict
from mmedpo_ray.tables.merge import DROPPED

ROLES = ("base", "aligned", "control")

# What ingest appends to the id of an image that is one frame of its file.
_FRAME = re.compile(r"~f\d+\Z")


def rows_of(answers: pa.Table, questions: dict[str, str], failed: pa.Table | None = None) -> list[Row]:
    """Rows to score, from the `answers` table and the table of the requests that failed.

    Args:
        answers: `answers` table.
        questions: question by sample id.
        failed: rows of ``evaluate/dropped/``; they are scored as empty answers.
    """
    columns = ["model", "sample_id", "image_id", "answer_type", "reference", "prediction"]
    return [
        Row(
            row["model"],
            row["sample_id"],
            # Frames of one file form one cluster, as questions about one image do.
            _FRAME.sub("", row["image_id"]),
            row["answer_type"],
            Answer(row["reference"], row["prediction"] or "", questions.get(row["sample_id"], "")),
            failed=table is failed,
        )
        for table in (answers, failed)
        if table is not None
        for row in table.select(columns).to_pylist()
    ]


def summarise(
    answers: pa.Table,
    questions: dict[str, str],
    *,
    names: dict[str, str],
    options: Options,
    failed: pa.Table | None = None,
) -> dict[str, Any]:
    """Scores of every model with intervals, and differences on the questions that both models were asked.

    Args:
        answers: the `answers` table.
        questions: question by sample id.
        names: role (base, aligned, control) → name of the model.
        options: of intervals and tests.
        failed: requests that failed (``evaluate/dropped/``); scored as empty answers.

    Returns:
        ``{"models": {name: {metric: {"value", "low", "high", "n"}}}, "counts": {name: …}, "findings":
        {name: {observation: {outcome: count}}}, "difference":
        {metric: {…, "p", "p_holm", "verdict"}}, "difference_to_control": …, "left_out": {metric: why}}``;
        with answers about other images also "look", as
        :func:`~mmedpo_ray.evaluate.look_scores.look_figures` returns it.
    """
    rows = rows_of(_about(answers, None), questions, None if failed is None else _about(failed, None))
    scored = scoring.score(rows)
    asked = {row.model for row in rows}
    models = [names[role] for role in ROLES if names.get(role) in asked]

    def difference(role: str) -> scoring.Figures:
        first, second = names["aligned"], names.get(role)
        if second is None or not {first, second} <= asked:
            return {}
        return scoring.differences(scored, first, second, options)

    return {
        "models": {name: scoring.estimates(scored, name, options) for name in models},
        "counts": {name: scoring.counts(row for row in rows if row.model == name) for name in models},
        "findings": {name: found for name in models if (found := scoring.findings(rows, name))},
        "difference": difference("base"),
        "difference_to_control": difference("control"),
        "left_out": scored.left_out,
        "images": len({row.cluster for row in rows}),
        "questions": len({row.question_id for row in rows}),
        **_look(rows, answers, questions, models, options),
    }


def _about(answers: pa.Table, condition: str | None) -> pa.Table:
    """The answers about the questions' own images (None), or about those of a condition of ``look``."""
    if "shown" not in answers.column_names:
        return answers if condition is None else answers.slice(0, 0)
    shown = answers["shown"]
    return answers.filter(pc.is_null(shown) if condition is None else pc.equal(shown, condition))


def _look(
    rows: Sequence[Row],
    answers: pa.Table,
    questions: dict[str, str],
    models: Sequence[str],
    options: Options,
) -> dict[str, Any]:
    """``{"look": figures}``, nothing where ``evaluate.look`` was off."""
    others = {condition: rows_of(_about(answers, condition), questions) for condition in CONDITIONS}
    return {"look": look_figures(rows, others, models, options)} if any(others.values()) else {}


def failed_rows(folder: str) -> pa.Table | None:
    """The requests of a finished evaluation that failed; None if all succeeded."""
    paths = storage.list_files(storage.join(folder, DROPPED), ".parquet")
    if not paths:
        return None
    table = pa.concat_tables([storage.read_parquet(path) for path in paths])
    # A row without its reference cannot be scored; ingest lets none through.
    return table.filter(pc.is_valid(table["reference"]))


# ---------------------------------------------------------------------- terminal


def summary_table(summary: dict[str, Any]) -> Table:
    """The scores as a table: a column a model, then the differences with their intervals."""
    names = summary["names"]
    aligned = names.get("aligned", "aligned")
    compared = [(aligned, names.get("base", "base"), summary["difference"])]
    if "control" in names:
        compared.append((aligned, names["control"], summary["difference_to_control"]))
    return score_table(summary, list(names.values()), compared)


def score_table(
    summary: dict[str, Any],
    models: Sequence[str],
    compared: Sequence[tuple[str, str, scoring.Figures]],
    clusters: str = "images",
) -> Table:
    """The scores as a table.

    Args:
        summary: "models", "counts", "questions", "images", "confidence", "left_out".
        models: a column each.
        compared: first model, second model and their differences: a column each.
        clusters: what the intervals are over.
    """
    confidence = summary["confidence"]
    title = f"{summary['questions']:,} questions"
    if clusters == "images":
        title += f" about {summary['images']:,} images"
    calls = [verdict.judge(found, confidence) for _, _, found in compared]
    table = Table(
        title=f"{title}, {confidence:.0%} intervals over {clusters}",
        caption=Text(_caption(summary, calls)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("", overflow="fold")
    for name in models:
        table.add_column(Text(name.replace("_", "_\n", 1)), justify="right", overflow="fold")
    for first, second, _ in compared:
        table.add_column(Text(f"{first} −\n{second}"), justify="right", overflow="fold")
    for key, metric in METRICS.items():
        values = [summary["models"].get(name, {}).get(key) for name in models]
        if metric.role == "official" or not any(value and value["n"] for value in values):
            continue
        cells = [_cell(value) for value in values]
        cells += [
            _difference_cell(found.get(key), call.get(key))
            for (_, _, found), call in zip(compared, calls, strict=True)
        ]
        table.add_row(metric.label, *cells)
    for label, cells in _count_rows(summary.get("counts") or {}, models):
        table.add_row(label, *cells, *[""] * len(compared), style="dim")
    return table


def _count_rows(counts: dict[str, dict[str, int]], models: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Label and cells of the answers that say nothing; they count as wrong above."""
    found = [counts.get(name) for name in models]
    rows = []
    if any(item and item["closed"] for item in found):
        cells = [
            f"{item['undecided']:,} ({item['undecided'] / item['closed']:.0%})"
            if item and item["closed"]
            else "–"
            for item in found
        ]
        rows.append(("undecided, of closed", cells))
    for key, label in (("empty", "empty answers"), ("failed", "failed requests")):
        if any(found):
            rows.append((label, [f"{item[key]:,}" if item else "–" for item in found]))
    return rows


def _caption(summary: dict[str, Any], calls: Sequence[dict[str, verdict.Call]]) -> str:
    lines = []
    if any(call in (verdict.BETTER, verdict.WORSE) for found in calls for call in found.values()):
        number = max(len(found) for found in calls)
        lines.append(
            f"* a difference: p < {1 - summary['confidence']:.2g} with Holm's correction over {number} "
            "metrics"
        )
    looked = summary.get("look", {})
    lines += [line for name in looked.get("models", {}) if (line := headline(looked, name))]
    lines += [f"{reason}." for reason in (summary.get("left_out") or {}).values()]
    return "\n".join(lines)


def _cell(value: dict[str, Any] | None) -> str:
    if not value or value["value"] is None:
        return "–"
    if value["low"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f}\n[dim]\\[{_short(value['low'])}, {_short(value['high'])}][/dim]"


def _difference_cell(value: dict[str, Any] | None, call: verdict.Call | None) -> str:
    if not value or value["value"] is None or value["low"] is None:
        return "–"
    interval = f"\\[{_short(value['low'], '+')}, {_short(value['high'], '+')}]"
    mark = "*" if call in (verdict.BETTER, verdict.WORSE) else ""
    colour = {"better": "green", "worse": "red"}.get(call or "", "none")
    shown = f"{value['value']:+.3f}"
    shown = "0.000" if shown in ("+0.000", "-0.000") else shown
    return f"[{colour}]{shown}{mark}\n{interval}[/{colour}]"


def _short(number: float, sign: str = "") -> str:
    """Three decimals without the zero before the point."""
    text = format(number, f"{sign}.3f")
    return text.replace("0.", ".", 1) if abs(number) < 1 else text
