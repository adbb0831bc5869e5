"""Pairs for training: what is derived from the scored rows, and which tokens count."""

from __future__ import annotations

from pathlib import Path

import pytest
from align_world import write_scored
from hypothesis import given
from hypothesis import strategies as st
from tiny_llava import build_tiny_llava

from mmedpo_ray import tables
from mmedpo_ray.align.prepare import prepare_pairs, span_weights
from mmedpo_ray.models.loading import PromptWriter, load_processor

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
    scored = tables.to_table(write_scored(tmp_path, num_images=2), tables.SCORED)
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
    scored = tables.to_table(write_scored(tmp_path, num_images=1), tables.SCORED)
    pairs, _ = prepare_pairs(scored, writer, max_length=256, visual_coefficient=1.0, common_token_weight=0.0)
    for pair in pairs:
        if pair.is_visual:
            assert pair.chosen_weights is None and pair.rejected_weights is None
        else:
            assert pair.chosen_weights and max(pair.chosen_weights) == 1.0 and min(pair.chosen_weights) == 0.0
