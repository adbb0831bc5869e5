"""Answers → statistics of every metric, scores with intervals, and paired differences between models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmedpo_ray.errors import UserError
from mmedpo_ray.metrics import METRICS, Answer, Metric, UnavailableError, statistics
from mmedpo_ray.metrics.answer_texts import unsupported_script
from mmedpo_ray.metrics.base import is_empty
from mmedpo_ray.metrics.closed_questions import verdict
from mmedpo_ray.metrics.verdict import judge

Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """An answer of a model, to be scored.

    Attributes:
        model: its name.
        question_id: what pairs the answers of two models; unique within a model.
        cluster: image; the bootstrap draws whole clusters.
        answer_type: closed, open or report.
        answer: reference, prediction and question.
        failed: the request brought no answer; it is scored as an empty one.
    """

    model: str
    question_id: str
    cluster: str
    answer_type: str
    answer: Answer
    failed: bool = False


@dataclass(frozen=True)
class Options:
    """Of intervals and tests.

    Attributes:
        resamples: draws of the bootstrap.
        confidence: of the intervals, such as 0.95.
        seed: of all draws.
    """

    resamples: int
    confidence: float
    seed: int


@dataclass
class Scored:
    """Rows with their statistics.

    Attributes:
        rows: as given.
        statistics: by metric, the places of the rows that it is about and their statistics, (N, K). Metrics
            without rows or without what they need are absent.
        left_out: why a metric is missing, by its name; only where that is worth saying.
    """

    rows: Sequence[Row]
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def score(rows: Sequence[Row]) -> Scored:
    """Computes the statistics of every metric that applies, for all models' answers together."""
    scored = Scored(rows)
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.answer_type, []).append(place)
    for metric in METRICS.values():
        where = places.get(metric.answer_type, [])
        if not where:
            continue
        references = list({rows[place].question_id: rows[place].answer.reference for place in where}.values())
        try:
            found = metric.of([rows[place].answer for place in where], references)
        except UnavailableError as error:
            if str(error):
                scored.left_out[metric.name] = str(error)
            continue
        scored.statistics[metric.name] = (np.array(where), found)
    return scored


def row_values(scored: Scored) -> list[dict[str, float | None]]:
    """Every metric's value of every row alone, null where the metric does not apply to it."""
    values: list[dict[str, float | None]] = [dict.fromkeys(scored.statistics) for _ in scored.rows]
    for name, (where, found) in scored.statistics.items():
        for place, value in zip(where.tolist(), METRICS[name].value(found).tolist(), strict=True):
            values[place][name] = value if np.isfinite(value) else None
    return values


def estimates(scored: Scored, model: str, options: Options) -> Figures:
    """A model's scores: ``{metric: {"value", "low", "high", "n"}}``."""
    return {
        name: _estimate(METRICS[name], [_of_model(scored, name, model)], options).as_dict()
        for name in scored.statistics
    }


def differences(scored: Scored, first: str, second: str, options: Options) -> Figures:
    """Scores of the first model minus those of the second on the questions that both answered.

    Returns:
        ``{metric: {"value", "low", "high", "n", "p", "p_holm", "verdict"}}``: "p" tests that there is none;
        "p_holm" is corrected for all main metrics compared here, and "verdict" is
        :func:`~mmedpo_ray.metrics.verdict.judge`'s; both are null for the others.
    """
    found: Figures = {}
    for name in scored.statistics:
        metric, both = METRICS[name], [_of_model(scored, name, model) for model in (first, second)]
        found[name] = _estimate(metric, both, options).as_dict()
        sums = _sums(both)
        tested = found[name]["value"] is not None
        found[name]["p"] = (
            statistics.paired_p_value(metric.value, sums[0], sums[1], seed=options.seed) if tested else None
        )
    compared = [
        name for name, item in found.items() if METRICS[name].role == "main" and item["p"] is not None
    ]
    corrected = dict(zip(compared, statistics.holm([found[name]["p"] for name in compared]), strict=True))
    calls = judge(found, options.confidence)
    return {
        name: item | {"p_holm": corrected.get(name), "verdict": calls.get(name)}
        for name, item in found.items()
    }


def counts(rows: Iterable[Row]) -> dict[str, Any]:
    """How many answers there are, and how many say nothing: each of these is failed, empty or undecided.

    Returns:
        answers; failed (no answer came back); empty (no word in it); closed (closed questions); undecided
        (answers to closed questions that decide for nothing), undecided_share (of closed; null without any).
        All of these count as wrong and stay in the denominator.
    """
    found: dict[str, Any] = dict.fromkeys(("answers", "failed", "empty", "closed", "undecided"), 0)
    for row in rows:
        found["answers"] += 1
        found["closed"] += row.answer_type == "closed"
        if row.failed:
            found["failed"] += 1
        elif is_empty(row.answer.prediction):
            found["empty"] += 1
        elif row.answer_type == "closed" and verdict(row.answer) == "undecided":
            found["undecided"] += 1
    return found | {"undecided_share": found["undecided"] / found["closed"] if found["closed"] else None}


def check_script(what: str, question: str, reference: str) -> None:
    """Refuses a question or reference in a script that the metrics cannot read.

    Args:
        what: names the row, such as ``"sample 17"``.
        question: as asked.
        reference: reference answer.

    Raises:
        UserError: it names row and script.
    """
    for kind, text in (("question", question), ("reference answer", reference)):
        script = unsupported_script(text)
        if script is not None:
            raise UserError(
                f"{what}: the {kind} is in {script} script. Scores are defined for Latin and Chinese texts only: leave "
                "such questions out, or translate them."
            )


# ---------------------------------------------------------------------- pairing

# Question id → (cluster, statistics).
_Statistics = dict[str, tuple[str, np.ndarray]]


def _of_model(scored: Scored, name: str, model: str) -> _Statistics:
    where, found = scored.statistics[name]
    return {
        row.question_id: (row.cluster, found[index])
        for index, row in enumerate(scored.rows[place] for place in where.tolist())
        if row.model == model
    }


def _common(models: list[_Statistics]) -> list[str]:
    return sorted(set.intersection(*(set(item) for item in models)))


def _sums(models: list[_Statistics]) -> list[np.ndarray]:
    """Sums of each cluster, for each model on the common questions."""
    common = _common(models)
    if not common:
        return [np.zeros((0, 1)) for _ in models]
    clusters = [models[0][question][0] for question in common]
    order = sorted(set(clusters))
    return [
        statistics.cluster_sums(np.stack([item[question][1] for question in common]), clusters, order)
        for item in models
    ]


def _estimate(metric: Metric, models: list[_Statistics], options: Options) -> statistics.Estimate:
    common = _common(models)
    if not common:
        return statistics.Estimate(float("nan"), float("nan"), float("nan"), 0)
    return statistics.bootstrap(
        metric.value,
        _sums(models),
        combine=statistics.difference if len(models) == 2 else None,
        n=len(common),
        resamples=options.resamples,
        confidence=options.confidence,
        seed=options.seed,
    )
