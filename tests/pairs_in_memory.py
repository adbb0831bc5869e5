"""Pairs as objects, for plans and objectives that tests make up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from mmedpo_ray.align.data.batch import Pair
from mmedpo_ray.align.data.pair_index import (
    KINDS,
    PAIR,
    PairIndex,
    hash_images,
    index_pairs,
    set_orders,
    sum_pairs,
)
from mmedpo_ray.align.data.pair_source import PairSource
from mmedpo_ray.align.data.tokenise import make_pair, prepare_table
from mmedpo_ray.align.losses import ResponseLogps
from mmedpo_ray.align.plan.plan import Plan
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.models.prompts import PromptWriter


class PairsInMemory(PairSource):
    """Pairs as objects, for small sets; their weights are the effective ones.

    Args:
        pairs: in any order.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = sorted(pairs, key=lambda pair: (pair.image_id, pair.pair_id))
        self.coefficients = np.ones(len(KINDS))
        numbers: dict[str, int] = {}
        records: list[Any] = []
        starts: list[int] = []
        for row, pair in enumerate(self._pairs):
            if row == 0 or pair.image_id != self._pairs[row - 1].image_id:
                starts.append(row)
            records.append(
                (
                    pair.weight,
                    len(pair.prompt),
                    len(pair.chosen),
                    len(pair.rejected),
                    numbers.setdefault(pair.image_uri, len(numbers)),
                    numbers.setdefault(pair.rejected_image_uri, len(numbers)),
                    *(0, 0, 0, 0),
                    int(pair.is_visual),
                    pair.counts_nll,
                )
            )
        found, first = np.array(records, PAIR), np.array(starts, np.int64)
        tokens = [
            [np.array(getattr(pair, name), "<i4").tobytes() for pair in self._pairs]
            for name in ("prompt", "chosen", "rejected")
        ]
        set_orders(found, first, *tokens)
        hashes = hash_images(self._pairs[row].image_id for row in starts)
        self.index = PairIndex(found, np.append(first, len(found)), hashes, sum_pairs(found, first))

    def load(self, numbers: Sequence[int]) -> list[Pair]:
        """The pairs with these row numbers."""
        return [self._pairs[number] for number in numbers]


def prepare_pairs(
    scored: pa.Table,
    writer: PromptWriter,
    *,
    max_length: int,
    visual_coefficient: float,
    reversed_visual_coefficient: float = 0.0,
    common_token_weight: float = 1.0,
    with_weightless: bool = False,
) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Makes the pairs of a small table in this process: what the prepare stage does, without its table.

    Args:
        scored: the `scored` table.
        writer: of the model.
        max_length: ``align.max_length``.
        visual_coefficient: factor on the weight of visual pairs.
        reversed_visual_coefficient: factor on the weight of reversed visual pairs; above 0 they are derived.
        common_token_weight: ``align.common_token_weight``.
        with_weightless: keep pairs of weight 0, as ``align.reduction=mean`` does.

    Returns:
        Pairs by pair_id, their reference log-probabilities 0, and the rows left out with
        ``drop_reason`` and ``drop_detail``.

    Raises:
        UserError: a weight is negative or not a number.
    """
    # Not checked: tests cut at fewer tokens than the settings allow.
    align = AlignConfig().model_copy(
        update={
            "max_length": max_length,
            "visual_coefficient": visual_coefficient,
            "reversed_visual_coefficient": reversed_visual_coefficient,
            "common_token_weight": common_token_weight,
            "reduction": "mean" if with_weightless else "weighted_mean",
        }
    )
    table, dropped = prepare_table(scored, writer, align)
    index, _ = index_pairs(table)
    coefficients = dict(zip(KINDS, (1.0, visual_coefficient, reversed_visual_coefficient), strict=True))
    pairs = [
        make_pair(
            row, writer, row["weight"] * coefficients[row["kind"]], counts_nll=bool(entry["counts_nll"])
        )
        for row, entry in zip(table.to_pylist(), index, strict=True)
    ]
    return sorted(pairs, key=lambda pair: pair.pair_id), dropped


def plain_side(logps: Tensor, num_tokens: Tensor) -> ResponseLogps:
    """A side without span weights and divergence."""
    return ResponseLogps(logps, num_tokens, logps, num_tokens)


def plan_of(source: PairSource, *, seed: int = 0, both_sides: bool = True, **settings: Any) -> Plan:
    """The plan under these settings of `align`, which are not checked: limits may be smaller than allowed."""
    update = {"tokens_per_forward": None, "objective": "dpo" if both_sides else "sft", **settings}
    return Plan(source, AlignConfig().model_copy(update=update), seed)
