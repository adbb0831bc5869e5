"""Which pairs every rank computes in every optimizer step: a pure function of (seed, epoch, step, world size).

A step takes ``images_per_step`` images with all their pairs; which ones depends on the seed and the epoch alone. Only how
a step's pairs are spread over ranks and micro-batches depends on the number of ranks, and the objective does not: its
denominators run over the whole step. So a run may go on with another number of workers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmedpo_ray.align.batch import Pair, num_tokens
from mmedpo_ray.align.losses import Normaliser
from mmedpo_ray.config import AlignConfig
from mmedpo_ray.errors import UserError


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
    """Size of a micro-batch in tokens, and in response tokens of these."""

    tokens: int
    response_tokens: int


class Plan:
    """The order of a training run.

    Args:
        pairs: all pairs, each with a weight above 0.
        seed: of the order.
        epochs: passes over all images.
        images_per_step: images in one optimizer step, over all ranks; the last step of an epoch may have fewer.
        pairs_per_forward: most pairs in a micro-batch.
        tokens_per_forward: most tokens in a micro-batch, after packing (a single pair may exceed it).
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
        pairs: Sequence[Pair],
        *,
        seed: int,
        epochs: int,
        images_per_step: int,
        pairs_per_forward: int,
        tokens_per_forward: int | None = None,
        max_steps: int | None = None,
        both_sides: bool = True,
    ) -> None:
        if not pairs:
            raise UserError(
                "align: there is no pair to train on. Look into dropped/ of the station's folder."
            )
        trees: dict[str, list[Pair]] = {}
        for pair in sorted(pairs, key=lambda item: item.pair_id):
            trees.setdefault(pair.image_id, []).append(pair)
        self._trees = [trees[image_id] for image_id in sorted(trees)]
        self._seed = seed
        self._images_per_step = images_per_step
        self._pairs_per_forward = pairs_per_forward
        self._tokens_per_forward = math.inf if tokens_per_forward is None else tokens_per_forward
        self._both_sides = both_sides
        self.num_pairs = len(pairs)
        self.num_images = len(self._trees)
        self.steps_per_epoch = math.ceil(self.num_images / images_per_step)
        self.total_steps = epochs * self.steps_per_epoch
        if max_steps is not None:
            self.total_steps = min(self.total_steps, max_steps)
        self._filler = min(
            (pair for tree in self._trees for pair in tree),
            key=lambda pair: (self._cost([pair]), pair.pair_id),
        )
        self._order: tuple[int, np.ndarray] | None = None

    @classmethod
    def of(cls, pairs: Sequence[Pair], align: AlignConfig, seed: int) -> Plan:
        """The plan that the settings describe."""
        return cls(
            pairs,
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
        """All pairs of an optimizer step, over all ranks, tree by tree."""
        return [pair for tree in self._step_trees(step) for pair in tree]

    def normaliser(self, step: int) -> Normaliser:
        """The denominators of an optimizer step."""
        pairs = self.step_pairs(step)
        return Normaliser(
            weight=math.fsum(pair.weight for pair in pairs),
            nll_tokens=sum(len(pair.chosen) for pair in pairs if pair.counts_nll),
            pairs=len(pairs),
        )

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """What ``rank`` computes in an optimizer step; every rank gets equally many micro-batches.

        Trees stay whole where they fit into a micro-batch, so that their image is encoded once; the tokens are
        balanced over ranks and micro-batches, largest tree first.
        """
        pieces = self._pieces(step)
        rounds = max(1, math.ceil(sum(map(len, pieces)) / (world_size * self._pairs_per_forward)))
        while (bins := self._pack(pieces, world_size * rounds)) is None:
            rounds += 1
        mine = bins[rank::world_size]
        return [
            MicroBatch(tuple(items)) if items else MicroBatch((self._filler,), is_filler=True)
            for items in mine
        ]

    def largest_micro_batch(self, world_size: int) -> ForwardSize:
        """The most tokens a rank runs through the model at once in the first epoch, with the most response tokens."""
        steps = range(min(self.steps_per_epoch, self.total_steps))
        batches = [
            micro.pairs
            for step in steps
            for rank in range(world_size)
            for micro in self.micro_batches(step, rank, world_size)
        ]
        return ForwardSize(
            max(map(self._cost, batches)),
            max(
                sum(len(pair.chosen) + len(pair.rejected) * self._both_sides for pair in batch)
                for batch in batches
            ),
        )

    def summary(self) -> dict[str, float | int]:
        """Figures of the plan for the manifest."""
        weights = [pair.weight for tree in self._trees for pair in tree]
        return {
            "pairs": self.num_pairs,
            "visual_pairs": sum(pair.is_visual for tree in self._trees for pair in tree),
            "images": self.num_images,
            "steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "epochs": round(self.total_steps / self.steps_per_epoch, 3),
            "effective_sample_size": round(effective_sample_size(weights), 4),
            **self._token_figures(),
        }

    def _token_figures(self) -> dict[str, float | int]:
        """Tokens of an epoch as packed trees, and how many times more separate sequences would have."""
        packed = sum(self._cost(tree) for tree in self._trees)
        separate = sum(
            (len(pair.prompt) + len(pair.chosen)) * pair.counts_nll
            if not self._both_sides
            else 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
            for tree in self._trees
            for pair in tree
        )
        return {"tokens_per_epoch": packed, "sharing_factor": round(separate / packed, 2)}

    def _step_trees(self, step: int) -> list[list[Pair]]:
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside the run's {self.total_steps} steps")
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self.num_images))
        start = position * self._images_per_step
        return [self._trees[index] for index in self._order[1][start : start + self._images_per_step]]

    def _pieces(self, step: int) -> list[list[Pair]]:
        """Trees of a step, cut between pairs where they exceed a micro-batch, most tokens first."""
        trees = self._step_trees(step)
        if not self._both_sides:
            # Without rejected sides a pair is its chosen answer, and an answer shared by two pairs is computed once.
            trees = [[pair for pair in tree if pair.counts_nll] for tree in trees]
        pieces = [piece for tree in trees for piece in self._cut(tree)]
        return sorted(pieces, key=lambda piece: (-self._cost(piece), piece[0].pair_id))

    def _cut(self, tree: list[Pair]) -> list[list[Pair]]:
        """Pieces of a tree that fit into a micro-batch; each repeats the image's tokens."""
        pieces: list[list[Pair]] = []
        for pair in tree:
            if pieces and self._fits([*pieces[-1], pair]):
                pieces[-1].append(pair)
            else:
                pieces.append([pair])
        return pieces

    def _fits(self, pairs: list[Pair]) -> bool:
        return len(pairs) <= self._pairs_per_forward and self._cost(pairs) <= self._tokens_per_forward

    def _pack(self, pieces: list[list[Pair]], num_bins: int) -> list[list[Pair]] | None:
        """Puts each piece into the emptiest bin that has room; ``None`` if one fits nowhere."""
        bins: list[list[Pair]] = [[] for _ in range(num_bins)]
        tokens = [0] * num_bins
        for piece in pieces:
            cost = self._cost(piece)
            open_bins = [
                k
                for k in range(num_bins)
                if not bins[k]
                or (
                    len(bins[k]) + len(piece) <= self._pairs_per_forward
                    and tokens[k] + cost <= self._tokens_per_forward
                )
            ]
            if not open_bins:
                return None
            target = min(open_bins, key=lambda k: (tokens[k], k))
            bins[target] += piece
            tokens[target] += cost
        return bins

    def _cost(self, pairs: Sequence[Pair]) -> int:
        return num_tokens(pairs, both_sides=self._both_sides)


def hold_out(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Sets images apart, with all their pairs: those that training sees, and those it is validated on.

    Which images depends on the seed and their ids alone: those with the lowest hash, so that images added later change
    little of it.

    Args:
        pairs: all pairs.
        share: of the images, 0 to 1; above 0 at least one image is held out and at least one is trained on.
        seed: of the choice.

    Raises:
        UserError: there are not two images to share out.
    """
    images = sorted(
        {pair.image_id for pair in pairs},
        key=lambda image_id: hashlib.blake2b(f"{seed}/{image_id}".encode(), digest_size=16).digest(),
    )
    if share and len(images) < 2:
        raise UserError(
            f"align.validation_share={share} holds out images, and there are pairs of {len(images)}. Set it to 0."
        )
    count = min(max(round(share * len(images)), 1), len(images) - 1) if share else 0
    apart = set(images[:count])
    return (
        [pair for pair in pairs if pair.image_id not in apart],
        [pair for pair in pairs if pair.image_id in apart],
    )


def effective_sample_size(weights: Sequence[float]) -> float:
    """(Σw)² / (n·Σw²) in (0, 1]: the share of the pairs that the weighting leaves in effect."""
    return math.fsum(weights) ** 2 / (len(weights) * math.fsum(weight**2 for weight in weights))
