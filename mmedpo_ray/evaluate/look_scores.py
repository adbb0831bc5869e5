"""Answers with and without the image → how much of a model's accuracy comes from the image.

Each question gives four numbers, which add up over images: right with its own image, right with the other,
right with both, and whether the words of the answer changed. Intervals are clustered bootstraps over images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mmedpo_ray.evaluate.look import CONDITIONS
from mmedpo_ray.evaluate.scoring import Options, Row
from mmedpo_ray.metrics import METRICS, statistics
from mmedpo_ray.metrics.base import mean_value
from mmedpo_ray.radiology.lexicon import final_answer
from mmedpo_ray.radiology.lexicon.tokens import tokens

_RIGHT_BY = {"closed": METRICS["closed_accuracy"], "open": METRICS["open_exact"]}
_OWN, _OTHER, _BOTH, _CHANGED, _COUNT = range(5)


def _share(*columns: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda sums: mean_value(sums[..., list(columns)])


def _drop(sums: np.ndarray) -> np.ndarray:
    return _share(_OWN, _COUNT)(sums) - _share(_OTHER, _COUNT)(sums)


# Name → the value of summed statistics (…, 5).
FIGURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "accuracy": _share(_OWN, _COUNT),
    "accuracy_without": _share(_OTHER, _COUNT),
    "drop": _drop,
    "changed": _share(_CHANGED, _COUNT),
    "survive": _share(_BOTH, _OWN),
}


def look_figures(
    own: Iterable[Row], others: Mapping[str, Sequence[Row]], models: Sequence[str], options: Options
) -> dict[str, Any]:
    """What is left of each model's answers under each condition.

    Args:
        own: answers about the questions' own images.
        others: by condition, the answers about other images.
        models: names, in the order of the result.
        options: of intervals and tests.

    Returns:
        ``{"models": {name: {condition: {kind: {figure: {"value", "low", "high", "n"}}}}}, "differences":
        {name: {condition: {"value", "low", "high", "n", "p", "p_holm"}}}}``. Kinds: all, closed, open, where
        there are any. Figures: accuracy; accuracy_without the image; drop, their difference; changed, the
        share of answers with other words; survive, the share of the right answers that are right without the
        image too. Differences are of the drop, the model's minus the first model's, on the questions that
        both were asked; p is corrected over models and conditions. A question whose other request failed does
        not count; a failed request about its own image is a wrong answer.
    """
    by_key = {(row.model, row.question_id): row for row in own if row.answer_type in _RIGHT_BY}
    found: dict[str, Any] = {name: {} for name in models}
    differences: dict[str, dict[str, Any]] = {name: {} for name in models[1:]}
    for condition in CONDITIONS:
        pairs = [
            (before, row)
            for row in others.get(condition, ())
            if not row.failed and (before := by_key.get((row.model, row.question_id))) is not None
        ]
        if not pairs:
            continue
        numbers = _statistics(pairs)
        of_model = {
            name: [place for place, (row, _) in enumerate(pairs) if row.model == name] for name in models
        }
        for name, places in of_model.items():
            kinds = {
                kind: chosen
                for kind in ("all", *_RIGHT_BY)
                if (chosen := [p for p in places if kind in ("all", pairs[p][0].answer_type)])
            }
            found[name][condition] = {
                kind: {
                    figure: _estimate(value, [_sums(pairs, numbers, chosen)], len(chosen), options)
                    for figure, value in FIGURES.items()
                }
                for kind, chosen in kinds.items()
            }
        for name in differences:
            if item := _difference(pairs, numbers, of_model[name], of_model[models[0]], options):
                differences[name][condition] = item
    tested = [item for of_conditions in differences.values() for item in of_conditions.values()]
    for item, corrected in zip(tested, statistics.holm([item["p"] for item in tested]), strict=True):
        item["p_holm"] = corrected
    return {"models": found, "differences": differences}


def _statistics(pairs: Sequence[tuple[Row, Row]]) -> np.ndarray:
    """The five sums of each question, (N, 5)."""
    numbers = np.ones((len(pairs), 5))
    for kind, metric in _RIGHT_BY.items():
        places = [place for place, (row, _) in enumerate(pairs) if row.answer_type == kind]
        if places:
            for column in (_OWN, _OTHER):
                answers = [pairs[place][column].answer for place in places]
                numbers[places, column] = metric.of(answers)[:, 0]
    numbers[:, _BOTH] = numbers[:, _OWN] * numbers[:, _OTHER]
    numbers[:, _CHANGED] = [_words(own) != _words(other) for own, other in pairs]
    return numbers


def _words(row: Row) -> list[str]:
    return tokens(final_answer(row.answer.prediction))


def _sums(
    pairs: Sequence[tuple[Row, Row]],
    numbers: np.ndarray,
    places: Sequence[int],
    order: Sequence[str] | None = None,
) -> np.ndarray:
    clusters = [pairs[place][0].cluster for place in places]
    return statistics.cluster_sums(numbers[places], clusters, order or sorted(set(clusters)))


def _difference(
    pairs: Sequence[tuple[Row, Row]],
    numbers: np.ndarray,
    first: Sequence[int],
    second: Sequence[int],
    options: Options,
) -> dict[str, Any] | None:
    """The first model's drop minus the second's on the questions of both; None without any."""
    asked = [{pairs[place][0].question_id: place for place in places} for places in (first, second)]
    common = sorted(asked[0].keys() & asked[1].keys())
    if not common:
        return None
    order = sorted({pairs[asked[0][question]][0].cluster for question in common})
    sums = [_sums(pairs, numbers, [of_model[question] for question in common], order) for of_model in asked]
    item = _estimate(_drop, sums, len(common), options)
    return item | {"p": statistics.paired_p_value(_drop, *sums, seed=options.seed)}


def _estimate(
    value: Callable[[np.ndarray], np.ndarray], sums: Sequence[np.ndarray], n: int, options: Options
) -> dict[str, Any]:
    return statistics.bootstrap(value, sums, n=n, **asdict(options)).as_dict()


def headline(figures: dict[str, Any], model: str) -> str | None:
    """The number to remember, in a sentence; None without a right answer."""
    survive = figures.get("models", {}).get(model, {}).get("blank", {}).get("all", {}).get("survive")
    if not survive or survive["value"] is None:
        return None
    interval = "" if survive["low"] is None else f" [{100 * survive['low']:.0f}, {100 * survive['high']:.0f}]"
    return f"Of {model}'s right answers, {100 * survive['value']:.0f} %{interval} survive without the image."
