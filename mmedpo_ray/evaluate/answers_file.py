"""``mmedpo evaluate --answers FILE``: scores answers that exist already, without endpoint, Ray, GPU or settings.

A row is one answer: ``answer_type`` (closed, open or report), ``question``, ``reference``, ``prediction``, and where known ``image_id``, ``model``,
``sample_id`` or ``id``. Other fields are ignored. JSON lines, a JSON list, or Parquet.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmedpo_ray import storage
from mmedpo_ray.errors import UserError
from mmedpo_ray.evaluate import scoring
from mmedpo_ray.evaluate.metrics import METRICS, Answer
from mmedpo_ray.evaluate.scoring import Options, Row

_ANSWER_TYPES = ("closed", "open", "report")
_TEXTS = ("question", "reference", "prediction")
_NAMES = ("model", "image_id", "sample_id", "id")
# Where the file names no model.
_ONLY_MODEL = "answers"


@dataclass(frozen=True)
class Given:
    """A row as the file has it.

    Attributes:
        where: its place, such as "line 3".
        answer_type: closed, open or report.
        question: as asked.
        reference: reference answer.
        prediction: null where there is no answer.
        names: those of model, image_id, sample_id and id that the row has.
        ids: those of id and sample_id that the row has, with the type they have there.
    """

    where: str
    answer_type: str
    question: str
    reference: str
    prediction: str | None
    names: dict[str, str]
    ids: dict[str, Any]


@dataclass(frozen=True)
class Pairing:
    """What makes two models' rows answers to one question.

    Attributes:
        by: in words.
        clustered: whether images are known.
        rows: to be scored, in the file's order.
    """

    by: str
    clustered: bool
    rows: list[Row]


def evaluate_file(uri: str, options: Options) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores the answers of a file.

    Args:
        uri: JSON lines, JSON list (.json) or Parquet (.parquet).
        options: of intervals and tests.

    Returns:
        The summary and a row an answer, in the file's order: ``model``, ``id`` and ``sample_id`` if given, and every metric's value. The summary is
        ``{"models": {name: {metric: {"value", "low", "high", "n"}}}, "counts": {name: …}, "differences": [{"first", "second", "paired",
        "unpaired", "metrics": {metric: {…, "p", "p_holm", "verdict"}}}], …}``.

    Raises:
        UserError: the file is missing, a row cannot be used, or is in a script that cannot be scored; it names file and row.
    """
    given = read(uri)
    for row in given:
        scoring.check_script(f"{uri}, {row.where}{_id_in_words(row)}", row.question, row.reference)
    pairing = pair(given, uri)
    scored = scoring.score(pairing.rows)
    models = list(dict.fromkeys(row.model for row in pairing.rows))
    summary = {
        "answers": uri,
        "models": {name: scoring.estimates(scored, name, options) for name in models},
        "counts": {name: scoring.counts(row for row in pairing.rows if row.model == name) for name in models},
        "differences": [_difference(scored, pairing.rows, first, models[0], options) for first in models[1:]],
        "paired_by": pairing.by if len(models) > 1 else None,
        "clusters": "images" if pairing.clustered else "answers",
        "left_out": scored.left_out,
        "questions": len({row.question_id for row in pairing.rows}),
        "images": len({row.cluster for row in pairing.rows}) if pairing.clustered else None,
        "bootstrap": options.resamples,
        "confidence": options.confidence,
        "seed": options.seed,
    }
    return summary, _rows(given, pairing.rows, scored)


def _difference(
    scored: scoring.Scored, rows: Sequence[Row], first: str, second: str, options: Options
) -> dict[str, Any]:
    questions = [{row.question_id for row in rows if row.model == model} for model in (first, second)]
    return {
        "first": first,
        "second": second,
        "paired": len(questions[0] & questions[1]),
        "unpaired": {first: len(questions[0] - questions[1]), second: len(questions[1] - questions[0])},
        "metrics": scoring.differences(scored, first, second, options),
    }


def _rows(given: Sequence[Given], rows: Sequence[Row], scored: scoring.Scored) -> list[dict[str, Any]]:
    # Metrics that were not computed are null too, so that every file has the same columns.
    columns = dict.fromkeys(METRICS)
    return [
        item.ids | {"model": row.model} | columns | values
        for item, row, values in zip(given, rows, scoring.row_values(scored), strict=True)
    ]


# ---------------------------------------------------------------------- pairing


def pair(given: Sequence[Given], uri: str) -> Pairing:
    """Gives each row the id of its question and its cluster.

    Rows of two models are paired by ``sample_id`` where all have it, else by ``id`` where all have it and models share some, else by
    image, question, reference and answer type. Where such rows occur several times they are paired in order if every model
    has them equally often, and left unpaired otherwise.

    Raises:
        UserError: only some rows have a model or an image, an id occurs twice within a model, or stands for two questions.
    """
    for name in ("model", "image_id"):
        lacking = [row for row in given if name not in row.names]
        if lacking and len(lacking) < len(given):
            raise UserError(
                f"{uri}, {lacking[0].where}: {name} is missing, though other rows have it. Give it in all rows or in none."
            )
    clustered = "image_id" in given[0].names
    by, keys = _keys(given, uri)
    asked: dict[str, tuple[str, str]] = {}
    for row, key in zip(given, keys, strict=True):
        if asked.setdefault(key, (row.answer_type, row.reference)) != (row.answer_type, row.reference):
            raise UserError(
                f"{uri}, {row.where}{_id_in_words(row)}: another model's row with this {by} has another reference or answer_type. "
                f"Give rows about one question one {by}, or leave it out."
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
                        f"{uri}, {row.where}: {name} occurs twice for one model, so its rows cannot be paired. Make it unique, or leave it out."
                    )
                seen.add(key)
        shared = len(set(ids)) < len(ids)
        if not repeated and (not several or shared or name == "sample_id"):
            return name, ids
    texts = [
        json.dumps([row.names.get("image_id"), row.answer_type, row.question, row.reference]) for row in given
    ]
    return "image, question and reference", _numbered(models, texts)


def _numbered(models: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Keys made unique within each model; equal rows meet in order where every model that has them has as many."""
    often = Counter(zip(models, texts, strict=True))
    ambiguous = {text for text in set(texts) if len({often[model, text] for model in set(models)} - {0}) > 1}
    seen: Counter[tuple[str, str]] = Counter()
    keys = []
    for model, text in zip(models, texts, strict=True):
        place = seen[model, text]
        seen[model, text] += 1
        keys.append(json.dumps([text, place, model if text in ambiguous else None]))
    return keys


def _id_in_words(row: Given) -> str:
    name = row.names.get("sample_id") or row.names.get("id")
    return f" (id {name})" if name else ""


# ---------------------------------------------------------------------- reading


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
    texts = {name: _text(row[name]) for name in _TEXTS}
    for name, value in texts.items():
        if value is None and not (name != "reference" and row[name] is None):
            raise refuse(f"{name} must be a text.")
    if not (texts["reference"] or "").strip():
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
        texts["question"] or "",
        texts["reference"] or "",
        texts["prediction"],
        names,
        {name: row[name] for name in ("id", "sample_id") if row.get(name) is not None},
    )


def _text(value: Any) -> str | None:
    """A text, or a number as it is written; JSON's numbers are common as answers and ids."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# ---------------------------------------------------------------------- writing


def write_json(path: str, summary: dict[str, Any]) -> None:
    """Writes the summary; ``-`` is the standard output."""
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        storage.write_bytes(storage.absolute(path), text.encode("utf-8"))


def write_rows(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a line an answer."""
    text = "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    storage.write_bytes(storage.absolute(path), text.encode("utf-8"))


# ---------------------------------------------------------------------- command


def answers_command(uri: str, options: Options, *, json_path: str | None, rows_path: str | None) -> None:
    """Scores a file of answers, prints the table and the verdicts, and writes what is asked for."""
    from rich.text import Text

    from mmedpo_ray.console import console
    from mmedpo_ray.evaluate.summary import score_table
    from mmedpo_ray.report import verdict

    summary, rows = evaluate_file(uri, options)
    if rows_path:
        write_rows(rows_path, rows)
    if json_path:
        write_json(json_path, summary)
    compared = [(item["first"], item["second"], item["metrics"]) for item in summary["differences"]]
    console.print(score_table(summary, list(summary["models"]), compared, summary["clusters"]))
    if summary["clusters"] != "images":
        console.print(
            "There is no image_id: each question counts as an image of its own. If images have several questions, the intervals are too narrow."
        )
    for item in summary["differences"]:
        unpaired = sum(item["unpaired"].values())
        left = f"; {unpaired:,} answers have no partner and take no part in differences" if unpaired else ""
        console.print(
            f"{item['first']} and {item['second']}: {item['paired']:,} questions paired by {summary['paired_by']}{left}.",
            markup=False,
        )
        found = verdict.compare(
            item["metrics"], other=item["second"], other_is="", confidence=options.confidence
        )
        if found is not None:
            console.print(Text(f"{item['first']}: ", "bold") + Text(found.headline))
