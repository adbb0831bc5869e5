"""A file of answers that exist already, read and checked.

A row is one answer: ``answer_type`` (closed, open or report), ``question``, ``reference``, ``prediction``,
and where known ``image_id``, ``model``, ``sample_id`` or ``id``. Other fields are ignored. JSON lines, a JSON
list, or Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage

_ANSWER_TYPES = ("closed", "open", "report")
_TEXTS = ("question", "reference", "prediction")
_NAMES = ("model", "image_id", "sample_id", "id")


@dataclass(frozen=True)
class Given:
    """A row as the file has it.

    Attributes:
        where: its place, such as "line 3".
        answer_type: closed, open or report.
        question: as asked.
        reference: reference answer.
        prediction: None if there is no answer.
        names: model, image_id, sample_id and id, as far as the row has them.
        ids: id and sample_id, as far as the row has them, with their types.
    """

    where: str
    answer_type: str
    question: str
    reference: str
    prediction: str | None
    names: dict[str, str]
    ids: dict[str, Any]

    @property
    def id_in_words(self) -> str:
        """The row's id for messages, if it has one."""
        name = self.names.get("sample_id") or self.names.get("id")
        return f" (id {name})" if name else ""


def read(uri: str) -> list[Given]:
    """The rows of a file, checked.

    Raises:
        UserError: the file is missing, empty or of another form, or a row cannot be used.
    """
    rows = [_given(uri, where, row) for where, row in _raw_rows(uri)]
    if not rows:
        raise UserError(
            f"{uri} has no answers. Each line is a JSON object with {', '.join(('answer_type', *_TEXTS))}."
        )
    return rows


def _raw_rows(uri: str) -> Iterator[tuple[str, Any]]:
    if uri.endswith(".parquet"):
        yield from _parquet_rows(uri)
        return
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {uri}. Give a file of answers to --answers.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{uri} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(f"{uri} is no JSON list: {_place(error)}.") from None
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    # Only line feeds end a line: an answer may hold other characters that Python splits at.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{uri}, line {number} is no JSON object ({_place(error)}). Each line holds one answer."
                ) from None


def _parquet_rows(uri: str) -> Iterator[tuple[str, Any]]:
    try:
        table = storage.read_parquet(uri)
    except FileNotFoundError:
        raise UserError(f"there is no file {uri}. Give a file of answers to --answers.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{uri} is no readable Parquet file ({type(error).__name__}).") from None
    yield from ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1))


def _place(error: ValueError) -> str:
    """Where JSON breaks, without the text."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, line {error.lineno} column {error.colno}"
    return type(error).__name__


def _given(uri: str, where: str, row: Any) -> Given:
    def refuse(what: str) -> UserError:
        return UserError(f"{uri}, {where}: {what}")

    if not isinstance(row, dict):
        raise refuse("a JSON object is expected.")
    missing = [name for name in ("answer_type", *_TEXTS) if name not in row]
    if missing:
        raise refuse(f"the field {missing[0]} is missing.")
    kind = row["answer_type"]
    if not isinstance(kind, str) or kind.strip().lower() not in _ANSWER_TYPES:
        raise refuse(f"answer_type must be one of {', '.join(_ANSWER_TYPES)}.")
    strings = {name: _text(row[name]) for name in _TEXTS}
    for name, value in strings.items():
        if value is None and not (name != "reference" and row[name] is None):
            raise refuse(f"{name} must be a text.")
    if not (strings["reference"] or "").strip():
        raise refuse("reference is empty, so no answer can be compared with it.")
    names = {}
    for name in _NAMES:
        value = _text(row.get(name))
        if value is None and row.get(name) is not None:
            raise refuse(f"{name} must be a text or a whole number.")
        if value:
            names[name] = value
    return Given(
        where,
        kind.strip().lower(),
        strings["question"] or "",
        strings["reference"] or "",
        strings["prediction"],
        names,
        {name: row[name] for name in ("id", "sample_id") if row.get(name) is not None},
    )


def _text(value: Any) -> str | None:
    """A string, or a number as it is written: numbers are common as answers and ids; else None."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
