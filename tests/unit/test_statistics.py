"""The clustered bootstrap and the paired test: exact where the answer is known, right as often as they
say."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats as scipy_stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedpo_ray.metrics.base import mean_value
from mmedpo_ray.metrics.report import finding_f1_value
from mmedpo_ray.metrics.statistics import bootstrap, cluster_sums, holm, paired_p_value

OPTIONS = {"resamples": 400, "confidence": 0.95, "seed": 3}


def sums_of(values: np.ndarray) -> np.ndarray:
    """(C, per cluster) values → (C, 2) sums of a mean."""
    return np.stack([values.sum(axis=1), np.full(len(values), values.shape[1])], axis=1).astype(float)


def test_cluster_sums_add_the_rows_of_each_cluster():
    statistics = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    assert cluster_sums(statistics, ["b", "a", "b"], ["a", "b", "c"]).tolist() == [[0, 1], [2, 2], [0, 0]]


def test_equal_answers_leave_no_doubt():
    estimate = bootstrap(mean_value, [sums_of(np.ones((20, 3)))], n=60, **OPTIONS)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (1.0, 1.0, 1.0, 60)


def test_the_same_seed_gives_the_same_interval():
    sums = sums_of(np.random.default_rng(0).integers(0, 2, (50, 4)))
    first, second = (bootstrap(mean_value, [sums], n=200, **OPTIONS) for _ in range(2))
    other = bootstrap(mean_value, [sums], n=200, **{**OPTIONS, "seed": 4})
    assert first == second
    assert (first.low, first.high) != (other.low, other.high)


def test_questions_of_one_image_do_not_count_as_independent():
    images = np.random.default_rng(1).integers(0, 2, (60, 1))
    copied = np.repeat(images, 8, axis=1)
    single = bootstrap(mean_value, [sums_of(images)], n=60, **OPTIONS)
    many = bootstrap(mean_value, [sums_of(copied)], n=480, **OPTIONS)
    assert many.high - many.low == pytest.approx(single.high - single.low)


def test_paired_differences_are_narrower_than_unpaired_ones():
    generator = np.random.default_rng(2)
    hard = generator.random((200, 1))
    base = (generator.random((200, 5)) < hard).astype(float)
    better = base.copy()
    better[generator.random(better.shape) < 0.1] = 1.0
    paired = bootstrap(mean_value, [sums_of(better), sums_of(base)], n=1000, **OPTIONS)
    alone = bootstrap(mean_value, [sums_of(base)], n=1000, **OPTIONS)
    assert paired.value == pytest.approx(better.mean() - base.mean())
    assert paired.low > 0
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_without_images_there_is_no_number():
    estimate = bootstrap(mean_value, [np.zeros((0, 2))], n=0, **OPTIONS)
    assert estimate.as_dict() == {"value": None, "low": None, "high": None, "n": 0}


def test_intervals_cover_as_often_as_they_say():
    """200 simulated test sets of 60 correlated images: a 90 % interval covers the truth in about 90 % of
    them."""
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        # Beta(2, 1) accuracy of each image: mean 2/3, strongly clustered.
        accuracy = generator.beta(2, 1, (60, 1))
        answers = (generator.random((60, 6)) < accuracy).astype(float)
        estimate = bootstrap(mean_value, [sums_of(answers)], n=360, resamples=400, confidence=0.9, seed=trial)
        covered += estimate.low <= 2 / 3 <= estimate.high
    # Binomial(200, 0.9) lies in this range with probability 0.999.
    assert 165 <= covered <= 195


@settings(max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=30), st.integers(0, 5))
def test_the_interval_is_ordered_and_within_range(clusters, seed):
    sums = np.array([[sum(values), len(values)] for values in clusters], dtype=float)
    estimate = bootstrap(mean_value, [sums], n=1, resamples=100, confidence=0.9, seed=seed)
    assert 0 <= estimate.low <= estimate.high <= 1
    assert estimate.value == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum())


def test_large_sets_are_drawn_in_blocks_with_the_same_result(monkeypatch):
    from mmedpo_ray.metrics import statistics

    sums = sums_of(np.random.default_rng(7).integers(0, 2, (30, 2)))
    whole = bootstrap(mean_value, [sums], n=60, **OPTIONS)
    monkeypatch.setattr(statistics, "_BLOCK", 30 * 7)
    assert bootstrap(mean_value, [sums], n=60, **OPTIONS) == whole


# ---------------------------------------------------------------------- paired test


def test_few_images_are_swapped_in_every_way() -> None:
    """Five images, all better by one answer: 2 of the 32 swaps are as extreme."""
    better, base = sums_of(np.ones((5, 1))), sums_of(np.zeros((5, 1)))
    assert paired_p_value(mean_value, better, base, seed=0) == 2 / 32
    assert paired_p_value(mean_value, base, base, seed=0) == 1.0
    assert paired_p_value(mean_value, np.zeros((0, 2)), np.zeros((0, 2)), seed=0) == 1.0


def test_the_p_value_of_a_mean_is_scipys() -> None:
    generator = np.random.default_rng(4)
    first, second = generator.random((11, 1)), generator.random((11, 1)) - 0.2
    expected = scipy_stats.permutation_test(
        (first[:, 0], second[:, 0]),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    assert paired_p_value(mean_value, sums_of(first), sums_of(second), seed=0) == pytest.approx(expected)


def test_drawn_swaps_come_near_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(8)
    first, second = sums_of(generator.random((12, 2)) + 0.15), sums_of(generator.random((12, 2)))
    exact = paired_p_value(mean_value, first, second, seed=0)
    drawn = paired_p_value(mean_value, first, second, seed=0, permutations=4000)
    assert 0.01 < exact < 0.5 and drawn == pytest.approx(exact, abs=0.025)
    from mmedpo_ray.metrics import statistics

    monkeypatch.setattr(statistics, "_BLOCK", 12 * 7)
    assert paired_p_value(mean_value, first, second, seed=0, permutations=4000) == pytest.approx(
        exact, abs=0.025
    )


def test_equal_models_differ_as_often_as_the_level_says() -> None:
    """400 simulated pairs of equal models on 40 images: p < 0.05 in about 5 % of them, also for a score that
    is no mean."""
    generator = np.random.default_rng(9)
    found = 0
    for trial in range(400):
        hard = generator.random((40, 1))
        sums = [
            np.stack(
                [right.sum(1), (1 - right).sum(1), generator.integers(0, 3, 40), np.full(40, 3)], axis=1
            ).astype(float)
            for right in ((generator.random((40, 3)) < hard).astype(float) for _ in range(2))
        ]
        found += paired_p_value(finding_f1_value, sums[0], sums[1], seed=trial, permutations=499) < 0.05
    # Binomial(400, 0.05) lies in this range with probability 0.999.
    assert 7 <= found <= 35


def test_holm_corrects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.7, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=9))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, corrected, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)
