"""The order of a training run: everything once an epoch, the same for every number of ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_in_memory import PairsInMemory, plain_side, plan_of

from mmedpo_ray.align.data.batch import Pair, pair_batch
from mmedpo_ray.align.data.pair_source import PairSource
from mmedpo_ray.align.data.token_counts import TokenCounts
from mmedpo_ray.align.losses import preference_objective
from mmedpo_ray.align.packing.trees import PackedTrees, TokenSequence, num_slots, pack
from mmedpo_ray.align.plan import balance as balance_module
from mmedpo_ray.align.plan import plan as plan_module
from mmedpo_ray.align.plan.balance import Limits, balance
from mmedpo_ray.align.plan.plan import Plan, effective_sample_size
from mmedpo_ray.align.settings import AlignConfig
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


def packed_trees_of(pairs: Sequence[Pair], *, both_sides: bool = True) -> PackedTrees:
    """The packed trees of some pairs, with blank images."""
    sides = [(pair.prompt, pair.chosen, pair.image_uri) for pair in pairs]
    if both_sides:
        sides += [(pair.prompt, pair.rejected, pair.rejected_image_uri) for pair in pairs]
    uris = list(dict.fromkeys(uri for _, _, uri in sides))
    sequences = [TokenSequence(prompt, response, uris.index(uri)) for prompt, response, uri in sides]
    return pack(sequences, {"pixel_values": torch.zeros(len(uris), 3, 1, 1)}, pad_token_id=0)


def num_tokens(pairs: Sequence[Pair], *, both_sides: bool) -> int:
    """Tokens of a packed forward pass, rows filled up."""
    return packed_trees_of(pairs, both_sides=both_sides).input_ids.numel()


def num_distinct(pairs: Sequence[Pair], *, both_sides: bool) -> int:
    """The same without what fills the rows up."""
    packed_trees = packed_trees_of(pairs, both_sides=both_sides)
    return packed_trees.input_ids.numel() - len(packed_trees.layout.padding)


def make_plan(sizes: list[int], **changes: object) -> Plan:
    values: dict = {"seed": 0, "epochs": 2, "images_per_step": 3, "pairs_per_forward": 4}
    return plan_of(PairsInMemory(make_pairs(sizes)), **(values | changes))


@settings(max_examples=60)
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


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=15), images_per_step=st.integers(1, 6))
def test_every_epoch_sees_every_pair_once(sizes: list[int], images_per_step: int) -> None:
    plan = make_plan(sizes, images_per_step=images_per_step)
    for epoch in range(2):
        steps = [step for step in range(plan.total_steps) if step // plan.steps_per_epoch == epoch]
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
    shuffled = plan_of(source, seed=0, epochs=2, images_per_step=3, pairs_per_forward=4)
    assert [[pair.pair_id for pair in shuffled.step_pairs(step)] for step in range(8)] == order


def test_a_tree_that_fits_stays_whole() -> None:
    plan = make_plan([4, 4, 4, 4], images_per_step=4)
    for rank in range(2):
        for micro in plan.micro_batches(0, rank, 2):
            assert len({pair.image_id for pair in micro.pairs}) == 1


@settings(max_examples=40)
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
    assert plan.forwards(world_size).largest.tokens == largest


@st.composite
def alike_pairs(draw: st.DrawFn) -> list[Pair]:
    """Pairs that often begin alike, with the image's tokens (9) before or behind the question."""
    tokens = st.lists(st.integers(1, 3), min_size=1, max_size=5)
    is_image_first = draw(st.booleans())
    pairs = []
    for number in range(draw(st.integers(1, 8))):
        image, question, chosen = draw(st.integers(0, 1)), draw(tokens), [*draw(tokens), 2]
        is_visual = draw(st.booleans())
        pairs.append(
            Pair(
                pair_id=str(number),
                image_id=f"i{image}",
                is_visual=is_visual,
                image_uri=f"{image}.png",
                rejected_image_uri=f"{image}-{number % 2}.png" if is_visual else f"{image}.png",
                prompt=[8, *[9] * 4, *question] if is_image_first else [8, *question, *[9] * 4],
                chosen=chosen,
                rejected=chosen if is_visual else [*draw(tokens), 2],
                weight=1.0,
                counts_nll=draw(st.booleans()),
            )
        )
    return pairs


@given(pairs=alike_pairs(), limit=st.integers(8, 60), num_ranks=st.integers(1, 3), both_sides=st.booleans())
def test_counts_are_those_of_the_packed_trees(
    pairs: list[Pair], limit: int, num_ranks: int, both_sides: bool
) -> None:
    source = PairsInMemory(pairs)
    members = [range(*ends) for ends in itertools.pairwise(source.index.trees.tolist())]
    trees = [number for number, rows in enumerate(members) for _ in rows]
    counts = TokenCounts(source.index.pairs, trees, both_sides=both_sides)
    for bins in (balance(members, counts, num_ranks, Limits(3, limit)), members):
        for rows, sizes in zip(bins, counts.sizes(bins), strict=True):
            if rows:
                loaded = source.load(list(rows))
                assert sum(sizes) == num_distinct(loaded, both_sides=both_sides)
                assert num_slots(sizes) == num_tokens(loaded, both_sides=both_sides)
                assert bins is members or len(rows) == 1 or num_slots(sizes) <= limit
    sums = source.index.sums
    whole = [source.load(list(rows)) for rows in members]
    assert sums["packed"][0] == sum(num_distinct(tree, both_sides=True) for tree in whole)
    counted = [[pair for pair in tree if pair.counts_nll] for tree in whole]
    assert sums["packed"][1] == sum(num_distinct(tree, both_sides=False) for tree in counted if tree)


def test_every_question_of_an_image_counts() -> None:
    """Eleven questions of 60 tokens on an image of 576: their own tokens are most of the forward pass."""
    pairs = [
        Pair(
            pair_id=f"p{number:02d}",
            image_id="i",
            is_visual=False,
            image_uri="i.png",
            rejected_image_uri="i.png",
            prompt=[1, *[9] * 576, *[10 + number] * 60],
            chosen=[2, 3, 4],
            rejected=[5, 6, 7, 4],
            weight=1.0,
        )
        for number in range(11)
    ]
    values: dict = {"seed": 0, "epochs": 1, "images_per_step": 1, "pairs_per_forward": 16}
    plan = plan_of(PairsInMemory(pairs), **values)
    expected = 577 + 11 * (60 + 2 + 3)
    assert plan.forwards(1).largest.tokens == expected == num_tokens(pairs, both_sides=True)
    assert plan.summary(plan.forwards(1))["tokens_per_epoch"] == expected
    assert plan.summary(plan.forwards(1))["sharing_factor"] == round(11 * (2 * 637 + 5) / expected, 2)
    halves = plan_of(PairsInMemory(pairs), **values, tokens_per_forward=1000).micro_batches(0, 0, 1)
    assert len(halves) == 2
    assert all(num_tokens(micro.pairs, both_sides=True) <= 1000 for micro in halves)


@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize(
    ("limits", "cut_by"),
    [
        ({"pairs_per_forward": 9}, ()),
        ({"pairs_per_forward": 3}, ("pairs_per_forward",)),
        ({"pairs_per_forward": 9, "tokens_per_forward": 11}, ("tokens_per_forward",)),
        ({"pairs_per_forward": 2, "tokens_per_forward": 11}, ("pairs_per_forward", "tokens_per_forward")),
    ],
)
def test_figures_are_those_of_the_micro_batches(
    limits: dict[str, int], cut_by: tuple[str, ...], both_sides: bool
) -> None:
    """Tokens that every rank packs in an epoch, counted one by one, and the empty micro-batches."""
    plan = make_plan([9, 1, 4, 8, 6], images_per_step=2, both_sides=both_sides, **limits)
    micros = [
        micro
        for step in range(plan.steps_per_epoch)
        for rank in range(3)
        for micro in plan.micro_batches(step, rank, 3)
    ]
    real = [micro.pairs for micro in micros if not micro.is_filler]
    forwards = plan.forwards(3)
    figures = plan.summary(forwards)
    tokens = sum(num_distinct(pairs, both_sides=both_sides) for pairs in real)
    separate = sum(
        len(pair.prompt) + len(side) - 1
        for pairs in real
        for pair in pairs
        for side in ([pair.chosen, pair.rejected] if both_sides else [pair.chosen])
    )
    assert figures["tokens_per_epoch"] == tokens
    assert figures["sharing_factor"] == round(separate / tokens, 2)
    assert forwards.cut_by == cut_by and (forwards.repetition > 1) == bool(cut_by)
    assert forwards.empty == pytest.approx(1 - len(real) / len(micros))


def test_of_many_steps_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([5] * 120, images_per_step=2, pairs_per_forward=3, epochs=1)
    expected = plan.summary(plan.forwards(2))
    monkeypatch.setattr(plan_module, "_IMAGES_LOOKED_AT", 40)
    seen: list[int] = []
    look = plan._step
    monkeypatch.setattr(plan, "_step", lambda step: seen.append(step) or look(step))
    found = plan.summary(plan.forwards(2))
    assert len(seen) == 20 and seen[0] == 0 and seen[-1] == 59
    assert found["tokens_per_epoch"] == pytest.approx(expected["tokens_per_epoch"], rel=0.01)


def test_ranks_carry_about_the_same_tokens() -> None:
    plan = make_plan([6] * 8, images_per_step=8, pairs_per_forward=24)
    tokens = [
        sum(num_distinct(micro.pairs, both_sides=True) for micro in plan.micro_batches(0, rank, 2))
        for rank in range(2)
    ]
    assert max(tokens) <= 1.1 * min(tokens)


def test_without_rejected_sides_an_answer_is_computed_once() -> None:
    plan, both = make_plan([3, 3, 3], both_sides=False), make_plan([3, 3, 3])
    computed = [pair for micro in plan.micro_batches(0, 0, 1) for pair in micro.pairs]
    assert len(computed) == 6 and all(pair.counts_nll for pair in computed)
    assert plan.total_steps == both.total_steps
    assert [p.image_id for p in plan.step_pairs(0)] == [p.image_id for p in both.step_pairs(0)]


def test_many_trees_on_few_ranks_are_spread_in_few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt reads all of them, so it must not restart for every further micro-batch."""
    attempts: list[int] = []
    fill = balance_module._fill

    def count(pieces: Any, num_bins: int, *others: Any) -> Any:
        attempts.append(num_bins)
        return fill(pieces, num_bins, *others)

    monkeypatch.setattr(balance_module, "_fill", count)
    plan = make_plan([4] * 600, images_per_step=600, pairs_per_forward=64, tokens_per_forward=64)
    micros = plan.micro_batches(0, 0, 1)
    assert len(attempts) <= 16 and attempts[-1] == len(micros) > 300
    assert sum(len(micro.pairs) for micro in micros) == 2400


def test_more_ranks_than_trees_get_fillers() -> None:
    plan = make_plan([2], images_per_step=1)
    micros = [plan.micro_batches(0, rank, 3) for rank in range(3)]
    assert sorted(micro.is_filler for (micro,) in micros) == [False, True, True]


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=12),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 5),
)
def test_held_out_images_are_apart_with_all_their_pairs(sizes: list[int], share: float, seed: int) -> None:
    pairs = make_pairs(sizes)
    parts = PairsInMemory(pairs).hold_out(share, seed)
    count = parts[1].index.num_images if parts[1] is not None else 0
    assert 1 <= count < len(sizes) and abs(count - share * len(sizes)) <= 1
    values: dict = {"seed": 0, "epochs": 1, "images_per_step": 3, "pairs_per_forward": 4}
    seen = []
    for part in parts:
        assert part is not None
        plan = plan_of(part, **values)
        found = [pair for step in range(plan.total_steps) for pair in plan.step_pairs(step)]
        images = {pair.image_id for pair in found}
        # As if there were no other pair.
        alone = plan_of(PairsInMemory([pair for pair in pairs if pair.image_id in images]), **values)
        assert plan.summary(plan.forwards(1)) == alone.summary(alone.forwards(1)) and plan.num_pairs == len(
            found
        )
        assert [alone.step_pairs(step) for step in range(plan.total_steps)] == [
            plan.step_pairs(step) for step in range(plan.total_steps)
        ]
        seen += found
    assert Counter(pair.pair_id for pair in seen) == Counter(pair.pair_id for pair in pairs)


def test_images_added_later_change_little_of_what_is_held_out() -> None:
    def held_out(count: int, seed: int = 0) -> set[str]:
        _, apart = PairsInMemory(make_pairs([2] * count)).hold_out(0.25, seed)
        assert apart is not None
        return {pair.image_id for pair in apart.load(range(2 * count)) if _is_selected(apart, pair)}

    before, after = held_out(40), held_out(44)
    assert len(before) == 10 and len(after) == 11 and len(before & after) >= 7
    assert held_out(40, seed=1) != before


def _is_selected(source: PairSource, pair: Pair) -> bool:
    assert source.index.selected is not None
    return int(pair.image_id[1:]) in source.index.selected


def test_one_image_cannot_be_shared_out() -> None:
    source = PairsInMemory(make_pairs([3]))
    assert source.hold_out(0.0, 0) == (source, None)
    with pytest.raises(UserError, match=r"validation_share=0\.1 holds out images, and there are pairs of 1"):
        source.hold_out(0.1, 0)


def test_denominators_run_over_the_whole_step() -> None:
    plan = make_plan([3, 3, 3], epochs=1)
    total = plan.normaliser(0)
    assert total.weight == pytest.approx(3 * (0.75 + 0.85 + 0.95))
    assert total.nll_tokens == 2 * (1 + 2 + 3)


@pytest.mark.parametrize("pairs_per_forward", [1, 4])
def test_the_mean_of_the_released_code_counts_pairs_without_weight(pairs_per_forward: int) -> None:
    """Their loss is ``(weights * losses).mean()`` over a batch, in which a weight may be 0."""
    pairs = [
        replace(pair, weight=0.0, counts_nll=False)
        if pair.pair_id in ("000-01", "002-00", "002-01")
        else pair
        for pair in make_pairs([2, 3, 2])
    ]
    margins = {pair.pair_id: 0.7 * index - 1.5 for index, pair in enumerate(pairs)}
    plan = plan_of(
        PairsInMemory(pairs), seed=0, epochs=1, images_per_step=3, pairs_per_forward=pairs_per_forward
    )
    assert plan.summary(plan.forwards(1))["pairs"] == 7
    objective = AlignConfig(beta=0.3, reduction="mean")
    total, loss = plan.normaliser(0), torch.zeros(())
    computed = []
    for micro in plan.micro_batches(0, 0, 1):
        batch = pair_batch(micro.pairs, is_filler=micro.is_filler)
        count = torch.ones(len(micro.pairs), dtype=torch.int64)
        chosen = torch.tensor([margins[pair.pair_id] for pair in micro.pairs])
        sides = (plain_side(chosen, count), plain_side(torch.zeros_like(chosen), count))
        loss = loss + preference_objective(*sides, batch, total, objective)[0]
        computed += [pair.pair_id for pair in micro.pairs]
    assert sorted(computed) == ["000-00", "001-00", "001-01", "001-02"], "the others need no forward pass"
    weights = torch.tensor([pair.weight for pair in pairs])
    losses = -torch.nn.functional.logsigmoid(0.3 * torch.tensor([margins[pair.pair_id] for pair in pairs]))
    assert loss.item() == pytest.approx((weights * losses).mean().item(), rel=1e-6)


def test_a_step_of_pairs_without_weight_has_no_loss() -> None:
    pairs = [replace(pair, weight=0.0, counts_nll=False) for pair in make_pairs([2])]
    plan = plan_of(PairsInMemory(pairs), seed=0, epochs=1, images_per_step=1, pairs_per_forward=4)
    (micro,) = plan.micro_batches(0, 0, 1)
    assert micro.is_filler and plan.normaliser(0).pairs == 2
    assert effective_sample_size(plan.step_weights(0)) == 0.0
    with pytest.raises(UserError, match="weights of all 2 pairs are 0"):
        plan.summary(plan.forwards(1))


def test_steps_end_with_the_epochs_or_before() -> None:
    assert make_plan([1] * 7).total_steps == 6
    assert make_plan([1] * 7, max_steps=4).total_steps == 4
    assert make_plan([1] * 7, max_steps=100).total_steps == 6
    with pytest.raises(ValueError, match="outside"):
        make_plan([1] * 7).step_pairs(6)


def test_no_pair_is_an_error() -> None:
    with pytest.raises(UserError, match="no pair to train on"):
        plan_of(PairsInMemory([]), seed=0, epochs=1, images_per_step=1, pairs_per_forward=1)


def test_effective_sample_size() -> None:
    assert effective_sample_size([1.0] * 5) == pytest.approx(1.0)
    assert effective_sample_size([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
