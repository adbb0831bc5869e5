"""Rows of `scored` (and `reference`) → tokenised pairs, and the rows that cannot be trained on with the reason."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmedpo_ray import tables
from mmedpo_ray.align.batch import Pair
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import PromptWriter

# Fewer response tokens than this are not worth a pair: the end token alone, or a cut-off answer.
_MIN_RESPONSE_TOKENS = 1

# Kind of a pair that is derived here and is in no table.
REVERSED = "reversed"

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
    """Token ids of a pair's prompt and responses, and the span weights of the responses (``None``: all 1)."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_weights: list[float] | None = None
    rejected_weights: list[float] | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a row cannot be trained on.

    Attributes:
        reason: short and machine-readable.
        detail: where and what, without patient text.
    """

    reason: str
    detail: str


def with_reversed_pairs(scored: pa.Table) -> pa.Table:
    """Adds the reversed visual pair of every sample that has a text and a visual pair.

    On the noised image x* the lesion cannot be seen, so the wrong answer of the text pair is preferred to the right one:
    (x*, y_l) over (x*, y). Its weight is that of the visual pair.

    Args:
        scored: `scored` with the columns of :data:`COLUMNS`.
    """
    kinds = [("text", ["sample_id", "rejected"]), ("visual", COLUMNS)]
    text, visual = (
        scored.filter(pc.equal(scored["kind"], kind)).select(columns).to_pylist() for kind, columns in kinds
    )
    wrong = {row["sample_id"]: row["rejected"] for row in text}
    rows = [
        row
        | {
            "pair_id": f"{row['pair_id']}:{REVERSED}",
            "kind": REVERSED,
            "image_uri": row["rejected_image_uri"],
            "chosen": wrong[row["sample_id"]],
            "rejected": row["chosen"],
        }
        for row in visual
        if row["sample_id"] in wrong
    ]
    return pa.concat_tables(
        [scored.select(COLUMNS), pa.Table.from_pylist(rows, scored.select(COLUMNS).schema)]
    )


def span_weights(
    chosen: Sequence[int], rejected: Sequence[int], common_weight: float
) -> tuple[list[float], list[float]]:
    """Weight 1 for tokens in which two answers differ, ``common_weight`` for those in the spans that both share."""
    weights = [1.0] * len(chosen), [1.0] * len(rejected)
    for block in difflib.SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        for side, start in zip(weights, (block.a, block.b), strict=True):
            side[start : start + block.size] = [common_weight] * block.size
    return weights


def tokenise(
    row: Mapping[str, Any], writer: PromptWriter, max_length: int, common_token_weight: float = 1.0
) -> Tokens | Refusal:
    """Writes both sides of a pair; a response is cut at ``max_length``, a prompt never.

    Args:
        row: of `scored`.
        writer: of the model.
        max_length: tokens of prompt + response, image tokens included.
        common_token_weight: weight of tokens that the answers of a text pair share, 0 to 1.
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
    if common_token_weight == 1.0 or row["kind"] == "visual":
        return Tokens(prompt, cut_chosen, cut_rejected)
    return Tokens(
        prompt, cut_chosen, cut_rejected, *span_weights(cut_chosen, cut_rejected, common_token_weight)
    )


def prepare_pairs(
    scored: pa.Table,
    writer: PromptWriter,
    *,
    max_length: int,
    visual_coefficient: float,
    reversed_visual_coefficient: float = 0.0,
    common_token_weight: float = 1.0,
    reference: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Makes the pairs of a training run.

    Args:
        scored: the `scored` table.
        writer: of the model.
        max_length: ``align.max_length``.
        visual_coefficient: factor on the weight of visual pairs.
        reversed_visual_coefficient: factor on the weight of reversed visual pairs; above 0 they are derived here.
        common_token_weight: see :func:`tokenise`.
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
    coefficients = {"text": 1.0, "visual": visual_coefficient, REVERSED: reversed_visual_coefficient}
    scored = scored.select(COLUMNS)
    rows = (with_reversed_pairs(scored) if reversed_visual_coefficient else scored).to_pylist()
    # Text pairs first: an answer that a text and a visual pair share enters the likelihood with the text pair.
    for row in sorted(rows, key=lambda item: (item["kind"] != "text", item["pair_id"])):
        found = _prepare(row, writer, max_length, coefficients[row["kind"]], common_token_weight, reference)
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
                is_visual=row["kind"] != "text",
                image_uri=row["image_uri"],
                rejected_image_uri=row["rejected_image_uri"],
                prompt=tokens.prompt,
                chosen=tokens.chosen,
                rejected=tokens.rejected,
                weight=weight,
                ref_chosen=ref_chosen,
                ref_rejected=ref_rejected,
                # The chosen side of a reversed pair is wrong: its likelihood must not rise.
                counts_nll=answer not in anchored and row["kind"] != REVERSED,
                chosen_weights=tokens.chosen_weights,
                rejected_weights=tokens.rejected_weights,
            )
        )
        anchored.add(answer)
    return sorted(pairs, key=lambda pair: pair.pair_id), sorted(dropped, key=lambda row: row["pair_id"])


def _prepare(
    row: Mapping[str, Any],
    writer: PromptWriter,
    max_length: int,
    coefficient: float,
    common_token_weight: float,
    reference: Mapping[str, tuple[float, float]] | None,
) -> tuple[float, Tokens] | Refusal:
    weight = row["weight"]
    if not math.isfinite(weight) or weight < 0:
        raise UserError(
            f"scored, pair {row['pair_id']}: weight {weight} is not a number of at least 0. Run score again."
        )
    if weight == 0:
        return Refusal("weight_zero", "its weight is 0")
    weight *= coefficient
    if weight == 0:
        return Refusal("weight_zero", "align.visual_coefficient is 0")
    tokens = tokenise(row, writer, max_length, common_token_weight)
    if isinstance(tokens, Tokens) and reference is not None and row["pair_id"] not in reference:
        return Refusal("no_reference", "the reference station left it out; see reference/dropped")
    return tokens if isinstance(tokens, Refusal) else (weight, tokens)


def _equal_sides(row: Mapping[str, Any]) -> bool:
    return row["chosen"].strip() == row["rejected"].strip() and row["image_uri"] == row["rejected_image_uri"]
