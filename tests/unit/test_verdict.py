"""Verdicts claim a difference only where it is beyond chance among all that was looked at, and large enough
to print."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmedpo_ray.evaluate.summary import summary_table
from mmedpo_ray.metrics import verdict


def item(value: float, spread: float = 0.03, p: float | None = None) -> dict[str, float]:
    found = {"value": value, "low": value - spread, "high": value + spread, "n": 80}
    return found if p is None else found | {"p": p}


def judge(**difference: dict[str, float]) -> dict[str, str]:
    return verdict.judge(difference, 0.95)


def test_a_difference_that_prints_as_nothing_is_not_better() -> None:
    tiny = {"value": 0.00017, "low": 0.0000008, "high": 0.0022, "n": 900, "p": 0.001}
    assert judge(report_bleu=tiny) == {"report_bleu": "tiny"}
    found = verdict.compare({"report_bleu": tiny}, other="base", other_is="the base model", confidence=0.95)
    assert found is not None and found.tone == "open"
    assert "Better" not in found.headline and "no difference worth naming" in found.headline
    assert judge(report_bleu=tiny | {"value": -0.0004, "low": -0.002, "high": -0.0001}) == {
        "report_bleu": "tiny"
    }
    assert judge(report_bleu=item(0.0006, 0.0001, 0.001)) == {"report_bleu": "better"}


def test_many_metrics_are_corrected_for() -> None:
    """One of eight at p = 0.02 is what chance gives."""
    others = {f"m{number}": item(0.0, p=0.9) for number in range(7)}
    assert judge(open_f1=item(0.05, p=0.02))["open_f1"] == "better"
    assert judge(open_f1=item(0.05, p=0.02), **others)["open_f1"] == "uncorrected"
    assert judge(open_f1=item(0.05, p=0.006), **others)["open_f1"] == "better"
    # Official metrics and parts of others are no claims, so they cost nothing.
    shown = {f"report_bleu{order}": item(0.0, p=0.9) for order in (1, 2, 3, 4)}
    shown |= {"open_recall_official": item(0.9, p=0.0001), "closed_accuracy_official": item(0.9, p=0.0001)}
    assert judge(open_f1=item(0.05, p=0.02), **shown) == {"open_f1": "better"}


def test_what_chance_explains_among_many_is_named_as_such() -> None:
    difference = {
        "open_f1": item(0.05, p=0.02),
        "report_rouge_l": item(0.0, p=0.9),
        "report_cider": item(0.0, p=0.8),
    }
    found = verdict.compare(difference, other="base", other_is="", confidence=0.95)
    assert found is not None and found.tone == "open"
    assert "open F1 only before the correction for 3 metrics" in found.headline
    assert any("alone" in line and "open F1" in line for line in found.details)


def test_an_interval_that_holds_0_decides_nothing_whatever_p_says() -> None:
    assert judge(open_f1=item(0.02, 0.03, 0.001)) == {"open_f1": "open"}
    assert judge(open_f1=item(0.03, 0.03, 0.001)) == {"open_f1": "open"}


def test_worse_and_mixed_are_told() -> None:
    difference = {"open_f1": item(0.1, p=0.0001), "report_rouge_l": item(-0.1, p=0.0001)}
    found = verdict.compare(difference, other="base", other_is="", confidence=0.95)
    assert found is not None and found.tone == "mixed"
    found = verdict.compare({"open_f1": item(-0.1, p=0.0001)}, other="base", other_is="", confidence=0.95)
    assert found is not None and found.tone == "worse" and found.headline.startswith("Worse than base")


def test_summaries_without_p_values_are_read_by_their_intervals() -> None:
    assert judge(open_f1=item(0.1)) == {"open_f1": "better"}
    # 2.3 standard errors: p = 0.02, too much for eight metrics.
    others = {f"m{number}": item(0.0) for number in range(7)}
    assert judge(open_f1=item(0.035), **others)["open_f1"] == "uncorrected"


_PARTS = st.floats(-1, 1)


@given(
    st.dictionaries(
        st.sampled_from(["open_f1", "report_bleu", "report_cider", "a", "b"]),
        st.tuples(_PARTS, _PARTS, _PARTS, st.floats(0.0001, 1)),
        min_size=1,
    )
)
def test_no_claim_without_all_three_reasons(drawn: dict[str, tuple[float, float, float, float]]) -> None:
    difference = {}
    for name, (*parts, p) in drawn.items():
        low, value, high = sorted(parts)
        difference[name] = {"low": low, "value": value, "high": high, "n": 9, "p": p}
    calls = verdict.judge(difference, 0.95)
    assert calls.keys() == difference.keys()
    for name, call in calls.items():
        found = difference[name]
        if call in ("better", "worse"):
            assert found["p"] < 0.05 and abs(100 * found["value"]) >= 0.05
            assert found["low"] > 0 if call == "better" else found["high"] < 0
    compared = verdict.compare(difference, other="base", other_is="", confidence=0.95)
    assert compared is not None
    told = [verdict.label(name) for name in calls]
    assert all(label in " ".join(compared.details) for label in told)
    named = [verdict.label(name) for name, call in calls.items() if call != "open"]
    assert all(label in compared.headline for label in named)


def test_the_table_marks_what_the_verdict_claims() -> None:
    scores = {"closed_accuracy": item(0.5), "report_bleu": item(0.5), "open_f1": item(0.5)}
    counts = {"answers": 9, "failed": 1, "empty": 2, "closed": 4, "undecided": 1}
    summary = {
        "models": {"base": scores, "aligned": scores},
        "counts": {"base": counts, "aligned": counts},
        "difference": {
            "closed_accuracy": item(0.1, p=0.001),
            "report_bleu": {"value": 0.00017, "low": 0.0000008, "high": 0.0022, "n": 9, "p": 0.001},
            "open_f1": item(0.04, p=0.06),
        },
        "difference_to_control": {},
        "names": {"base": "base", "aligned": "aligned"},
        "questions": 9,
        "images": 4,
        "confidence": 0.95,
        "left_out": {},
    }
    cells = list(summary_table(summary).columns[-1].cells)
    # Closed accuracy, open F1, BLEU.
    assert ["*" in str(cell) for cell in cells[:3]] == [True, False, False]
    assert ["green" in str(cell) for cell in cells[:3]] == [True, False, False]
    labels = [str(cell) for cell in summary_table(summary).columns[0].cells]
    undecided = labels.index("undecided, of closed")
    assert list(summary_table(summary).columns[1].cells)[undecided] == "1 (25%)"
    assert {"empty answers", "failed requests"} <= set(labels)


@pytest.mark.parametrize(
    "name", ["report_cider", "report_meteor", "report_meteor_exact", "report_radgraph_f1", "report_bleu3"]
)
def test_new_metrics_have_names(name: str) -> None:
    assert "_" not in verdict.label(name)
