"""Which pairs each rank computes in each optimizer step.

A pure function of seed, epoch, step and world size.

A step takes ``images_per_step`` images with all their pairs; which ones depends on the seed and the epoch
alone. The number of ranks only decides how a step's pairs are spread over ranks and micro-batches, and the
objective does not depend on that: its denominators run over the whole step. So a run may resume with another
number of workers.

A plan holds no pairs. It reads the index of the pairs (:mod:`~mmedpo_ray.align.data.pair_index`), and the
pairs of a rank's micro-batches are loaded on request. It does hold the order of the images in one epoch: four
bytes per image, shuffled once per epoch.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mmedpo_ray.align.data.batch import Pair
from mmedpo_ray.align.data.pair_source import PairSource
from mmedpo_ray.align.data.token_counts import TokenCounts
from mmedpo_ray.align.losses import Normaliser
from mmedpo_ray.align.packing.trees import num_slots
from mmedpo_ray.align.plan.balance import Limits, balance
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.errors import UserError

# The current step, the one read ahead, and one more.
_STEPS_KEPT = 3
# `forwards` looks at this many steps of an epoch; at fewer if steps are large: at those with about so many
# images.
_FEWEST_STEPS, _MOST_STEPS = 16, 256
_IMAGES_LOOKED_AT = 1 << 16


class MicroBatch(NamedTuple):
    """What one rank runs through the model at once.

    Attributes:
        pairs: never empty, because collectives of all ranks must match.
        is_filler: no work was left for the rank: the pairs count nowhere.
    """

    pairs: tuple[Pair, ...]
    is_filler: bool = False


class ForwardSize(NamedTuple):
    """Size of a micro-batch.

    Attributes:
        tokens: of its rows, padding included.
        response_tokens: predicted tokens; an answer that two pairs share counts twice.
        images: distinct images.
    """

    tokens: int
    response_tokens: int
    images: int = 0


class Forwards(NamedTuple):
    """The micro-batches of an epoch.

    Attributes:
        largest: the most tokens a rank runs through the model at once, with their images, and the most
            response tokens.
        repetition: tokens of all micro-batches ÷ tokens of whole trees; above 1 if a limit cuts trees.
        cut_by: the settings with these limits.
        empty: share of the micro-batches without pairs; a rank computes a filler instead.
    """

    largest: ForwardSize
    repetition: float = 1.0
    cut_by: tuple[str, ...] = ()
    empty: float = 0.0


class _Step(NamedTuple):
    """The S pairs of a step, tree by tree.

    Attributes:
        rows: (S,) int64, their rows.
        pairs: (S,) their records, copied out of the index.
        weights: (S,) float64, effective weights.
        trees: the numbers of each tree's pairs, from 0 to S - 1.
    """

    rows: np.ndarray
    pairs: np.ndarray
    weights: np.ndarray
    trees: list[range]


class Plan:
    """The order of a training run.

    Args:
        source: all pairs; those of weight 0 are counted and not computed.
        align: epochs, steps, and the limits of a micro-batch; with ``objective: sft`` only chosen sides are
            computed.
        seed: of the order.

    Attributes:
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of one pass; the last of an epoch may have fewer images.

    Raises:
        UserError: there is no pair.
    """

    def __init__(self, source: PairSource, align: AlignConfig, seed: int) -> None:
        if not source.index.num_images:
            raise UserError("align: there is no pair to train on. Look into prepared/dropped of the run.")
        self._source, self._align, self._seed = source, align, seed
        self._limits = Limits.of(align)
        self._both_sides = align.objective == "dpo"
        self.num_pairs = source.index.num_pairs
        self.num_images = source.index.num_images
        self.steps_per_epoch = math.ceil(self.num_images / align.images_per_step)
        steps = align.epochs * self.steps_per_epoch
        self.total_steps = steps if align.max_steps is None else min(steps, align.max_steps)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.uint32))
        self._steps: OrderedDict[int, _Step] = OrderedDict()
        # A thread reads a step ahead.
        self._lock = threading.Lock()

    @property
    def whole(self) -> Normaliser:
        """The denominators of one pass over all pairs, as if it were one step."""
        steps = [self.normaliser(step) for step in range(min(self.steps_per_epoch, self.total_steps))]
        weights, tokens, pairs = zip(*steps, strict=True)
        return Normaliser(math.fsum(weights), sum(tokens), sum(pairs))

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
            # A step whose pairs all have weight 0 has loss 0 with any denominator.
            weight=math.fsum(found.weights) or 1.0,
            nll_tokens=int(found.pairs["chosen"][found.pairs["counts_nll"]].sum()),
            pairs=len(found.pairs),
        )

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """What ``rank`` computes in an optimizer step; every rank gets the same number of micro-batches.

        Trees stay whole if they fit into a micro-batch, so that their image is encoded once. The tokens are
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
        """The micro-batches of the first epoch, or of 16 to 256 of its steps spread over it."""
        steps = min(self.steps_per_epoch, self.total_steps)
        few = max(_IMAGES_LOOKED_AT // self._align.images_per_step, _FEWEST_STEPS)
        looked_at = np.linspace(0, steps - 1, min(few, _MOST_STEPS, steps)).astype(int)
        tokens, images, responses = 0, 0, 0
        computed, whole, empty, micro_batches = 0, 0, 0, 0
        cut_by: set[str] = set()
        for step in np.unique(looked_at).tolist():
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
            of_bins, of_whole = sum(map(sum, packed)), sum(map(sum, of_trees))
            computed, whole = computed + of_bins, whole + of_whole
            if of_bins > of_whole:
                if any(len(tree) > self._limits.pairs for tree in trees):
                    cut_by.add("pairs_per_forward")
                if any(num_slots(sizes) > self._limits.tokens for sizes in of_trees):
                    cut_by.add("tokens_per_forward")
        repetition = computed / whole if whole else 1.0
        largest = ForwardSize(tokens, responses, images)
        return Forwards(largest, repetition, tuple(sorted(cut_by)), empty / micro_batches)

    def summary(self, forwards: Forwards) -> dict[str, Any]:
        """Figures of the plan for the manifest, from the sums in the index.

        Args:
            forwards: of the run's ranks.

        Raises:
            UserError: all weights are 0.
        """
        sums, factors = self._source.index.sums, self._source.coefficients
        if not sums["weight"].any():
            raise UserError(
                f"align: the weights of all {self.num_pairs:,} pairs are 0, so nothing could be learnt. "
                "Check the column `weight` of the scored table and score.weights."
            )
        weight = math.fsum(sums["weight"] * factors)
        squared = math.fsum(sums["weight_squared"] * factors**2)
        packed, separate = (int(sums[name][0 if self._both_sides else 1]) for name in ("packed", "separate"))
        tokens = round(packed * forwards.repetition)
        return {
            "pairs": self.num_pairs,
            "visual_pairs": int(sums["pairs"][1:].sum()),
            "reversed_pairs": int(sums["pairs"][2]),
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
                rows, sizes = self._source.index.rows(self._images(step))
                pairs = self._source.index.pairs[rows]
                trees = [range(*edges) for edges in itertools.pairwise([0, *np.cumsum(sizes).tolist()])]
                self._steps[step] = _Step(rows, pairs, self._source.weights(pairs), trees)
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
        start = position * self._align.images_per_step
        return self._order[1][start : start + self._align.images_per_step]

    def _computed(self, step: _Step) -> list[list[int]]:
        """The pairs of each tree that are computed."""
        # Without rejected sides a pair is its chosen answer, and an answer shared by two pairs is computed
        # once.
        counted = step.weights > 0 if self._both_sides else step.pairs["counts_nll"]
        return [[member for member in tree if counted[member]] for tree in step.trees]

    def _counts(self, step: _Step) -> TokenCounts:
        tree = [number for number, members in enumerate(step.trees) for _ in members]
        return TokenCounts(step.pairs, tree, both_sides=self._both_sides)


def effective_sample_size(weights: Sequence[float] | np.ndarray) -> float:
    """(Σw)² / (n·Σw²) in [0, 1]: the effective share of the pairs; 0 if all weights are 0."""
    squared = math.fsum(weight**2 for weight in weights)
    return math.fsum(weights) ** 2 / (len(weights) * squared) if squared else 0.0
