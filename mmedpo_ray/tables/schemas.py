"""The tables between stages: pyarrow schemas with the meaning and unit of each field.

Every stage reads one table and writes the next; whoever knows these schemas knows the system.
Images are files addressed by URI, tables carry no image bytes. ``null`` means "does not apply".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from mmedpo_ray.errors import UserError


def _field(name: str, kind: pa.DataType, meaning: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"meaning": meaning})


def _text(name: str, meaning: str, nullable: bool = False) -> pa.Field:
    return _field(name, pa.string(), meaning, nullable)


SAMPLES = pa.schema(
    [
        _text("sample_id", "unique id of the question about the image"),
        _text("image_id", "unique name of the image or study; all its questions share it"),
        _text("dataset", "name of the data set"),
        _text("split", "train (makes pairs), test (evaluation only) or validate (kept, used by neither)"),
        _text("task", "vqa or report"),
        _text("answer_type", "closed (yes/no or a choice), open, or report"),
        _text("image_uri", "image file: absolute path, s3:// or gs://"),
        _text("image_sha256", "SHA-256 of the image file's bytes, hex"),
        _text("question", "question or instruction, without image placeholder"),
        _text("answer", "reference answer"),
        _text("mask_uri", "lesion mask (image of the same size, non-zero = lesion)", nullable=True),
    ]
)

CANDIDATES = pa.schema(
    [
        _text("candidate_id", "<sample_id>#<k>, k-th answer sampled from the target model"),
        _text("sample_id", "row of `samples`"),
        _text("candidate", "generated answer, stripped"),
        _text("generator", "model that answered"),
        _text("prompt_sha256", "SHA-256 of the rendered prompt text, hex"),
        _field("seed", pa.int64(), "sampling seed of this candidate"),
        _field("temperature", pa.float64(), "sampling temperature of this candidate"),
        _field("num_tokens", pa.int32(), "generated tokens"),
    ]
)

CHOICES = pa.schema(
    [
        _text("sample_id", "row of `samples`"),
        _text(
            "candidate_id",
            "plausible candidate most in conflict with the reference; null: none",
            nullable=True,
        ),
        _text("model", "judge that chose"),
        _text("prompt_sha256", "SHA-256 of the prompt, hex"),
        _field("input_tokens", pa.int64(), "tokens of the prompt, as the endpoint counts"),
        _field("output_tokens", pa.int64(), "tokens of the answer, as the endpoint counts"),
    ]
)

REWRITES = pa.schema(
    [
        _text("sample_id", "row of `samples`"),
        _text("rewritten", "the reference answer with one clinical fact changed"),
        _text("changed", "what was changed: finding, negation, side, severity or location"),
        _text("original_span", "the words of the reference that were replaced"),
        _text("new_span", "the words that replaced them"),
        _text("model", "model that wrote it"),
        _text("prompt_sha256", "SHA-256 of the prompt, hex"),
        _field("input_tokens", pa.int64(), "tokens of the prompts, retries included, as the endpoint counts"),
        _field("output_tokens", pa.int64(), "tokens of the answers, retries included"),
    ]
)

PAIRS = pa.schema(
    [
        _text("pair_id", "<sample_id>:<kind>"),
        _text("sample_id", "row of `samples`"),
        _text("image_id", "all pairs of one image form one tree"),
        _text("dataset", "name of the data set"),
        _text("task", "vqa or report"),
        _text("answer_type", "closed, open or report"),
        _text("kind", "text (dispreferred answer) or visual (dispreferred image)"),
        _text("image_uri", "image of the chosen response"),
        _text("rejected_image_uri", "image of the rejected response; = image_uri for text pairs"),
        _text("question", "question or instruction"),
        _text("chosen", "preferred answer"),
        _text("rejected", "dispreferred answer; = chosen for visual pairs"),
        _text(
            "generator",
            "writer of the rejected side: model, rewrite, rule_edit, released, or the visual tool",
        ),
        _text("prompt_sha256", "SHA-256 of the generator's prompt, hex", nullable=True),
        _field("seed", pa.int64(), "seed of the sampling or of the noise", nullable=True),
        _field("source_score", pa.float64(), "relevance score that came with the data, 0..1", nullable=True),
        _text("tool", "visual tool", nullable=True),
        _field("tool_confidence", pa.float64(), "that the tool found the lesion, 0..1", nullable=True),
        _text("heat_map_uri", "8-bit PNG, 255 = 1.0; a model's may be smaller than the image", nullable=True),
        _text(
            "noise",
            "noise parameters as JSON (mode, strength, mask share, changed share, lesion covered), the "
            "tool's choice",
            nullable=True,
        ),
    ]
)

HISTORY = pa.list_(
    pa.struct(
        [
            pa.field("agent", pa.string()),
            pa.field("round", pa.int32()),
            pa.field("score", pa.float64()),
            pa.field("rationale", pa.string()),
        ]
    )
)

SCORED = pa.schema(
    [
        *PAIRS,
        _field("score", pa.float64(), "clinical relevance, 0..1"),
        _field("weight", pa.float64(), "normalised weight in the loss, mean about 1"),
        _field("consensus", pa.bool_(), "the agents agreed (true where no debate was needed)"),
        _field("rounds", pa.int32(), "debate rounds held; 0 = no debate"),
        _field("history", HISTORY, "every judgement in order"),
    ]
)

_TOKENS = pa.list_(pa.int32())
_TOKEN_WEIGHTS = pa.list_(pa.float32())

PREPARED = pa.schema(
    [
        _text("tree_key", "image_id, U+001F, pair_id; the table's order keeps an image's pairs together"),
        _text("pair_id", "row of `scored`; reversed pairs are <visual pair_id>:reversed"),
        _text("image_id", "all pairs of one image form one tree"),
        _text("kind", "text, visual or reversed"),
        _text("image_uri", "image of the chosen response"),
        _text("rejected_image_uri", "image of the rejected response"),
        _field("prompt", _TOKENS, "token ids up to the answer; the image stands as a single image token"),
        _field("image_position", pa.int32(), "tokens of prompt before the image"),
        _field("chosen", _TOKENS, "token ids of the preferred answer with its end, cut at align.max_length"),
        _field("rejected", _TOKENS, "token ids of the dispreferred answer with its end, cut likewise"),
        _field("chosen_weights", _TOKEN_WEIGHTS, "of the chosen tokens, 0..1; null: all 1", nullable=True),
        _field("rejected_weights", _TOKEN_WEIGHTS, "of the rejected tokens, likewise", nullable=True),
        _field("prompt_tokens", pa.int32(), "tokens of the prompt, all image tokens counted"),
        _field("chosen_tokens", pa.int32(), "tokens of chosen"),
        _field("rejected_tokens", pa.int32(), "tokens of rejected"),
        _field("answer_hash", pa.int64(), "of image, question and chosen answer: an answer is learnt once"),
        _field("weight", pa.float64(), "of `scored`, without the coefficient of its kind"),
        _field(
            "ref_chosen_logp",
            pa.float64(),
            "log-probability of chosen under the reference, nats; null: the objective needs none",
            nullable=True,
        ),
        _field("ref_rejected_logp", pa.float64(), "of rejected, likewise", nullable=True),
    ]
)

ANSWERS = pa.schema(
    [
        _text("answer_id", "<model>/<sample_id>"),
        _text("model", "served model name"),
        _text("sample_id", "row of `samples`"),
        _text("image_id", "cluster of the bootstrap"),
        _text("task", "vqa or report"),
        _text("answer_type", "closed, open or report"),
        _text("reference", "reference answer"),
        _text(
            "prediction", "the endpoint's answer; failed requests are in `dropped/`, scored as empty answers"
        ),
        _field("seconds", pa.float64(), "latency of the request"),
    ]
)

# With evaluate.look.
LOOK_ANSWERS = ANSWERS.append(
    _text("shown", "blank, shuffled or lesion_noised; null: the question's own image", nullable=True)
)

# Rows that a stage leaves out travel with these two extra columns and end in `dropped/`.
DROP_REASON = "drop_reason"
DROP_DETAIL = "drop_detail"
DROP_FIELDS = [
    _text(DROP_REASON, "short machine-readable reason; null = the row is kept", nullable=True),
    _text(DROP_DETAIL, "where and what, without patient text", nullable=True),
]


def with_drop_columns(schema: pa.Schema) -> pa.Schema:
    """The schema of a stage's raw output: every field nullable, plus reason and detail."""
    return pa.schema([field.with_nullable(True) for field in schema] + DROP_FIELDS)


def fill(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of a schema from a table, in the schema's types; those that the table lacks are null."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=pa.schema([field.with_nullable(True) for field in schema]))


def to_table(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Builds a table from dictionaries; absent keys become null.

    Raises:
        UserError: a value does not fit its field.
    """
    try:
        return pa.Table.from_pylist(list(rows), schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(
            f"a row does not fit its table: {error}. See mmedpo_ray/tables/schemas.py for the fields."
        ) from error


def check(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """Returns ``table`` with exactly the columns of ``schema`` in order.

    Raises:
        UserError: a column is missing, of another type, or null where a value is required.
    """
    missing = [field.name for field in schema if field.name not in table.column_names]
    if missing:
        raise UserError(f"table {name} lacks column {missing[0]!r} (it has {', '.join(table.column_names)}).")
    table = table.select(schema.names)
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            row = table[field.name].is_null().to_pylist().index(True)
            raise UserError(f"table {name}, row {row}: {field.name} is null but required.")
    try:
        return table.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise UserError(f"table {name} does not fit its schema: {error}.") from error
