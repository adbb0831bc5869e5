"""Rows of `scored` → rows of `prepared`: tokenised pairs, and dropped rows with the reason."""

from __future__ import annotations

import difflib
import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from mmedpo_ray.align.data.batch import Pair, unreadable_image
from mmedpo_ray.align.data.pair_index import REVERSED, TEXT, VISUAL
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.io.images import ImageError, read_size
from mmedpo_ray.models.prompts import PromptWriter
from mmedpo_ray.tables import schemas

WEIGHT_ZERO = "weight_zero"
# Separates image and pair in a tree's key; below every character of ids.
_KEY_SEPARATOR = "\x1f"
# Images whose size is kept: all pairs of one follow one another.
_CACHED_SIZES = 4_096

COLUMNS = [
    *("pair_id", "image_id", "sample_id", "kind", "image_uri", "rejected_image_uri"),
    *("question", "chosen", "rejected", "weight"),
]
"""Columns of `scored` that are read."""

Row = Mapping[str, Any]


class _UnusableRowError(Exception):
    """A row cannot be trained on; arguments are a drop reason and a detail without patient text."""


def tree_key(row: Row) -> str:
    """The id of a prepared row: sorted by it, the pairs of an image are together."""
    return f"{row['image_id']}{_KEY_SEPARATOR}{row['pair_id']}"


def with_reversed_pairs(rows: Sequence[Row], wrong: Mapping[str, str]) -> list[Row]:
    """Adds the reversed visual pair of every sample that has a text and a visual pair.

    The lesion cannot be seen on the noised image x*, so there the wrong answer of the text pair is preferred
    to the right one: (x*, y_l) over (x*, y). Its weight is that of the visual pair.

    Args:
        rows: of `scored`, with the fields of :data:`COLUMNS`.
        wrong: sample_id → rejected answer of its text pair.
    """
    reversed_rows = [
        {
            **row,
            "pair_id": f"{row['pair_id']}:{REVERSED}",
            "kind": REVERSED,
            "image_uri": row["rejected_image_uri"],
            "chosen": wrong[row["sample_id"]],
            "rejected": row["chosen"],
        }
        for row in rows
        if row["kind"] == VISUAL and row["sample_id"] in wrong
    ]
    return [*rows, *reversed_rows]


def wrong_answers(rows: Iterable[Row]) -> dict[str, str]:
    """sample_id → rejected answer of its text pair."""
    return {row["sample_id"]: row["rejected"] for row in rows if row["kind"] == TEXT}


def span_weights(
    chosen: Sequence[int], rejected: Sequence[int], common_weight: float
) -> tuple[list[float], list[float]]:
    """Weight 1 for tokens in which two answers differ, ``common_weight`` for those they share."""
    weights = [1.0] * len(chosen), [1.0] * len(rejected)
    for block in difflib.SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        for side, start in zip(weights, (block.a, block.b), strict=True):
            side[start : start + block.size] = [common_weight] * block.size
    return weights


def prepare_rows(rows: Iterable[Row], writer: PromptWriter, align: AlignConfig) -> list[dict[str, Any]]:
    """Tokenises pairs.

    Args:
        rows: with the fields of :data:`COLUMNS`, reversed pairs included.
        writer: of the model.
        align: lengths and coefficients.

    Returns:
        A row of `prepared` each, without reference log-probabilities; or its ids with ``drop_reason`` and
        ``drop_detail``.

    Raises:
        UserError: a weight is negative or not a number.
    """
    return [_prepare_row(row, writer, align) for row in rows]


def prepare_table(
    scored: pa.Table, writer: PromptWriter, align: AlignConfig
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Tokenises whole trees in this process.

    Args:
        scored: rows of `scored`, at least the fields of :data:`COLUMNS`.
        writer: of the model.
        align: lengths and coefficients.

    Returns:
        A table like `prepared` without reference log-probabilities, and the dropped rows by pair_id, with
        ``drop_reason`` and ``drop_detail``.

    Raises:
        UserError: a weight is negative or not a number.
    """
    rows: list[Row] = scored.select(COLUMNS).to_pylist()
    if align.reversed_visual_coefficient:
        rows = with_reversed_pairs(rows, wrong_answers(rows))
    found = prepare_rows(rows, writer, align)
    kept = sorted((row for row in found if schemas.DROP_REASON not in row), key=lambda row: row["tree_key"])
    dropped = sorted((row for row in found if schemas.DROP_REASON in row), key=lambda row: row["pair_id"])
    return schemas.to_table(kept, schemas.PREPARED), dropped


def make_pair(row: Row, writer: PromptWriter, weight: float = 1.0, *, counts_nll: bool = True) -> Pair:
    """The pair of a row of `prepared`.

    Args:
        row: of `prepared`.
        writer: of the model.
        weight: effective weight in the loss.
        counts_nll: its chosen answer enters the likelihood term.
    """
    same = ("pair_id", "image_id", "image_uri", "rejected_image_uri", "chosen", "rejected")
    return Pair(
        **{name: row[name] for name in same},
        is_visual=row["kind"] != TEXT,
        prompt=writer.widen(row["prompt"], row["prompt_tokens"] - len(row["prompt"]) + 1),
        weight=weight,
        ref_chosen=row.get("ref_chosen_logp") or 0.0,
        ref_rejected=row.get("ref_rejected_logp") or 0.0,
        counts_nll=counts_nll,
        chosen_weights=row["chosen_weights"],
        rejected_weights=row["rejected_weights"],
    )


def _prepare_row(row: Row, writer: PromptWriter, align: AlignConfig) -> dict[str, Any]:
    ids = {"tree_key": tree_key(row), "pair_id": row["pair_id"], "image_id": row["image_id"]}
    try:
        _check_weight(row, align)
        narrow, image_tokens, chosen, rejected = _tokenise(row, writer, align)
    except _UnusableRowError as error:
        reason, detail = error.args
        return ids | {schemas.DROP_REASON: reason, schemas.DROP_DETAIL: detail}
    weights: Sequence[list[float] | None] = (None, None)
    if align.common_token_weight != 1.0 and row["kind"] != VISUAL:
        weights = span_weights(chosen, rejected, align.common_token_weight)
    answer = "\x1f".join((row["image_uri"], row["question"], row["chosen"]))
    digest = hashlib.blake2b(answer.encode(), digest_size=8).digest()
    return ids | {
        "kind": row["kind"],
        "image_uri": row["image_uri"],
        "rejected_image_uri": row["rejected_image_uri"],
        "prompt": narrow,
        "image_position": narrow.index(writer.image_token_id),
        "chosen": chosen,
        "rejected": rejected,
        "chosen_weights": weights[0],
        "rejected_weights": weights[1],
        "prompt_tokens": len(narrow) - 1 + image_tokens,
        "chosen_tokens": len(chosen),
        "rejected_tokens": len(rejected),
        "answer_hash": int.from_bytes(digest, "little", signed=True),
        "weight": row["weight"],
    }


def _check_weight(row: Row, align: AlignConfig) -> None:
    weight = row["weight"]
    if not math.isfinite(weight) or weight < 0:
        raise UserError(
            f"scored, pair {row['pair_id']}: weight {weight} is not a number of at least 0. Run score again."
        )
    # A mean over the number of pairs counts those of weight 0 too.
    if weight == 0 and align.reduction != "mean":
        raise _UnusableRowError(WEIGHT_ZERO, "its weight is 0")
    if row["kind"] == VISUAL and not align.visual_coefficient:
        raise _UnusableRowError(WEIGHT_ZERO, "align.visual_coefficient is 0")


def _tokenise(
    row: Row, writer: PromptWriter, align: AlignConfig
) -> tuple[list[int], int, list[int], list[int]]:
    """Ids of the narrow prompt, tokens of its image, ids of both responses, cut at ``align.max_length``."""
    question, same_image = row["question"], row["image_uri"] == row["rejected_image_uri"]
    if same_image and row["chosen"].strip() == row["rejected"].strip():
        raise _UnusableRowError("equal_sides", "chosen and rejected are the same answer to the same image")
    narrow = writer.narrow_prompt(question)
    chosen, rejected = writer.response(question, row["chosen"]), writer.response(question, row["rejected"])
    if narrow is None or chosen is None or rejected is None:
        raise _UnusableRowError(
            "image_placeholder_in_text", "question or answer holds the model's image placeholder"
        )
    image_tokens = _count_image_tokens(row, writer)
    prompt_tokens = len(narrow) - 1 + image_tokens
    room = align.max_length - prompt_tokens
    if room < 1:
        raise _UnusableRowError(
            "prompt_too_long",
            f"the prompt has {prompt_tokens} tokens, align.max_length is {align.max_length}",
        )
    chosen, rejected = chosen[:room], rejected[:room]
    if same_image and chosen == rejected:
        raise _UnusableRowError(
            "equal_sides", f"both answers are the same up to align.max_length ({align.max_length})"
        )
    return narrow, image_tokens, chosen, rejected


def _count_image_tokens(row: Row, writer: PromptWriter) -> int:
    """Tokens of the images of both sides, which look at files only where their size decides.

    Raises:
        UserError: an image can no longer be read.
    """
    if writer.num_image_tokens is not None:
        return writer.num_image_tokens
    chosen, rejected = (
        writer.count_image_tokens(_size_of(row[name])) for name in ("image_uri", "rejected_image_uri")
    )
    if chosen != rejected:
        raise _UnusableRowError(
            "image_sizes_differ", f"the images of both sides have {chosen} and {rejected} tokens"
        )
    return chosen


@functools.lru_cache(_CACHED_SIZES)
def _size_of(uri: str) -> tuple[int, int]:
    try:
        return read_size(uri)
    except ImageError as error:
        raise unreadable_image(error) from error
