"""Which pairs every rank computes in every optimizer step: a pure function of (seed, epoch, step, world size).

A step takes ``images_per_step`` images with all their pairs; which ones depends on the seed and the epoch alone. Only how
a step's pairs are spread over ranks and micro-batches depends on the number of ranks, and the objective does not: its
denominators run over the whole step. So a run may go on with another number of workers.

A plan holds no pair. It looks at the index of the pairs (:mod:`~mmedpo_ray.align.data.pair_index`), and the pairs of a rank's
micro-batches are loaded when they are asked for. What it does hold is the order of the images in one epoch: four bytes an
image, shuffled once an epoch.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmedpo_ray.align.data.batch import Pair
from mmedpo_ray.align.data.pair_source import PairSource, weights_of
from mmedpo_ray.align.data.token_counts import TokenCounts
from mmedpo_ray.align.losses import Normaliser
from mmedpo_ray.align.packing.trees import num_slots
from mmedpo_ray.align.plan.balance import Limits, balance
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.errors import UserError

# The step in hand, the one read ahead, and one more.
_STEPS_KEPT = 3
# `forwards` looks at this many steps of an epoch: of large steps at fewer, which have about so many images.
_FEWEST_STEPS, _MOST_STEPS = 16, 256
_IMAGES_LOOKED_AT = 1 << 16


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs through the model at once.

    Attributes:
        pairs: never empty; collectives of all ranks must match.
        is_filler: the rank had nothing left to do: the pairs count nowhere.
    """

    pairs: tuple[Pair, ...]
    is_filler: bool = False


@dataclass(frozen=True)
class ForwardSize:
    """Size of a micro-batch.

    Attributes:
        tokens: of its rows, with what fills them up.
        response_tokens: predicted ones; an answer that two pairs share counts twice.
        images: distinct images.
    """

    tokens: int
    response_tokens: int
    images: int = 0


@dataclass(frozen=True)
class Forwards:
    """The micro-batches of an epoch.

    Attributes:
        largest: the most tokens a rank runs through the model at once, with their images, and the most response tokens.
        repetition: tokens of all micro-batches ÷ tokens of whole trees; above 1 where a limit cuts trees apart.
        cut_by: the settings with these limits.
        empty: share of the micro-batches that no pair is left for; a rank computes a filler in their place.
    """

    largest: ForwardSize
    repetition: float = 1.0
    cut_by: tuple[str, ...] = ()
    empty: float = 0.0


@dataclass(frozen=True)
class _Step:
    """The S pairs of a step, tree by tree.

    Attributes:
        rows: (S,) int64, their rows.
        pairs: (S,) their records, copied out of the index.
        weights: (S,) float64, effective weights.
        trees: of each tree the numbers of its pairs, from 0 to S - 1.
    """

    rows: np.ndarray
    pairs: np.ndarray
    weights: np.ndarray
    trees: list[range]


class Plan:
    """The order of a training run.

    Args:
        source: all pairs; those of weight 0 are counted and not computed.
        seed: of the order.
        epochs: passes over all images.
        images_per_step: images in one optimizer step, over all ranks; the last step of an epoch may have fewer.
        pairs_per_forward: most pairs in a micro-batch.
        tokens_per_forward: most tokens in a micro-batch, after packing and with what fills its rows up (a single pair may exceed
            it).
        max_steps: stop after this many optimizer steps, if the epochs have not ended before.
        both_sides: whether rejected sides are computed too; balances the ranks.

    Attributes:
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of one pass.

    Raises:
        UserError: there is no pair.
    """

    def __init__(
        self,
        source: PairSource,
        *,
        seed: int,
        epochs: int,
        images_per_step: int,
        pairs_per_forward: int,
        tokens_per_forward: int | None = None,
        max_steps: int | None = None,
        both_sides: bool = True,
    ) -> None:
        if not source.index.num_images:
            raise UserError("align: there is no pair to train on. Look into prepared/dropped of the run.")
        self._source = source
        self._seed = seed
        self._images_per_step = images_per_step
        self._limits = Limits(
            pairs_per_forward, math.inf if tokens_per_forward is None else tokens_per_forward
        )
        self._both_sides = both_sides
        self.num_pairs = source.index.num_pairs
        self.num_images = source.index.num_images
        self.steps_per_epoch = math.ceil(self.num_images / images_per_step)
        self.total_steps = epochs * self.steps_per_epoch
        if max_steps is not None:
            self.total_steps = min(self.total_steps, max_steps)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.uint32))
        self._steps: OrderedDict[int, _Step] = OrderedDict()
        # A step is read ahead in a thread.
        self._lock = threading.Lock()

    @classmethod
    def of(cls, source: PairSource, align: AlignConfig, seed: int) -> Plan:
        """The plan that the settings describe."""
        return cls(
            source,
            seed=seed,
            epochs=align.epochs,
            images_per_step=align.images_per_step,
            pairs_per_forward=align.pairs_per_forward,
            tokens_per_forward=align.tokens_per_forward,
            max_steps=align.max_steps,
            both_sides=align.objective == "dpo",
        )

    @property
    def whole(self) -> Normaliser:
        """The denominators of one pass over all pairs, as if it were one step."""
        steps = [self.normaliser(step) for step in range(min(self.steps_per_epoch, self.total_steps))]
        return Normaliser(
            weight=math.fsum(part.weight for part in steps),
            nll_tokens=sum(part.nll_tokens for part in steps),
            pairs=sum(part.pairs for part in steps),
        )

    def epoch(self, step: int) -> int:
        """The epoch (from 0) of a step (from 0)."""
        return step // self.steps_per_epoch

    def step_pairs(self, step: int) -> list[Pair]:
        """All pairs of an optimizer step, over all ranks, tree by tree; loads them all."""
        return self._source.load(self._step(step).rows.tolist())

    def step_weights(self, step: int) -> np.ndarray:
        """Effective weights of all pairs of an optimizer step, over all ranks; (S,) float64."""
        return self._step(step).weights

    def normaliser(self, step: int) -> Normaliser:
        """The denominators of an optimizer step."""
        found = self._step(step)
        return Normaliser(
            # A step whose pairs all have weight 0 has loss 0, whatever it is divided by.
            weight=math.fsum(found.weights) or 1.0,
            nll_tokens=int(found.pairs["chosen"][found.pairs["counts_nll"]].sum()),
            pairs=len(found.pairs),
        )

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """What ``rank`` computes in an optimizer step; every rank gets equally many micro-batches.

        Trees stay whole where they fit into a micro-batch, so that their image is encoded once; the tokens are
        balanced over ranks and micro-batches, largest tree first.
        """
        found = self._step(step)
        counts = self._counts(found)
        bins = balance(self._computed(found), counts, world_size, self._limits)[rank::world_size]
        fillers = [] if all(bins) else [counts.cheapest()]
        members = [member for items in bins for member in items or fillers]
        loaded = iter(self._source.load(found.rows[members].tolist()))
        return [
            MicroBatch(tuple(itertools.islice(loaded, len(items) or 1)), is_filler=not items)
            for items in bins
        ]

    def forwards(self, world_size: int) -> Forwards:
        """What the micro-batches of the first epoch have, or those of 16 to 256 of its steps spread over it."""
        steps = min(self.steps_per_epoch, self.total_steps)
        few = min(max(_IMAGES_LOOKED_AT // self._images_per_step, _FEWEST_STEPS), _MOST_STEPS, steps)
        tokens, images, responses = 0, 0, 0
        computed, whole, empty, micro_batches = 0, 0, 0, 0
        cut_by: set[str] = set()
        for step in np.unique(np.linspace(0, steps - 1, few).astype(int)).tolist():
            found = self._step(step)
            counts, trees = self._counts(found), self._computed(found)
            bins = balance(trees, counts, world_size, self._limits)
            packed, of_trees = counts.sizes(bins), counts.sizes(trees)
            for items, sizes in zip(bins, packed, strict=True):
                if num_slots(sizes) > tokens:
                    tokens, images = num_slots(sizes), len(sizes)
                responses = max(responses, int(counts.responses[items].sum()))
            micro_batches += len(bins)
            empty += bins.count([])
            more, fewest = sum(map(sum, packed)), sum(map(sum, of_trees))
            computed, whole = computed + more, whole + fewest
            if more > fewest:
                cut_by |= self._cut_by(trees, of_trees)
        return Forwards(
            ForwardSize(tokens, responses, images),
            computed / whole if whole else 1.0,
            tuple(sorted(cut_by)),
            empty / micro_batches,
        )

    def summary(self, forwards: Forwards) -> dict[str, float | int]:
        """Figures of the plan for the manifest, from the sums in the index.

        Args:
            forwards: of the run's ranks.

        Raises:
            UserError: all weights are 0.
        """
        totals, factors = self._source.index.totals, self._source.coefficients
        if not any(totals.weight):
            raise UserError(
                f"align: the weights of all {self.num_pairs:,} pairs are 0, so nothing could be learnt. Check the column `weight` "
                "of the scored table and score.weights."
            )
        weight = math.fsum(np.multiply(totals.weight, factors))
        squared = math.fsum(np.multiply(totals.weight_squared, factors**2))
        packed, separate = (
            (totals.packed, totals.separate)
            if self._both_sides
            else (totals.packed_chosen, totals.separate_chosen)
        )
        tokens = round(packed * forwards.repetition)
        return {
            "pairs": self.num_pairs,
            "visual_pairs": totals.pairs[1] + totals.pairs[2],
            "reversed_pairs": totals.pairs[2],
            "images": self.num_images,
            "steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "epochs": round(self.total_steps / self.steps_per_epoch, 3),
            "effective_sample_size": round(weight**2 / (self.num_pairs * squared), 4),
            "tokens_per_epoch": tokens,
            "sharing_factor": round(separate / tokens, 2),
        }

    def _step(self, step: int) -> _Step:
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside the run's {self.total_steps} steps")
        with self._lock:
            if step not in self._steps:
                self._steps[step] = self._gather(self._images(step))
                while len(self._steps) > _STEPS_KEPT:
                    self._steps.popitem(last=False)
            return self._steps[step]

    def _images(self, step: int) -> np.ndarray:
        """The trees of a step, in its order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = np.arange(self.num_images, dtype=np.uint32)
            np.random.default_rng([self._seed, epoch]).shuffle(order)
            self._order = (epoch, order)
        start = position * self._images_per_step
        return self._order[1][start : start + self._images_per_step]

    def _gather(self, images: np.ndarray) -> _Step:
        rows, sizes = self._source.index.rows(images)
        pairs = self._source.index.pairs[rows]
        edges = [0, *np.cumsum(sizes).tolist()]
        trees = [range(*limits) for limits in itertools.pairwise(edges)]
        return _Step(rows, pairs, weights_of(self._source, pairs), trees)

    def _computed(self, step: _Step) -> list[list[int]]:
        """The pairs of each tree that take part in the computation."""
        # Without rejected sides a pair is its chosen answer, and an answer shared by two pairs is computed once.
        counted = step.weights > 0 if self._both_sides else step.pairs["counts_nll"]
        return [[member for member in tree if counted[member]] for tree in step.trees]

    def _cut_by(self, trees: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> set[str]:
        """The settings whose limits some of the trees exceed."""
        found = set()
        if any(len(tree) > self._limits.pairs for tree in trees):
            found.add("pairs_per_forward")
        if any(num_slots(of_tree) > self._limits.tokens for of_tree in sizes):
            found.add("tokens_per_forward")
        return found

    def _counts(self, step: _Step) -> TokenCounts:
        tree = [number for number, members in enumerate(step.trees) for _ in members]
        return TokenCounts(step.pairs, tree, both_sides=self._both_sides)


def effective_sample_size(weights: Sequence[float] | np.ndarray) -> float:
    """(Σw)² / (n·Σw²) in [0, 1]: the share of the pairs that the weighting leaves in effect; 0 where all weights are 0."""
    squared = math.fsum(weight**2 for weight in weights)
    return math.fsum(weights) ** 2 / (len(weights) * squared) if squared else 0.0
