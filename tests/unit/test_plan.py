"""The order of a training run: everything once an epoch, the same for every number of ranks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedpo_ray.align.batch import Pair, num_tokens
from mmedpo_ray.align.plan import Plan, effective_sample_size, hold_out
from mmedpo_ray.errors import UserError


def make_pairs(sizes: list[int]) -> list[Pair]:
    """``sizes[k]`` pairs on image k; the last of each is visual and shares its answer with the first."""
    pairs = []
    for image, size in enumerate(sizes):
        for number in range(size):
            is_visual = size > 1 and number == size - 1
            pairs.append(
                Pair(
                    pair_id=f"{image:03d}-{number:02d}",
                    image_id=f"i{image:03d}",
                    is_visual=is_visual,
                    image_uri=f"{image}.png",
                    rejected_image_uri=f"{image}-noised.png" if is_visual else f"{image}.png",
                    prompt=[1] * (5 + number),
                    chosen=[2] * (1 + image % 3),
                    rejected=[3] * (1 + number % 4),
                    weight=0.75 + 0.1 * number,
                    counts_nll=not is_visual,
                )
            )
    return pairs


def make_plan(sizes: list[int], **changes: object) -> Plan:
    values: dict = {"seed": 0, "epochs": 2, "images_per_step": 3, "pairs_per_forward": 4}
    return Plan(make_pairs(sizes), **(values | changes))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    world_size=st.integers(1, 5),
    pairs_per_forward=st.integers(1, 7),
    images_per_step=st.integers(1, 6),
    seed=st.integers(0, 3),
)
def test_every_step_computes_its_pairs_exactly_once(
    sizes: list[int], world_size: int, pairs_per_forward: int, images_per_step: int, seed: int
) -> None:
    plan = make_plan(sizes, seed=seed, pairs_per_forward=pairs_per_forward, images_per_step=images_per_step)
    for step in range(plan.total_steps):
        ranks = [plan.micro_batches(step, rank, world_size) for rank in range(world_size)]
        assert len({len(micros) for micros in ranks}) == 1, "collectives of all ranks must match"
        assert all(0 < len(micro.pairs) <= pairs_per_forward for micros in ranks for micro in micros)
        computed = Counter(
            pair.pair_id
            for micros in ranks
            for micro in micros
            if not micro.is_filler
            for pair in micro.pairs
        )
        assert computed == Counter(pair.pair_id for pair in plan.step_pairs(step))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=15), images_per_step=st.integers(1, 6))
def test_every_epoch_sees_every_pair_once(sizes: list[int], images_per_step: int) -> None:
    plan = make_plan(sizes, images_per_step=images_per_step)
    for epoch in range(2):
        steps = [step for step in range(plan.total_steps) if plan.epoch(step) == epoch]
        seen = Counter(pair.pair_id for step in steps for pair in plan.step_pairs(step))
        assert seen == Counter(pair.pair_id for pair in make_pairs(sizes))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    sizes = [2] * 12
    first, again = make_plan(sizes), make_plan(sizes)
    order = [[pair.pair_id for pair in first.step_pairs(step)] for step in range(8)]
    # Asked in another sequence, as a resumed run does.
    assert [[pair.pair_id for pair in again.step_pairs(step)] for step in reversed(range(8))] == order[::-1]
    assert order[:4] != order[4:]
    assert order != [
        [pair.pair_id for pair in make_plan(sizes, seed=1).step_pairs(step)] for step in range(8)
    ]
    shuffled = Plan(make_pairs(sizes)[::-1], seed=0, epochs=2, images_per_step=3, pairs_per_forward=4)
    assert [[pair.pair_id for pair in shuffled.step_pairs(step)] for step in range(8)] == order


def test_a_tree_that_fits_stays_whole() -> None:
    plan = make_plan([4, 4, 4, 4], images_per_step=4)
    for rank in range(2):
        for micro in plan.micro_batches(0, rank, 2):
            assert len({pair.image_id for pair in micro.pairs}) == 1


def test_ranks_carry_about_the_same_tokens() -> None:
    plan = make_plan([6] * 8, images_per_step=8, pairs_per_forward=24)
    tokens = [
        sum(num_tokens(micro.pairs, both_sides=True) for micro in plan.micro_batches(0, rank, 2))
        for rank in range(2)
    ]
    assert max(tokens) <= 1.1 * min(tokens)


def test_without_rejected_sides_an_answer_is_computed_once() -> None:
    plan, both = make_plan([3, 3, 3], both_sides=False), make_plan([3, 3, 3])
    computed = [pair for micro in plan.micro_batches(0, 0, 1) for pair in micro.pairs]
    assert len(computed) == 6 and all(pair.counts_nll for pair in computed)
    assert plan.total_steps == both.total_steps
    assert [p.image_id for p in plan.step_pairs(0)] == [p.image_id for p in both.step_pairs(0)]


def test_more_ranks_than_trees_get_fillers() -> None:
    plan = make_plan([2], images_per_step=1)
    micros = [plan.micro_batches(0, rank, 3) for rank in range(3)]
    assert sorted(micro.is_filler for (micro,) in micros) == [False, True, True]


def test_denominators_run_over_the_whole_step() -> None:
    plan = make_plan([3, 3, 3], epochs=1)
    total = plan.normaliser(0)
    assert total.weight == pytest.approx(3 * (0.75 + 0.85 + 0.95))
    assert total.nll_tokens == 2 * (1 + 2 + 3)


def test_steps_end_with_the_epochs_or_before() -> None:
    assert make_plan([1] * 7).total_steps == 6
    assert make_plan([1] * 7, max_steps=4).total_steps == 4
    assert make_plan([1] * 7, max_steps=100).total_steps == 6
    with pytest.raises(ValueError, match="outside"):
        make_plan([1] * 7).step_pairs(6)


def test_no_pair_is_an_error() -> None:
    with pytest.raises(UserError, match="no pair to train on"):
        Plan([], seed=0, epochs=1, images_per_step=1, pairs_per_forward=1)


def test_effective_sample_size() -> None:
    assert effective_sample_size([1.0] * 5) == pytest.approx(1.0)
    assert effective_sample_size([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=30),
    share=st.floats(0.0, 0.99),
    seed=st.integers(0, 3),
)
def test_held_out_images_take_all_their_pairs_with_them(sizes: list[int], share: float, seed: int) -> None:
    pairs = make_pairs(sizes)
    trained_on, apart = hold_out(pairs, share, seed)
    assert sorted(pair.pair_id for pair in trained_on + apart) == [pair.pair_id for pair in pairs]
    images = [{pair.image_id for pair in part} for part in (trained_on, apart)]
    assert not images[0] & images[1]
    assert len(images[0]) >= 1
    assert abs(len(images[1]) - share * len(sizes)) <= 1
    assert bool(images[1]) == (share > 0)
    assert hold_out(pairs[::-1], share, seed)[1] == apart[::-1], "the order of the pairs does not matter"


def test_images_added_later_change_little_of_what_is_held_out() -> None:
    before, after = (
        {pair.image_id for pair in hold_out(make_pairs([1] * size), 0.2, 0)[1]} for size in (200, 210)
    )
    assert len(before - after) <= 4
    other = {pair.image_id for pair in hold_out(make_pairs([1] * 200), 0.2, 1)[1]}
    assert len(before & other) < 20, "another seed holds out other images"


def test_one_image_cannot_be_shared_out() -> None:
    with pytest.raises(UserError, match=r"align\.validation_share=0\.5"):
        hold_out(make_pairs([3]), 0.5, 0)
