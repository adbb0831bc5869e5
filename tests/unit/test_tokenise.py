"""Pairs for training: what is derived from the scored rows, and which tokens count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from align_world import align_settings, write_scored
from hypothesis import given
from hypothesis import strategies as st
from pairs_in_memory import prepare_pairs
from tiny_llava import build_tiny_llava

from mmedpo_ray.align.data import prepare_stage
from mmedpo_ray.align.data.prepare_stage import ReferenceScorer, _Reader
from mmedpo_ray.align.data.tokenise import span_weights
from mmedpo_ray.align.packing.logps import response_logps
from mmedpo_ray.align.packing.trees import PackedTrees
from mmedpo_ray.models.loading import load_processor
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas
from mmedpo_ray.tables.id_set import IdSet
from mmedpo_ray.tables.slices import plan_slices

tokens = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@given(tokens, tokens, st.floats(0, 1))
def test_what_both_answers_share_counts_less_and_what_differs_in_full(
    chosen: list[int], rejected: list[int], common: float
) -> None:
    left, right = span_weights(chosen, rejected, common)
    assert (len(left), len(right)) == (len(chosen), len(rejected))
    shared = [
        [token for token, w in zip(side, weights, strict=True) if w != 1.0]
        for side, weights in ((chosen, left), (rejected, right))
    ]
    assert shared[0] == shared[1], "the spans that count less are the same on both sides"
    if common < 1 and chosen == rejected:
        assert set(left) == {common}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> PromptWriter:
    return PromptWriter(load_processor(str(build_tiny_llava(tmp_path_factory.mktemp("model") / "tiny"))))


def test_a_reversed_pair_prefers_the_wrong_answer_on_the_noised_image(
    tmp_path: Path, writer: PromptWriter
) -> None:
    scored = schemas.to_table(write_scored(tmp_path, num_images=2), schemas.SCORED)
    plain, _ = prepare_pairs(scored, writer, max_length=256, visual_coefficient=1.0)
    pairs, dropped = prepare_pairs(
        scored, writer, max_length=256, visual_coefficient=1.0, reversed_visual_coefficient=0.5
    )
    assert not dropped
    found = {pair.pair_id: pair for pair in pairs}
    assert [pair for pair in pairs if not pair.pair_id.endswith(":reversed")] == plain
    for image in ("000", "001"):
        text, visual = found[f"s{image}-1:text"], found[f"s{image}-1:visual"]
        turned = found[f"s{image}-1:visual:reversed"]
        assert (turned.image_uri, turned.rejected_image_uri) == (visual.rejected_image_uri,) * 2
        assert (turned.chosen, turned.rejected) == (text.rejected, text.chosen)
        assert turned.weight == pytest.approx(0.5 * visual.weight)
        assert turned.is_visual and not turned.counts_nll, "a wrong answer must not become likelier"


def test_span_weights_leave_visual_pairs_whole(tmp_path: Path, writer: PromptWriter) -> None:
    scored = schemas.to_table(write_scored(tmp_path, num_images=1), schemas.SCORED)
    pairs, _ = prepare_pairs(scored, writer, max_length=256, visual_coefficient=1.0, common_token_weight=0.0)
    for pair in pairs:
        if pair.is_visual:
            assert pair.chosen_weights is None and pair.rejected_weights is None
        else:
            assert pair.chosen_weights and max(pair.chosen_weights) == 1.0 and min(pair.chosen_weights) == 0.0


def test_answers_that_are_equal_after_the_cut_teach_nothing(tmp_path: Path, writer: PromptWriter) -> None:
    """A text pair and a reversed pair show one image on both sides; a visual pair shows two."""
    common = "In the left lower zone of the lung, " * 20
    changes: dict = {
        "s000-1:text": {"chosen": f"{common} small.", "rejected": f"{common} large."},
        "s000-1:visual": {"chosen": f"{common} small.", "rejected": f"{common} small."},
    }
    scored = schemas.to_table(write_scored(tmp_path, num_images=1, **changes), schemas.SCORED)
    pairs, dropped = prepare_pairs(
        scored, writer, max_length=128, visual_coefficient=1.0, reversed_visual_coefficient=1.0
    )
    assert {row["pair_id"]: row[schemas.DROP_REASON] for row in dropped} == {
        "s000-1:text": "equal_sides",
        "s000-1:visual:reversed": "equal_sides",
    }
    assert [pair.pair_id for pair in pairs] == ["s000-0:text", "s000-1:visual", "s000-2:text"]


def test_a_mean_over_all_pairs_keeps_those_without_weight(tmp_path: Path, writer: PromptWriter) -> None:
    changes: dict = {"s000-1:text": {"weight": 0.0}}
    scored = schemas.to_table(write_scored(tmp_path, num_images=1, **changes), schemas.SCORED)
    for with_weightless in (False, True):
        pairs, dropped = prepare_pairs(
            scored, writer, max_length=256, visual_coefficient=1.0, with_weightless=with_weightless
        )
        assert [row["pair_id"] for row in dropped] == ([] if with_weightless else ["s000-1:text"])
        found = {pair.pair_id: pair for pair in pairs}
        assert len(found) == 3 + with_weightless
        # Its answer is learnt with the visual pair, which has a weight.
        assert found["s000-1:visual"].counts_nll
        assert not with_weightless or not found["s000-1:text"].counts_nll


def test_the_reference_keeps_to_the_limits_of_a_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are those of one forward pass over everything; a pair without weight has none."""
    changes: dict = {"s000-0:text": {"weight": 0.0}}
    write_scored(tmp_path, num_images=3, **changes)
    model = str(build_tiny_llava(tmp_path / "tiny"))
    sizes: list[int] = []

    def note(model: Any, batch: PackedTrees) -> Any:
        sizes.append(batch.input_ids.numel())
        return response_logps(model, batch)

    monkeypatch.setattr(prepare_stage, "response_logps", note)
    found = []
    for limits in ({"pairs_per_forward": 99}, {"pairs_per_forward": 99, "tokens_per_forward": 100}):
        align = align_settings(reduction="mean", **limits)
        reader = _Reader(model, align, str(tmp_path / "scored"), IdSet())
        (slice_,) = plan_slices([str(tmp_path / "scored")], rows=99)
        found.append(ReferenceScorer(reader)(slice_).sort_by("tree_key").to_pylist())
    assert sizes[0] > 100 and len(sizes) > 3 and all(size <= 100 for size in sizes[1:])
    whole, limited = found
    assert [row["pair_id"] for row in whole] == [row["pair_id"] for row in limited] and len(whole) == 12
    for row, other in zip(whole, limited, strict=True):
        for side in ("ref_chosen_logp", "ref_rejected_logp"):
            assert (row[side] is None) == (row["weight"] == 0)
            assert row[side] is None or row[side] == pytest.approx(other[side], abs=1e-3)
