"""What a comparison says besides its interval: questions gained and lost, and what it could have shown."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm

from mmedpo_ray.evaluate import scoring
from mmedpo_ray.evaluate.scoring import Options, Row
from mmedpo_ray.metrics import Answer, statistics
from mmedpo_ray.metrics.base import mean_value
from mmedpo_ray.metrics.statistics import detectable_difference, mcnemar_p_value

OPTIONS = Options(resamples=500, confidence=0.95, seed=0)


def rows(model: str, right: list[bool]) -> list[Row]:
    return [
        Row(model, f"q{n}", f"i{n // 2}", "closed", Answer("Yes", "Yes" if each else "No", "Is there?"))
        for n, each in enumerate(right)
    ]


def test_mcnemar_is_the_binomial_test_of_the_questions_that_differ() -> None:
    assert mcnemar_p_value(0, 0) == 1.0
    assert mcnemar_p_value(9, 1) == mcnemar_p_value(1, 9) == pytest.approx(2 * binom.cdf(1, 10, 0.5))
    first = [True] * 12 + [False] * 4 + [True] * 4
    second = [False] * 10 + [True] * 2 + [True] * 3 + [False] + [True] * 4
    answers = rows("aligned", first) + rows("base", second)
    found = scoring.differences(scoring.score(answers[::-1]), "aligned", "base", OPTIONS)["closed_accuracy"]
    assert (found["mcnemar"]["gained"], found["mcnemar"]["lost"]) == (10, 3)
    assert found["mcnemar"]["p"] == pytest.approx(2 * binom.cdf(3, 13, 0.5))
    assert found["value"] == pytest.approx(7 / 20)


def test_a_score_that_is_no_yes_or_no_has_no_mcnemar() -> None:
    answers = [
        Row(model, f"q{n}", f"i{n}", "open", Answer("left lower lobe", said, "Where?"))
        for model, said in (("a", "left lobe"), ("b", "lower"))
        for n in range(4)
    ]
    found = scoring.differences(scoring.score(answers), "a", "b", OPTIONS)
    assert found["open_f1"]["mcnemar"] is None
    assert found["open_exact"]["mcnemar"] == {"gained": 0, "lost": 0, "p": 1.0}


def test_the_detectable_difference_is_found_four_times_in_five() -> None:
    """Simulated: differences of that size reach significance with the stated power."""
    error = 0.03
    half = norm.ppf(0.975) * error
    size = detectable_difference(-half, half, 0.95)
    draws = np.random.default_rng(0).normal(size, error, 20_000)
    assert (np.abs(draws / error) > norm.ppf(0.975)).mean() == pytest.approx(0.8, abs=0.01)
    assert detectable_difference(None, None, 0.95) is None


def test_findings_are_counted_for_each_model_and_reports_only() -> None:
    report = Answer("Left pleural effusion.", "Right effusion.")
    answers = [
        Row("a", "q", "i", "report", report),
        Row("a", "r", "i", "open", report),
        Row("b", "q", "i", "report", Answer("Left pleural effusion.", "")),
    ]
    assert scoring.findings(answers, "a") == {"Pleural Effusion": {"side_wrong": 1}}
    assert scoring.findings(answers, "b") == {"Pleural Effusion": {"omitted": 1}}


def test_alike_clusters_drawn_together_give_the_same_interval_and_p(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    first, second = (
        np.stack([generator.binomial(4, share, 3000), np.full(3000, 4)], axis=1).astype(float)
        for share in (0.52, 0.5)
    )

    def both() -> tuple[list[float], float]:
        interval = statistics.bootstrap(
            mean_value, [first, second], n=12_000, resamples=4000, confidence=0.95, seed=1
        )
        p = statistics.paired_p_value(mean_value, first, second, seed=1)
        return [interval.value, interval.low, interval.high], p

    one_by_one = both()
    monkeypatch.setattr(statistics, "_MANY", 1000)
    together = both()
    assert one_by_one != together, "other draws"
    assert together[0] == pytest.approx(one_by_one[0], abs=0.001)
    assert together[1] == pytest.approx(one_by_one[1], abs=0.01)
