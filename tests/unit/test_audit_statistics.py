"""The figures of the audit equal brute force; random tables are audited and fixed."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.dataset as pads
import pytest
from audit_tables import pair, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from mmedpo_ray.audit.checks import CHECKS
from mmedpo_ray.audit.extract import extract
from mmedpo_ray.audit.fix import removals, write_fixed
from mmedpo_ray.audit.run_checks import examine
from mmedpo_ray.audit.statistics import explained, separation
from mmedpo_ray.config.load import load
from mmedpo_ray.datasets.pair_table import open_pairs
from mmedpo_ray.errors import UserError
from mmedpo_ray.tables import schemas

_QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


_LENGTHS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=25)


@given(_LENGTHS)
@_QUICK
def test_separation_equals_brute_force(lengths: list[tuple[int, int]]) -> None:
    chosen, rejected = (np.array(side) for side in zip(*lengths, strict=True))
    measured = separation(chosen, rejected)
    assert measured is not None
    size = len(lengths)
    accuracies = [
        max(right, 2 * size - right) / (2 * size)
        for right in (np.sum(chosen <= t) + np.sum(rejected > t) for t in range(-1, 13))
    ]
    assert measured.accuracy == pytest.approx(max(accuracies))
    wins = sum(float(r > c) + 0.5 * float(r == c) for c in chosen for r in rejected)
    assert measured.auc == pytest.approx(wins / size**2)
    within = sum(float(r > c) + 0.5 * float(r == c) for c, r in lengths) / size
    assert measured.pair_accuracy == pytest.approx(max(within, 1 - within))
    # The rule that is named reaches the accuracy that is named.
    above = np.sum(chosen <= measured.threshold) + np.sum(rejected > measured.threshold)
    right = above if measured.rejected_is == "more" else 2 * size - above
    assert right / (2 * size) == pytest.approx(measured.accuracy)


@given(st.lists(st.tuples(st.floats(0, 2, width=16), st.integers(0, 3)), min_size=3, max_size=30))
@_QUICK
def test_explained_variance_equals_scipy(rows: list[tuple[float, int]]) -> None:
    values, codes = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows])
    measured = explained(values, codes)
    groups = [values[codes == code] for code in np.unique(codes)]
    if measured is None:
        assert len(groups) < 2 or len(values) <= len(groups) or np.ptp(values) < 1e-5
        return
    within = sum(((group - group.mean()) ** 2).sum() for group in groups)
    total = ((values - values.mean()) ** 2).sum()
    assert measured.eta_squared == pytest.approx(1 - within / total, abs=1e-9)
    if within > 1e-9 * total:
        assert measured.p_value == pytest.approx(stats.f_oneway(*groups).pvalue, rel=1e-6, abs=1e-12)


_TEXT = st.one_of(
    st.sampled_from(
        [
            "Yes",
            "No",
            " Yes",
            "yes.",
            "",
            " ",
            "\u00a0No",
            "Question: Is it?\n Yes",
            "T2",
            "I cannot see the image",
        ]
    ),
    st.text(st.characters(codec="utf-8"), max_size=12),
)


_ROW = st.fixed_dictionaries(
    {
        "image_uri": st.sampled_from(["/a.png", "/b.png", ""]),
        "rejected_image_uri": st.sampled_from(["/a.png", "/b.png"]),
        "kind": st.sampled_from(["text", "visual"]),
        "question": _TEXT,
        "chosen": _TEXT,
        "rejected": _TEXT,
        "weight": st.sampled_from([0.0, 0.75, 1.0, 1.25, -1.0, float("nan"), float("inf")]),
        "noise": st.sampled_from(
            [None, "", "{", '{"mask_share": 0.9}', '{"mask_share": 1e', '{"changed_share": .5}']
        ),
    }
)


@given(st.lists(_ROW, max_size=12), st.integers(1, 3))
@_QUICK
def test_random_tables_are_audited_and_fixed(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict], files: int
) -> None:
    """No table crashes; in = out + removed; an audit of the fixed table finds nothing that --fix repairs."""
    folder = tmp_path_factory.mktemp("random")
    config = load(None, [f"run.folder={folder}"])
    pairs = open_pairs(write(folder / "t", [pair(i, **row) for i, row in enumerate(rows)], files))
    features = extract(pairs, None)
    words = [[len(row[side].split()) for row in rows] for side in ("chosen", "rejected")]
    assert features.words_chosen.tolist() == words[0]
    assert features.words_rejected.tolist() == words[1]
    assert features.chars_chosen.tolist() == [len(row["chosen"]) for row in rows]
    result = examine(config, pairs, features, None)
    named = {item["check"] for part in ("findings", "passed", "not_checked") for item in result[part]}
    assert named == set(CHECKS)
    assert json.loads(json.dumps(result)) == result
    assert extract(pairs, None).equal.tolist() == [row["chosen"] == row["rejected"] for row in rows]
    stay = removals(features) < 0
    if not stay.any():
        with pytest.raises(UserError, match="no row"):
            write_fixed(pairs, features, None, str(folder / "fixed"))
        assert not (folder / "fixed").exists()
        return
    fixed = write_fixed(pairs, features, None, str(folder / "fixed"))
    assert fixed.rows_in == len(rows) == fixed.rows_out + sum(fixed.removed.values())
    cleaned = pads.dataset(fixed.folder, format="parquet", exclude_invalid_files=True).to_table()
    assert cleaned.schema.names == schemas.SCORED.names
    assert cleaned["pair_id"].to_pylist() == [f"p{i}" for i in np.flatnonzero(stay)]
    assert all(text == text.strip() for side in ("chosen", "rejected") for text in cleaned[side].to_pylist())
    again = open_pairs(fixed.folder)
    second = examine(config, again, extract(again, None), None)
    assert not [item["check"] for item in second["findings"] if item["fixable"]]
    assert (removals(extract(again, None)) < 0).all()
