"""Answers → statistics of every metric, scores with intervals, and paired differences between models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mmedpo_ray.errors import UserError
from mmedpo_ray.metrics import METRICS, Answer, UnavailableError, statistics
from mmedpo_ray.metrics.answer_texts import unsupported_script
from mmedpo_ray.metrics.base import is_empty, mean_value
from mmedpo_ray.metrics.closed_questions import verdict
from mmedpo_ray.metrics.finding_labels import finding_figures
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
        failed: the request failed; it is scored as an empty answer.
    """

    model: str
    question_id: str
    cluster: str
    answer_type: str
    answer: Answer
    failed: bool = False


@dataclass(frozen=True)
class Options:
    """Options of intervals and tests.

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
        statistics: by metric, the positions of the rows that it is about and their statistics, (N, K). A
            metric without rows, or that cannot be computed here, is absent.
        left_out: why a metric cannot be computed, by its name; only if that is worth saying.
        paired: questions that models share, by kind of answer and models, as they are first asked for.
    """

    rows: Sequence[Row]
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    paired: dict[tuple[str, tuple[str, ...]], _Paired] = field(default_factory=dict, repr=False)


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
            # Many answers are equal, above all to closed questions.
            distinct: dict[Answer, int] = {}
            of_row = [distinct.setdefault(rows[place].answer, len(distinct)) for place in where]
            found = metric.of(list(distinct), references)[of_row]
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
    return {name: _estimate(name, *_cluster_sums(scored, name, model), options) for name in scored.statistics}


def differences(scored: Scored, first: str, second: str, options: Options) -> Figures:
    """Scores of the first model minus those of the second on the questions that both answered.

    Returns:
        ``{metric: {"value", "low", "high", "n", "p", "p_holm", "verdict", "detectable", "mcnemar"}}``: "p"
        tests that there is none; "detectable" is the smallest true difference that a set like this one shows
        four times in five, before any correction; "mcnemar" is ``{"gained", "lost", "p"}`` where each answer
        is right or wrong, else null;
        "p_holm" is corrected for all main metrics compared here, and "verdict" is
        :func:`~mmedpo_ray.metrics.verdict.judge`'s; both are null for the others.
    """
    found: Figures = {}
    for name in scored.statistics:
        sums, n = _cluster_sums(scored, name, first, second)
        item = found[name] = _estimate(name, sums, n, options)
        tested = item["value"] is not None
        value = METRICS[name].value
        item["p"] = statistics.paired_p_value(value, *sums, seed=options.seed) if tested else None
        item["detectable"] = statistics.detectable_difference(item["low"], item["high"], options.confidence)
        item["mcnemar"] = _mcnemar(scored, name, first, second)
    compared = [
        name for name, item in found.items() if METRICS[name].role == "main" and item["p"] is not None
    ]
    corrected = dict(zip(compared, statistics.holm([found[name]["p"] for name in compared]), strict=True))
    calls = judge(found, options.confidence)
    return {
        name: item | {"p_holm": corrected.get(name), "verdict": calls.get(name)}
        for name, item in found.items()
    }


def findings(rows: Iterable[Row], model: str) -> dict[str, dict[str, int]]:
    """What becomes of the findings in a model's reports, by observation of CheXpert's.

    Returns:
        ``{observation: {outcome: count}}``, see :func:`mmedpo_ray.metrics.finding_labels.outcomes`.
    """
    return finding_figures([row.answer for row in rows if (row.model, row.answer_type) == (model, "report")])


def counts(rows: Iterable[Row]) -> dict[str, Any]:
    """How many answers there are, and how many say nothing: these are failed, empty or undecided.

    Returns:
        answers; failed (no answer came back); empty (no word in it); closed (closed questions); undecided
        (answers to closed questions that make no decision), undecided_share (of closed; null without any).
        All of these count as wrong and stay in the denominator.
    """
    found: dict[str, Any] = dict.fromkeys(("answers", "failed", "empty", "closed", "undecided"), 0)
    alike = Counter((row.answer_type == "closed", row.failed, row.answer) for row in rows)
    for (closed, failed, answer), count in alike.items():
        found["answers"] += count
        found["closed"] += count if closed else 0
        if failed:
            found["failed"] += count
        elif is_empty(answer.prediction):
            found["empty"] += count
        elif closed and verdict(answer) == "undecided":
            found["undecided"] += count
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
                f"{what}: the {kind} is in {script} script. Scores are defined for Latin and Chinese script "
                "only: leave such questions out, or translate them."
            )


@dataclass(frozen=True)
class _Paired:
    """Questions of one kind that all of some models answered.

    Attributes:
        positions: of each model, the rows of the metric's statistics, in the same order of questions.
        codes: number of each question's cluster (image).
        num_clusters: how many there are.
    """

    positions: list[np.ndarray]
    codes: np.ndarray
    num_clusters: int


def _paired(scored: Scored, name: str, *models: str) -> _Paired:
    """The questions that a metric is about and all of the models answered; metrics of one kind share them."""
    key = (METRICS[name].answer_type, models)
    if key not in scored.paired:
        where, _ = scored.statistics[name]
        of_models: dict[str, dict[str, int]] = {model: {} for model in models}
        for position, place in enumerate(where.tolist()):
            row = scored.rows[place]
            if row.model in of_models:
                of_models[row.model][row.question_id] = position
        common = sorted(set.intersection(*map(set, of_models.values())))
        positions = [np.array([each[question] for question in common], int) for each in of_models.values()]
        clusters = [scored.rows[place].cluster for place in where[positions[0]].tolist()]
        code = {cluster: number for number, cluster in enumerate(sorted(set(clusters)))}
        scored.paired[key] = _Paired(positions, np.array([code[each] for each in clusters], int), len(code))
    return scored.paired[key]


def _cluster_sums(scored: Scored, name: str, *models: str) -> tuple[list[np.ndarray], int]:
    """A metric's sums on the questions that all of the models answered.

    Returns:
        For each model the sums of each cluster (image), (C, K), and the number of these questions.
    """
    found, paired = scored.statistics[name][1], _paired(scored, name, *models)
    sums = [
        statistics.coded_sums(found[each], paired.codes, paired.num_clusters) for each in paired.positions
    ]
    return sums, len(paired.codes)


def _mcnemar(scored: Scored, name: str, first: str, second: str) -> dict[str, Any] | None:
    """Questions that only one of two models answered right, and McNemar's exact test of them."""
    if METRICS[name].value is not mean_value:
        return None
    _, found = scored.statistics[name]
    numbers = [found[each] for each in _paired(scored, name, first, second).positions]
    if not all(((each == 0) | (each == 1)).all() and (each[:, 1] == 1).all() for each in numbers):
        return None
    right, other = (each[:, 0] > 0 for each in numbers)
    gained, lost = int((right & ~other).sum()), int((other & ~right).sum())
    return {"gained": gained, "lost": lost, "p": statistics.mcnemar_p_value(gained, lost)}


def _estimate(name: str, sums: list[np.ndarray], n: int, options: Options) -> dict[str, Any]:
    return statistics.bootstrap(METRICS[name].value, sums, n=n, **asdict(options)).as_dict()
