"""What every data format shares: units of work, ids, image checks, the split, the kind of answer.

A format turns its source into *units* on the driver (an annotation row, or the number of an image) and a unit into
rows of `samples` inside Ray tasks. Whatever is wrong with a unit becomes a dropped row that names file and position.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmedpo_ray import images, storage
from mmedpo_ray.config import Config
from mmedpo_ray.curate import lexicon
from mmedpo_ray.errors import UserError
from mmedpo_ray.tables import DROP_DETAIL, DROP_REASON

# One unit of work: its id, the split its file stands for (null: decided by the image), the file, the position in
# the file (0-based), and what the format needs to know of it.
UNITS = pa.schema(
    [
        pa.field("unit_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("file", pa.string()),
        pa.field("position", pa.int64()),
        pa.field("payload", pa.string()),
        pa.field("drop_reason", pa.string()),
    ]
)
_REPORT_INSTRUCTION = re.compile(
    r"\b(?:write|generate|provide|give|create|draft|describe|summari[sz]e|compose)\b.*\b(?:report|findings|impression)\b",
    re.IGNORECASE,
)
_YES_NO_QUESTION = re.compile(
    r"^\W*(?:is|are|was|were|does|do|did|has|have|can|could|should|will|would|any)\b", re.I
)
_REPORT_WORDS = 25
_WORDS_OF_A_BARE_CLOSED_ANSWER = 2


class UnusableError(Exception):
    """A unit cannot become a sample.

    Args:
        reason: short machine-readable drop reason.
        detail: what is wrong, without patient text.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ImageFacts:
    """What ingest knows of a decoded image file."""

    uri: str
    sha256: str


class Reader(ABC):
    """One data format. Instances travel to the tasks, so they hold settings only.

    Args:
        config: all settings.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = config.data
        self.dataset = config.data.name or config.data.format

    @abstractmethod
    def units(self) -> pa.Table:
        """All units of work (schema `UNITS`, unique ids), in the order to work on them.

        Raises:
            UserError: the source is missing or not of this format.
        """

    @abstractmethod
    def samples(self, unit: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The `samples` rows of a unit; one that is no use has ``drop_reason``. Runs in a Ray task, never raises on bad data."""

    def fingerprint(self) -> list[str]:
        """What the result depends on besides the settings: hashes of the annotation files."""
        return []

    def sample_id(self, split: str, name: str) -> str:
        return f"{self.dataset}/{split}/{name}"

    def dropped(self, unit: dict[str, Any], name: str, reason: str, detail: str = "") -> dict[str, Any]:
        """A dropped row; the detail names the place in the source."""
        place = f"{unit['file']}, row {unit['position']}"
        return {
            "sample_id": self.sample_id(unit["split"] or "train", name),
            "dataset": self.dataset,
            DROP_REASON: reason,
            DROP_DETAIL: f"{place}: {detail}" if detail else place,
        }


class AnnotationReader(Reader):
    """A format that is a JSON list of rows beside a folder of images."""

    def units(self) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for name, split in self._files():
            rows += number_rows(read_json_list(self._file(name)), name, split)
        return pa.Table.from_pylist(rows, UNITS)

    def fingerprint(self) -> list[str]:
        return [hashlib.sha256(_read(self._file(name))).hexdigest() for name, _ in self._files()]

    def samples(self, unit: dict[str, Any]) -> Iterator[dict[str, Any]]:
        name = unit["unit_id"]
        try:
            if unit["drop_reason"]:
                raise UnusableError(unit["drop_reason"])
            row = json.loads(unit["payload"])
            if not isinstance(row, dict):
                raise UnusableError("not_an_object", f"a {type(row).__name__}")
            turns = self.turns(row)
            image, relative = self._image(row)
        except UnusableError as error:
            yield self.dropped(unit, name, error.reason, error.detail)
            return
        split = unit["split"] or draw_split(self.config.run.seed, image.sha256, self.data.test_share)
        for index, (question, answer) in enumerate(turns):
            turn_name = name if len(turns) == 1 else f"{name}~t{index}"
            problem = text_problem(question, answer)
            if problem:
                yield self.dropped(unit, turn_name, problem, f"turn {index}" if len(turns) > 1 else "")
                continue
            answer_type = infer_answer_type(question, answer)
            yield {
                "sample_id": self.sample_id(split, turn_name),
                "image_id": f"{self.dataset}/{relative}",
                "dataset": self.dataset,
                "split": split,
                "task": "report" if answer_type == "report" else "vqa",
                "answer_type": answer_type,
                "image_uri": image.uri,
                "image_sha256": image.sha256,
                "question": question,
                "answer": answer,
                "mask_uri": None,
            }

    @abstractmethod
    def turns(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        """Question and answer of every turn of an annotation row.

        Raises:
            UnusableError: the row is malformed.
        """

    def _files(self) -> list[tuple[str, str | None]]:
        """The annotation files with the split they stand for."""
        assert self.data.train_file is not None  # the configuration demands it
        if self.data.test_file is not None:
            return [(self.data.train_file, "train"), (self.data.test_file, "test")]
        return [(self.data.train_file, None if self.data.test_share > 0 else "train")]

    def _file(self, name: str) -> str:
        return storage.absolute(name, self.data.root)

    def _image(self, row: dict[str, Any]) -> tuple[ImageFacts, str]:
        relative = row.get("image")
        if not isinstance(relative, str) or not relative.strip():
            raise UnusableError("no_image_name")
        folder = storage.join(storage.absolute(self.data.root or "."), self.data.image_folder or "images")
        relative = storable(relative).strip()
        return check_image(storage.absolute(relative, folder), self.data.max_pixels), relative


def number_rows(source: list[Any], file: str, split: str | None) -> list[dict[str, Any]]:
    """Gives every row of an annotation file a unique id: its own, or its position where it has none.

    An id that occurs again marks the later row as dropped. "~" is ours: it separates what we append.
    """
    seen: set[str] = set()
    rows = []
    for position, row in enumerate(source):
        given = row.get("id") if isinstance(row, dict) else None
        usable = isinstance(given, str | int) and not isinstance(given, bool) and str(given).strip() != ""
        name = storable(str(given)).strip().replace("~", "%7E") if usable else f"~r{position}"
        repeated = name in seen
        seen.add(name)
        rows.append(
            {
                "unit_id": f"{name}~r{position}" if repeated else name,
                "split": split,
                "file": file,
                "position": position,
                "payload": json.dumps(row),
                "drop_reason": "duplicate_id" if repeated else None,
            }
        )
    return rows


def read_json_list(uri: str) -> list[Any]:
    """Reads an annotation file.

    Raises:
        UserError: it is missing, no JSON, no list, or empty.
    """
    try:
        source = json.loads(_read(uri))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{uri} is not valid JSON{where}. Give a JSON list of rows.") from error
    if not isinstance(source, list):
        raise UserError(
            f"{uri} holds a JSON {type(source).__name__}, not a list of rows. Check data.format and the file."
        )
    if not source:
        raise UserError(f"{uri} is an empty list: there is nothing to read.")
    return source


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(
            f"no annotation file {uri}. Check data.root, data.train_file and data.test_file."
        ) from error


def check_image(uri: str, max_pixels: int) -> ImageFacts:
    """Decodes an image once to know that it can be used; the last few are remembered, since rows of one image are neighbours.

    Raises:
        UnusableError: it is missing, broken or too large.
    """
    if uri in _CHECKED:
        known = _CHECKED[uri]
    else:
        known = _check_image(uri, max_pixels)
        if len(_CHECKED) >= _REMEMBERED:
            _CHECKED.pop(next(iter(_CHECKED)))
        _CHECKED[uri] = known
    if isinstance(known, tuple):
        raise UnusableError(*known)
    return known


_REMEMBERED = 64
_CHECKED: dict[str, ImageFacts | tuple[str, str]] = {}


def _check_image(uri: str, max_pixels: int) -> ImageFacts | tuple[str, str]:
    try:
        data = storage.read_bytes(uri)
        images.decode(data, uri, max_pixels)
    except images.ImageError as error:
        return error.reason, error.detail
    except (OSError, ValueError):
        # OSError also where the name is a folder, too long, or not allowed on this file system.
        return "image_missing", uri
    return ImageFacts(uri, hashlib.sha256(data).hexdigest())


def draw_split(seed: int, image_sha256: str, test_share: float) -> str:
    """Train or test by a hash of the seed and the image's content: no image, not even a copy of one, is in both."""
    value = int.from_bytes(hashlib.sha256(f"{seed}:{image_sha256}".encode()).digest()[:8], "big")
    return "test" if value < test_share * 2**64 else "train"


def text_problem(question: str, answer: str) -> str | None:
    """The reason to drop a question with its answer, or None."""
    if not question:
        return "empty_question"
    if not answer:
        return "empty_answer"
    return "leaked_prompt" if lexicon.is_meta_text(answer) else None


def infer_answer_type(question: str, answer: str) -> str:
    """closed, open or report, for formats that do not say.

    Closed is a question answered by yes or no, or by one of the two options that it names; a report is what an
    instruction asks for, or anything long.
    """
    if _REPORT_INSTRUCTION.search(question):
        return "report"
    count = len(lexicon.words(answer))
    if lexicon.polarity(answer) is not None and (
        _YES_NO_QUESTION.match(question) or count <= _WORDS_OF_A_BARE_CLOSED_ANSWER
    ):
        return "closed"
    options = lexicon.choices(question)
    if options is not None:
        content = lexicon.content_words(answer)
        named = [option for option in options if lexicon.content_words(option) <= content]
        if len(named) == 1:
            return "closed"
    return "report" if count > _REPORT_WORDS else "open"


def clean(text: Any) -> str:
    """Text of a conversation turn without image placeholder and surrounding space; empty for anything that is no text."""
    if not isinstance(text, str):
        return ""
    return storable(text).replace("<image>", " ").strip()


def storable(text: str) -> str:
    """The text without lone surrogates, which JSON allows and UTF-8 does not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def conversation(value: Any) -> list[tuple[str, str]]:
    """Pairs the turns of a LLaVA conversation: human, gpt, human, gpt, …

    Raises:
        UnusableError: it is no list of alternating turns.
    """
    if not isinstance(value, list) or not value or len(value) % 2:
        raise UnusableError("malformed_conversation", "no list of question-answer turns")
    turns = []
    for asked, answered in zip(value[::2], value[1::2], strict=True):
        if not isinstance(asked, dict) or not isinstance(answered, dict):
            raise UnusableError("malformed_conversation", "a turn is no object")
        if asked.get("from") not in ("human", "user") or answered.get("from") not in ("gpt", "assistant"):
            raise UnusableError("malformed_conversation", "turns are not human, gpt, human, gpt")
        turns.append((clean(asked.get("value")), clean(answered.get("value"))))
    return turns
