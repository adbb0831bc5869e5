"""Rows of `scored` → rows of `prepared`: tokenised pairs, and the rows that cannot be trained on with the reason."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmedpo_ray.align.data.batch import Pair
from mmedpo_ray.align.data.pair_index import REVERSED, TEXT, VISUAL
from mmedpo_ray.align.settings import AlignConfig
from mmedpo_ray.errors import UserError
from mmedpo_ray.models.loading import PromptWriter
from mmedpo_ray.tables import schemas

# Fewer response tokens than this are not worth a pair: the end token alone, or a cut-off answer.
_MIN_RESPONSE_TOKENS = 1
# Comes after an image's id in a tree's key; below every character that ids are written with.
_KEY_SEPARATOR = "\x1f"

WEIGHT_ZERO = "weight_zero"

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
class Preparation:
    """What the prepared pairs depend on besides the rows and the model.

    Attributes:
        max_length: tokens of prompt + response, image tokens included; a response is cut there, a prompt never.
        with_visual: whether visual pairs are trained on.
        with_reversed: whether the reversed pair of every visual one is derived.
        common_token_weight: weight of tokens that the answers of a text pair share, 0 to 1.
        with_weightless: whether pairs of weight 0 stay: a mean over the number of pairs counts them.
    """

    max_length: int
    with_visual: bool = True
    with_reversed: bool = False
    common_token_weight: float = 1.0
    with_weightless: bool = False

    @classmethod
    def of(cls, align: AlignConfig) -> Preparation:
        """What the settings ask for."""
        return cls(
            align.max_length,
            align.visual_coefficient > 0,
            align.reversed_visual_coefficient > 0,
            align.common_token_weight,
            align.reduction == "mean",
        )


@dataclass(frozen=True)
class _Tokens:
    """Token ids of a pair's prompt and responses, and the span weights of the responses (``None``: all 1)."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_weights: list[float] | None = None
    rejected_weights: list[float] | None = None


@dataclass(frozen=True)
class _Refusal:
    """Why a row cannot be trained on: short and machine-readable, and where and what, without patient text."""

    reason: str
    detail: str


def tree_key(row: Mapping[str, Any]) -> str:
    """The id of a prepared row: sorted by it, the pairs of an image stand together."""
    return f"{row['image_id']}{_KEY_SEPARATOR}{row['pair_id']}"


def with_reversed_pairs(
    rows: Sequence[Mapping[str, Any]], wrong: Mapping[str, str]
) -> list[Mapping[str, Any]]:
    """Adds the reversed visual pair of every sample that has a text and a visual pair.

    On the noised image x* the lesion cannot be seen, so the wrong answer of the text pair is preferred to the right one:
    (x*, y_l) over (x*, y). Its weight is that of the visual pair.

    Args:
        rows: of `scored`, with the fields of :data:`COLUMNS`.
        wrong: sample_id → rejected answer of its text pair.
    """
    return [
        *rows,
        *(
            row
            | {
                "pair_id": f"{row['pair_id']}:{REVERSED}",
                "kind": REVERSED,
                "image_uri": row["rejected_image_uri"],
                "chosen": wrong[row["sample_id"]],
                "rejected": row["chosen"],
            }
            for row in map(dict, rows)
            if row["kind"] == VISUAL and row["sample_id"] in wrong
        ),
    ]


def span_weights(
    chosen: Sequence[int], rejected: Sequence[int], common_weight: float
) -> tuple[list[float], list[float]]:
    """Weight 1 for tokens in which two answers differ, ``common_weight`` for those in the spans that both share."""
    weights = [1.0] * len(chosen), [1.0] * len(rejected)
    for block in difflib.SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks():
        for side, start in zip(weights, (block.a, block.b), strict=True):
            side[start : start + block.size] = [common_weight] * block.size
    return weights


def prepare_rows(
    rows: Iterable[Mapping[str, Any]], writer: PromptWriter, how: Preparation
) -> list[dict[str, Any]]:
    """Tokenises pairs.

    Args:
        rows: with the fields of :data:`COLUMNS`, reversed pairs included.
        writer: of the model.
        how: lengths and what is wanted.

    Returns:
        A row of `prepared` each, without reference log-probabilities; or its ids with ``drop_reason`` and ``drop_detail``.

    Raises:
        UserError: a weight is negative or not a number.
    """
    return [_prepare_row(row, writer, how) for row in rows]


def prepare_table(
    scored: pa.Table, writer: PromptWriter, how: Preparation
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Tokenises whole trees in this process.

    Args:
        scored: rows of `scored`, at least the fields of :data:`COLUMNS`.
        writer: of the model.
        how: lengths and what is wanted.

    Returns:
        A table like `prepared` without reference log-probabilities, and the rows left out by pair_id, with ``drop_reason`` and
        ``drop_detail``.

    Raises:
        UserError: a weight is negative or not a number.
    """
    rows: Sequence[Mapping[str, Any]] = scored.select(COLUMNS).to_pylist()
    if how.with_reversed:
        rows = with_reversed_pairs(
            rows, {row["sample_id"]: row["rejected"] for row in rows if row["kind"] == TEXT}
        )
    found = prepare_rows(rows, writer, how)
    kept = sorted((row for row in found if schemas.DROP_REASON not in row), key=lambda row: row["tree_key"])
    dropped = sorted((row for row in found if schemas.DROP_REASON in row), key=lambda row: row["pair_id"])
    return schemas.to_table(kept, schemas.PREPARED), dropped


def make_pair(
    row: Mapping[str, Any], writer: PromptWriter, weight: float = 1.0, *, counts_nll: bool = True
) -> Pair:
    """The pair of a row of `prepared`.

    Args:
        row: of `prepared`.
        writer: of the model.
        weight: effective weight in the loss.
        counts_nll: its chosen answer enters the likelihood term.
    """
    return Pair(
        pair_id=row["pair_id"],
        image_id=row["image_id"],
        is_visual=row["kind"] != TEXT,
        image_uri=row["image_uri"],
        rejected_image_uri=row["rejected_image_uri"],
        prompt=writer.widen(row["prompt"]),
        chosen=row["chosen"],
        rejected=row["rejected"],
        weight=weight,
        ref_chosen=row.get("ref_chosen_logp") or 0.0,
        ref_rejected=row.get("ref_rejected_logp") or 0.0,
        counts_nll=counts_nll,
        chosen_weights=row["chosen_weights"],
        rejected_weights=row["rejected_weights"],
    )


def _prepare_row(row: Mapping[str, Any], writer: PromptWriter, how: Preparation) -> dict[str, Any]:
    ids = {"tree_key": tree_key(row), "pair_id": row["pair_id"], "image_id": row["image_id"]}
    tokens = _refuse_weight(row, how) or _tokenise(row, writer, how)
    if isinstance(tokens, _Refusal):
        return ids | {schemas.DROP_REASON: tokens.reason, schemas.DROP_DETAIL: tokens.detail}
    prompt = writer.narrow(tokens.prompt)
    return ids | {
        "kind": row["kind"],
        "image_uri": row["image_uri"],
        "rejected_image_uri": row["rejected_image_uri"],
        "prompt": prompt,
        "image_position": prompt.index(writer.image_token_id),
        "chosen": tokens.chosen,
        "rejected": tokens.rejected,
        "chosen_weights": tokens.chosen_weights,
        "rejected_weights": tokens.rejected_weights,
        "prompt_tokens": len(tokens.prompt),
        "chosen_tokens": len(tokens.chosen),
        "rejected_tokens": len(tokens.rejected),
        "answer_hash": _hash(row["image_uri"], row["question"], row["chosen"]),
        "weight": row["weight"],
    }


def _refuse_weight(row: Mapping[str, Any], how: Preparation) -> _Refusal | None:
    weight = row["weight"]
    if not math.isfinite(weight) or weight < 0:
        raise UserError(
            f"scored, pair {row['pair_id']}: weight {weight} is not a number of at least 0. Run score again."
        )
    if weight == 0 and not how.with_weightless:
        return _Refusal(WEIGHT_ZERO, "its weight is 0")
    if row["kind"] == VISUAL and not how.with_visual:
        return _Refusal(WEIGHT_ZERO, "align.visual_coefficient is 0")
    return None


def _tokenise(row: Mapping[str, Any], writer: PromptWriter, how: Preparation) -> _Tokens | _Refusal:
    """Writes both sides of a pair."""
    if _equal_sides(row):
        return _Refusal("equal_sides", "chosen and rejected are the same answer to the same image")
    question = row["question"]
    prompt = writer.prompt(question)
    chosen, rejected = writer.response(question, row["chosen"]), writer.response(question, row["rejected"])
    if prompt is None or chosen is None or rejected is None:
        return _Refusal("image_placeholder_in_text", "question or answer holds the model's image placeholder")
    room = how.max_length - len(prompt)
    if room < _MIN_RESPONSE_TOKENS:
        return _Refusal(
            "prompt_too_long", f"the prompt has {len(prompt)} tokens, align.max_length is {how.max_length}"
        )
    chosen, rejected = chosen[:room], rejected[:room]
    if chosen == rejected and row["image_uri"] == row["rejected_image_uri"]:
        return _Refusal("equal_sides", f"both answers are the same up to align.max_length ({how.max_length})")
    if how.common_token_weight == 1.0 or row["kind"] == VISUAL:
        return _Tokens(prompt, chosen, rejected)
    return _Tokens(prompt, chosen, rejected, *span_weights(chosen, rejected, how.common_token_weight))


def _equal_sides(row: Mapping[str, Any]) -> bool:
    return row["chosen"].strip() == row["rejected"].strip() and row["image_uri"] == row["rejected_image_uri"]


def _hash(*texts: str) -> int:
    digest = hashlib.blake2b("\x1f".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
