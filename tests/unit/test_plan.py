"""The order of a training run: everything once an epoch, the same for every number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmedpo_ray.align.batch import Pair
from mmedpo_ray.align.pair_source import PairsInMemory, hold_out
from mmedpo_ray.align.plan import Plan, effective_sample_size
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


def num_tokens(pairs: Sequence[Pair], *, both_sides: bool) -> int:
    """What a packed forward pass computes, written out: each image's longest prompt, and all responses."""
    prompts: dict[str, int] = {}
    total = 0
    for pair in pairs:
        sides = [(pair.image_uri, pair.chosen)]
        if both_sides:
            sides.append((pair.rejected_image_uri, pair.rejected))
        for uri, response in sides:
            prompts[uri] = max(prompts.get(uri, 0), len(pair.prompt))
            total += len(response)
    return total + sum(prompts.values())


def make_plan(sizes: list[int], **changes: object) -> Plan:
    values: dict = {"seed": 0, "epochs": 2, "images_per_step": 3, "pairs_per_forward": 4}
    return Plan(PairsInMemory(make_pairs(sizes)), **(values | changes))


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
    source = PairsInMemory(make_pairs(sizes)[::-1])
    shuffled = Plan(source, seed=0, epochs=2, images_per_step=3, pairs_per_forward=4)
    assert [[pair.pair_id for pair in shuffled.step_pairs(step)] for step in range(8)] == order


def test_a_tree_that_fits_stays_whole() -> None:
    plan = make_plan([4, 4, 4, 4], images_per_step=4)
    for rank in range(2):
        for micro in plan.micro_batches(0, rank, 2):
            assert len({pair.image_id for pair in micro.pairs}) == 1


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    world_size=st.integers(1, 3),
    tokens_per_forward=st.integers(10, 60),
    both_sides=st.booleans(),
)
def test_no_micro_batch_exceeds_its_tokens_but_for_a_single_pair(
    sizes: list[int], world_size: int, tokens_per_forward: int, both_sides: bool
) -> None:
    plan = make_plan(sizes, tokens_per_forward=tokens_per_forward, both_sides=both_sides)
    largest = 0
    for step in range(plan.steps_per_epoch):
        for rank in range(world_size):
            for micro in plan.micro_batches(step, rank, world_size):
                tokens = num_tokens(micro.pairs, both_sides=both_sides)
                assert tokens <= tokens_per_forward or len(micro.pairs) == 1
                largest = max(largest, 0 if micro.is_filler else tokens)
    assert plan.largest_micro_batch(world_size).tokens == largest


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


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=12),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 5),
)
def test_held_out_images_are_apart_with_all_their_pairs(sizes: list[int], share: float, seed: int) -> None:
    pairs = make_pairs(sizes)
    parts = hold_out(PairsInMemory(pairs), share, seed)
    count = parts[1].index.num_images if parts[1] is not None else 0
    assert 1 <= count < len(sizes) and abs(count - share * len(sizes)) <= 1
    values: dict = {"seed": 0, "epochs": 1, "images_per_step": 3, "pairs_per_forward": 4}
    seen = []
    for part in parts:
        assert part is not None
        plan = Plan(part, **values)
        found = [pair for step in range(plan.total_steps) for pair in plan.step_pairs(step)]
        images = {pair.image_id for pair in found}
        # As if there were no other pair.
        alone = Plan(PairsInMemory([pair for pair in pairs if pair.image_id in images]), **values)
        assert plan.summary() == alone.summary() and plan.num_pairs == len(found)
        assert [alone.step_pairs(step) for step in range(plan.total_steps)] == [
            plan.step_pairs(step) for step in range(plan.total_steps)
        ]
        seen += found
    assert Counter(pair.pair_id for pair in seen) == Counter(pair.pair_id for pair in pairs)


def test_images_added_later_change_little_of_what_is_held_out() -> None:
    def held_out(count: int, seed: int = 0) -> set[str]:
        _, apart = hold_out(PairsInMemory(make_pairs([2] * count)), 0.25, seed)
        assert apart is not None
        return {pair.image_id for pair in apart.load(range(2 * count)) if _is_selected(apart, pair)}

    before, after = held_out(40), held_out(44)
    assert len(before) == 10 and len(after) == 11 and len(before & after) >= 7
    assert held_out(40, seed=1) != before


def _is_selected(source: PairsInMemory, pair: Pair) -> bool:
    assert source.index.selected is not None
    return int(pair.image_id[1:]) in source.index.selected


def test_one_image_cannot_be_shared_out() -> None:
    source = PairsInMemory(make_pairs([3]))
    assert hold_out(source, 0.0, 0) == (source, None)
    with pytest.raises(UserError, match=r"validation_share=0\.1 holds out images, and there are pairs of 1"):
        hold_out(source, 0.1, 0)


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
        Plan(PairsInMemory([]), seed=0, epochs=1, images_per_step=1, pairs_per_forward=1)


def test_effective_sample_size() -> None:
    assert effective_sample_size([1.0] * 5) == pytest.approx(1.0)
    assert effective_sample_size([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
