"""Which rows of a file answer the same question, and which form a cluster."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmedpo_ray.errors import UserError
from mmedpo_ray.evaluate.answers_file import Given
from mmedpo_ray.evaluate.scoring import Row
from mmedpo_ray.metrics import Answer

# Where the file names no model.
_ONLY_MODEL = "answers"


@dataclass(frozen=True)
class Pairing:
    """How the rows of two models are paired.

    Attributes:
        by: in words.
        clustered: whether images are known.
        rows: to be scored, in the file's order.
    """

    by: str
    clustered: bool
    rows: list[Row]


def pair(given: Sequence[Given], uri: str) -> Pairing:
    """Gives each row the id of its question and its cluster.

    Rows of two models are paired by ``sample_id`` if all have it, else by ``id`` if all have it and models
    share some, else by image, question, reference and answer type. Equal rows are paired in order if every
    model has them equally often, and left unpaired otherwise.

    Raises:
        UserError: only some rows have a model or an image, an id occurs twice within a model, or stands for
            two questions.
    """
    for name in ("model", "image_id"):
        lacking = [row for row in given if name not in row.names]
        if lacking and len(lacking) < len(given):
            raise UserError(
                f"{uri}, {lacking[0].where}: {name} is missing, though other rows have it. Give it in all "
                "rows or in none."
            )
    clustered = "image_id" in given[0].names
    by, keys = _keys(given, uri)
    asked: dict[str, tuple[str, str]] = {}
    for row, key in zip(given, keys, strict=True):
        if asked.setdefault(key, (row.answer_type, row.reference)) != (row.answer_type, row.reference):
            raise UserError(
                f"{uri}, {row.where}{row.id_in_words}: another model's row with this {by} has another "
                f"reference or answer_type. Give rows about one question one {by}, or leave it out."
            )
    rows = [
        Row(
            row.names.get("model", _ONLY_MODEL),
            key,
            row.names["image_id"] if clustered else key,
            row.answer_type,
            Answer(row.reference, row.prediction or "", row.question),
            failed=row.prediction is None,
        )
        for row, key in zip(given, keys, strict=True)
    ]
    return Pairing(by, clustered, rows)


def _keys(given: Sequence[Given], uri: str) -> tuple[str, list[str]]:
    models = [row.names.get("model", _ONLY_MODEL) for row in given]
    several = len(set(models)) > 1
    for name in ("sample_id", "id"):
        if not all(name in row.names for row in given):
            continue
        ids = [row.names[name] for row in given]
        repeated = len(set(zip(models, ids, strict=True))) < len(ids)
        if repeated and several:
            seen: set[tuple[str, str]] = set()
            for row, key in zip(given, zip(models, ids, strict=True), strict=True):
                if key in seen:
                    raise UserError(
                        f"{uri}, {row.where}: {name} occurs twice for one model, so its rows cannot be "
                        "paired. Make it unique, or leave it out."
                    )
                seen.add(key)
        shared = len(set(ids)) < len(ids)
        if not repeated and (not several or shared or name == "sample_id"):
            return name, ids
    identities = [
        json.dumps([row.names.get("image_id"), row.answer_type, row.question, row.reference]) for row in given
    ]
    return "image, question and reference", _numbered(models, identities)


def _numbered(models: Sequence[str], identities: Sequence[str]) -> list[str]:
    """Makes keys unique within each model; pairs equal rows in order if all models have as many of them."""
    often = Counter(zip(models, identities, strict=True))
    ambiguous = {
        text for text in set(identities) if len({often[model, text] for model in set(models)} - {0}) > 1
    }
    seen: Counter[tuple[str, str]] = Counter()
    keys = []
    for model, text in zip(models, identities, strict=True):
        place = seen[model, text]
        seen[model, text] += 1
        keys.append(json.dumps([text, place, model if text in ambiguous else None]))
    return keys
