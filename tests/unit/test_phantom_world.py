"""The phantom world: deterministic, lesion-free without findings, biased or not, texts that match."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from mmedpo_ray.phantom.findings import KINDS, SIDES, ZONES, Finding, sample_findings
from mmedpo_ray.phantom.render import render
from mmedpo_ray.phantom.text import report_findings, write_report
from mmedpo_ray.phantom.world import SPLITS, generate, make_phantom


@given(seed=st.integers(0, 2**40), prior=st.sampled_from(["biased", "uniform"]))
@settings(max_examples=20)
def test_the_same_seed_gives_the_same_phantom(seed, prior):
    first, second = (make_phantom(seed, prior=prior) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.mask, second.mask)
    assert (first.findings, first.questions) == (second.findings, second.questions)
    assert first.image.dtype == np.uint8
    assert first.image.shape == first.mask.shape == (64, 64)
    assert first.mask.any() == bool(first.findings)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_finding_only_its_region_changes(kind):
    side = None if kind == "cardiomegaly" else "left"
    zone = "upper" if kind in ("consolidation", "nodule") else None
    size = "large" if kind in ("effusion", "pneumothorax") else None
    for seed in range(10):
        ill, mask = render(seed, (Finding(kind, side, zone, size),))
        clean, empty = render(seed, ())
        assert not empty.any()
        change = np.abs(ill.astype(int) - clean)
        near = ndimage.binary_dilation(mask, iterations=4)
        assert change[~near].mean() < 0.2  # soft edges fade out
        assert change[mask].mean() > 10
        columns = np.nonzero(mask)[1]
        if side:
            assert columns.mean() > 32  # the patient's left is on the right of the image


def test_images_scale_with_size():
    small, large = (make_phantom(5, prior="uniform", size=size) for size in (64, 128))
    assert large.image.shape == (128, 128)
    assert small.findings == large.findings
    assert abs(small.mask.mean() - large.mask.mean()) < 0.02


def test_priors_are_in_the_biased_world_only():
    shares = {}
    for prior in ("biased", "uniform"):
        draws = (sample_findings(np.random.default_rng(seed), prior) for seed in range(2000))
        findings = [finding for drawn in draws for finding in drawn]
        effusions = Counter(f.side for f in findings if f.kind == "effusion")
        zones = Counter(f.zone for f in findings if f.kind == "consolidation")
        shares[prior] = (
            effusions["left"] / effusions.total(),
            zones["lower"] / zones.total(),
        )
    assert shares["biased"] == pytest.approx((0.94, 0.88), abs=0.03)
    assert shares["uniform"] == pytest.approx((0.5, 1 / 3), abs=0.06)


def test_no_constant_or_wording_answers_the_closed_questions():
    answers = defaultdict(Counter)
    for phantom in generate("test", 400, size=32):
        closed = [q for q in phantom.questions if q.answer_type == "closed"]
        assert Counter(q.answer for q in closed) == {"Yes": 2, "No": 2}
        for question in closed:
            answers[question.question][question.answer] += 1
    best = sum(max(counts.values()) for counts in answers.values())
    assert best / sum(counts.total() for counts in answers.values()) < 0.62


def test_every_phantom_has_all_kinds_of_question():
    for phantom in generate("align", 50, size=32):
        kinds = Counter(q.answer_type for q in phantom.questions)
        assert kinds["closed"] == 4
        assert kinds["open"] in (2, 3)
        assert kinds["report"] == 1
        assert len({q.question for q in phantom.questions}) == len(phantom.questions)


findings_strategy = st.builds(
    lambda kinds, side, zone, size: tuple(
        Finding(
            kind,
            None if kind == "cardiomegaly" else side,
            zone if kind in ("consolidation", "nodule") else None,
            size if kind in ("effusion", "pneumothorax") else None,
        )
        for kind in KINDS
        if kind in kinds
    ),
    st.sets(st.sampled_from(KINDS)),
    st.sampled_from(SIDES),
    st.sampled_from(ZONES),
    st.sampled_from(["small", "large"]),
)


@given(findings=findings_strategy)
def test_findings_can_be_read_back_from_the_report(findings):
    expected = frozenset(replace(finding, size=None) for finding in findings)
    assert report_findings(write_report(findings)) == expected


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("", set()),
        ("No pneumothorax or pleural effusion.", set()),
        ("The heart is not enlarged.", set()),
        (
            "Small RIGHT pleural effusion; cardiomegaly",
            {Finding("effusion", "right"), Finding("cardiomegaly")},
        ),
        ("There is a nodule.", {Finding("nodule")}),
        ("The upright radiograph shows a nodule", {Finding("nodule")}),  # no "right" in "upright"
    ],
)
def test_reports_in_other_words(report, expected):
    assert report_findings(report) == expected


def test_splits_are_disjoint():
    seeds = [phantom.seed for split in SPLITS for seed in (0, 1) for phantom in generate(split, 5, seed)]
    names = [phantom.case_id for split in SPLITS for seed in (0, 1) for phantom in generate(split, 5, seed)]
    assert len(set(seeds)) == len(set(names)) == 2 * 5 * len(SPLITS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_phantom(0, prior="other"), "prior must be"),
        (lambda: make_phantom(-1, prior="uniform"), "seed must be"),
        (lambda: make_phantom(0, prior="uniform", size=16), "size must be at least 32"),
        (lambda: next(generate("validation", 1)), "split must be one of"),
        (lambda: next(generate("test", -1)), "count must be"),
        (lambda: next(generate("test", 1, -1)), "seed must be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
