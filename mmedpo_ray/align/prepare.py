"""Rows of `scored` (and `reference`) → tokenised pairs, and the rows that cannot be trained on with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmedpo_ray import tables
from mmedpo_ray.align.batch import Pair
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import PromptWriter

# Fewer response tokens than this are not worth a pair: the end token alone, or a cut-off answer.
_MIN_RESPONSE_TOKENS = 1

COLUMNS = [
    "pair_id",
    "image_id",
    "sample_id",
    "kind",
    "image_uri",
    "rejected_image_uri",
    "question",
    "chosen",
    "rejected",
    "weight",
]


@dataclass(frozen=True)
class Tokens:
    """Token ids of a pair's prompt and responses."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class Refusal:
    """Why a row cannot be trained on.

    Attributes:
        reason: short and machine-readable.
        detail: where and what, without patient text.
    """

    reason: str
    detail: str


def tokenise(row: Mapping[str, Any], writer: PromptWriter, max_length: int) -> Tokens | Refusal:
    """Writes both sides of a pair; a response is cut at ``max_length``, a prompt never.

    Args:
        row: of `scored`.
        writer: of the model.
        max_length: tokens of prompt + response, image tokens included.
    """
    if _equal_sides(row):
        return Refusal("equal_sides", "chosen and rejected are the same answer to the same image")
    question = row["question"]
    prompt = writer.prompt(question)
    chosen, rejected = writer.response(question, row["chosen"]), writer.response(question, row["rejected"])
    if prompt is None or chosen is None or rejected is None:
        return Refusal("image_placeholder_in_text", "question or answer holds the model's image placeholder")
    room = max_length - len(prompt)
    if room < _MIN_RESPONSE_TOKENS:
        return Refusal(
            "prompt_too_long", f"the prompt has {len(prompt)} tokens, align.max_length is {max_length}"
        )
    cut_chosen, cut_rejected = chosen[:room], rejected[:room]
    if row["kind"] == "text" and cut_chosen == cut_rejected:
        return Refusal("equal_sides", f"both answers are the same up to align.max_length ({max_length})")
    return Tokens(prompt, cut_chosen, cut_rejected)


def prepare_pairs(
    scored: pa.Table,
    writer: PromptWriter,
    *,
    max_length: int,
    visual_coefficient: float,
    reference: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Makes the pairs of a training run.

    Args:
        scored: the `scored` table.
        writer: of the model.
        max_length: ``align.max_length``.
        visual_coefficient: factor on the weight of visual pairs.
        reference: pair_id → (chosen, rejected) reference log-probabilities; ``None`` if the objective needs none. A
            row that is absent was left out by the reference station and is left out here.

    Returns:
        Pairs with a weight above 0, by pair_id, and the rows left out with ``drop_reason`` and ``drop_detail``.

    Raises:
        UserError: a weight is negative or not a number.
    """
    pairs: list[Pair] = []
    dropped: list[dict[str, Any]] = []
    anchored: set[tuple[str, str, str]] = set()
    rows = scored.select(COLUMNS).to_pylist()
    # Text pairs first: an answer that a text and a visual pair share enters the likelihood with the text pair.
    for row in sorted(rows, key=lambda item: (item["kind"] != "text", item["pair_id"])):
        found = _prepare(row, writer, max_length, visual_coefficient, reference)
        if isinstance(found, Refusal):
            dropped.append(row | {tables.DROP_REASON: found.reason, tables.DROP_DETAIL: found.detail})
            continue
        weight, tokens = found
        answer = (row["image_uri"], row["question"], row["chosen"])
        ref_chosen, ref_rejected = reference[row["pair_id"]] if reference is not None else (0.0, 0.0)
        pairs.append(
            Pair(
                pair_id=row["pair_id"],
                image_id=row["image_id"],
                is_visual=row["kind"] == "visual",
                image_uri=row["image_uri"],
                rejected_image_uri=row["rejected_image_uri"],
                prompt=tokens.prompt,
                chosen=tokens.chosen,
                rejected=tokens.rejected,
                weight=weight,
                ref_chosen=ref_chosen,
                ref_rejected=ref_rejected,
                counts_nll=answer not in anchored,
            )
        )
        anchored.add(answer)
    return sorted(pairs, key=lambda pair: pair.pair_id), sorted(dropped, key=lambda row: row["pair_id"])


def _prepare(
    row: Mapping[str, Any],
    writer: PromptWriter,
    max_length: int,
    visual_coefficient: float,
    reference: Mapping[str, tuple[float, float]] | None,
) -> tuple[float, Tokens] | Refusal:
    weight = row["weight"]
    if not math.isfinite(weight) or weight < 0:
        raise UserError(
            f"scored, pair {row['pair_id']}: weight {weight} is not a number of at least 0. Run score again."
        )
    if weight == 0:
        return Refusal("weight_zero", "its weight is 0")
    if row["kind"] == "visual":
        weight *= visual_coefficient
        if weight == 0:
            return Refusal("weight_zero", "align.visual_coefficient is 0")
    tokens = tokenise(row, writer, max_length)
    if isinstance(tokens, Tokens) and reference is not None and row["pair_id"] not in reference:
        return Refusal("no_reference", "the reference station left it out; see reference/dropped")
    return tokens if isinstance(tokens, Refusal) else (weight, tokens)


def _equal_sides(row: Mapping[str, Any]) -> bool:
    return row["chosen"].strip() == row["rejected"].strip() and row["image_uri"] == row["rejected_image_uri"]
