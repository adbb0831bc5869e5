"""Weights: moments, bounds, order, groups and the effective sample size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmedpo_ray.judge import weights
from mmedpo_ray.judge.settings import WeightConfig

SCORES = hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1, width=32))


def of(**settings: object) -> WeightConfig:
    return WeightConfig.model_validate(settings)


def weigh(scores: np.ndarray, settings: WeightConfig, groups: list[str] | None = None) -> np.ndarray:
    groups = groups or ["text"] * len(scores)
    return weights.apply(scores, groups, moments_of(scores, groups), settings)


def moments_of(scores: np.ndarray, groups: list[str]) -> dict[str, weights.Moments]:
    fit = weights.Fit()
    fit.add(scores, groups)
    return fit.moments()


def summary_of(
    scores: np.ndarray, values: np.ndarray, kinds: list[str], settings: WeightConfig
) -> dict[str, Any]:
    summary = weights.Summary(settings)
    summary.add(scores, values, kinds)
    return summary.figures()


def effective_share(values: np.ndarray) -> float:
    return summary_of(values, values, ["text"] * len(values), of(mode="raw"))["text"]["effective_share"]


@given(SCORES)
def test_matched_moments_before_clipping_and_bounds_after(scores: np.ndarray) -> None:
    free = weigh(scores, of(clip=(0.0, 1000.0), variance=1e-4))
    assert free.mean() == pytest.approx(1.0, abs=1e-9)
    if scores.std() >= 1e-9:
        assert free.var() == pytest.approx(1e-4, rel=1e-6)
    clipped = weigh(scores, of())
    assert clipped.min() >= 0.75 and clipped.max() <= 1.25


@given(SCORES)
def test_a_higher_score_never_weighs_less(scores: np.ndarray) -> None:
    order = np.argsort(scores)
    for mode in ("match_moments", "literal", "raw", "none"):
        assert (np.diff(weigh(scores, of(mode=mode))[order]) >= -1e-12).all(), mode


@given(SCORES)
def test_the_formula_as_printed_gives_the_lower_bound_only(scores: np.ndarray) -> None:
    assert (weigh(scores, of(mode="literal")) == 0.75).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, 1.0])
def test_constant_scores_weigh_one(value: float) -> None:
    assert (weigh(np.full(1001, value), of()) == 1.0).all()


def test_known_values() -> None:
    scores = np.array([0.0, 1.0])
    assert weigh(scores, of()) == pytest.approx([0.75, 1.25])
    assert weigh(scores, of(clip=(0.0, 2.0))) == pytest.approx([1 - 0.1**0.5, 1 + 0.1**0.5])
    assert weigh(scores, of(mode="raw")).tolist() == [0.0, 1.0]
    assert weigh(scores, of(mode="none")).tolist() == [1.0, 1.0]
    assert weigh(scores, of(mode="literal", variance=0)).tolist() == [0.75, 0.75]


def test_groups_are_normalised_apart() -> None:
    scores = np.array([0.1, 0.2, 0.8, 0.9])
    apart = weigh(scores, of(), ["text", "text", "visual", "visual"])
    assert apart == pytest.approx([0.75, 1.25, 0.75, 1.25])
    together = weigh(scores, of())
    assert together[1] < 1 < together[2]
    assert [weights.group_of("text", "slake", of(per=per)) for per in ("kind", "dataset", "global")] == [
        "text",
        "slake",
        "all",
    ]


@given(SCORES, st.integers(1, 10))
def test_applied_in_batches_equals_the_whole(scores: np.ndarray, size: int) -> None:
    groups = ["a" if index % 3 else "b" for index in range(len(scores))]
    moments = moments_of(scores, groups)
    parts = [
        weights.apply(scores[at : at + size], groups[at : at + size], moments, of())
        for at in range(0, len(scores), size)
    ]
    assert np.concatenate(parts).tolist() == weigh(scores, of(), groups).tolist()


@given(SCORES, st.integers(1, 10), st.sampled_from(["match_moments", "raw", "none"]))
def test_moments_and_summary_from_batches_are_those_of_the_whole(
    scores: np.ndarray, size: int, mode: str
) -> None:
    groups = ["a" if index % 3 else "b" for index in range(len(scores))]
    fit, chosen = weights.Fit(), of(mode=mode)
    for at in range(0, len(scores), size):
        fit.add(scores[at : at + size], groups[at : at + size])
    found = fit.moments()
    for name in set(groups):
        values = scores[np.array(groups) == name]
        assert found[name].mean == pytest.approx(values.mean(), abs=1e-12)
        assert found[name].std == pytest.approx(values.std(), abs=1e-9)
    values = weigh(scores, chosen, groups)
    summary = weights.Summary(chosen)
    for at in range(0, len(scores), size):
        part = slice(at, at + size)
        summary.add(scores[part], values[part], groups[part])
    whole = summary_of(scores, values, groups, chosen)
    for kind, figures in summary.figures().items():
        for name, value in figures.items():
            expected = whole[kind][name]
            assert value == (expected if isinstance(expected, dict) else pytest.approx(expected, abs=2e-4))


@given(hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0.01, 10)), st.floats(0.1, 10))
def test_effective_share_is_scale_free_and_at_most_one(values: np.ndarray, factor: float) -> None:
    share = effective_share(values)
    assert 1 / len(values) - 1e-4 <= share <= 1
    assert effective_share(values * factor) == pytest.approx(share, abs=1e-4)


def test_effective_share_of_known_weights() -> None:
    assert effective_share(np.ones(7)) == 1.0
    assert effective_share(np.array([1.0, 0.0, 0.0, 0.0])) == 0.25
    assert effective_share(np.zeros(3)) == 0.0


@given(SCORES, st.sampled_from(["match_moments", "literal", "raw", "none"]))
def test_summary_counts_every_row(scores: np.ndarray, mode: str) -> None:
    chosen = of(mode=mode)
    kinds = ["text" if index % 2 else "visual" for index in range(len(scores))]
    values = weigh(scores, chosen, kinds)
    found = summary_of(scores, values, kinds, chosen)
    assert sum(kind["n"] for kind in found.values()) == len(scores)
    for kind in found.values():
        for histogram in (kind["weights"], kind["scores"]):
            assert sum(histogram["counts"]) == kind["n"]
            assert len(histogram["edges"]) == len(histogram["counts"]) + 1
