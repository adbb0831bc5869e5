"""Formats that are JSON rows beside a folder of images: a format says where things are, the rest is here.

A file may also be JSON Lines (named .jsonl or .ndjson) wherever a JSON list is expected.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mmedpo_ray.datasets import json_rows, parquet_rows
from mmedpo_ray.datasets.cleaning import clean
from mmedpo_ray.datasets.embedded_images import LONGEST_NAME, bytes_or_name, only_element
from mmedpo_ray.datasets.row_names import given_name
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest.image_checker import ImageChecker, ImageFacts
from mmedpo_ray.ingest.reader import ROWS_PER_UNIT, Reader, Unit
from mmedpo_ray.io import storage
from mmedpo_ray.io.text import storable
from mmedpo_ray.tables.id_set import IdSet

# Member of a row that names its lesion mask, in every format.
MASK_KEY = "mask"
# Letters of a name between two slashes, on every file system in use.
_LONGEST_PART = 255


@dataclass(frozen=True)
class Turn:
    """A question with its answer; ``answer_type`` where the data set states it."""

    question: str
    answer: str
    answer_type: str | None = None


class AnnotationReader(Reader):
    """A format of annotated rows; the class attributes say how its publishers lay it out.

    Attributes:
        layout: of its annotation file.
        id_key: member of a row that holds its id; None: rows have none.
        image_key: member that holds the image's name.
        image_folders: where the images are, the first that exists.
        train_name: default annotation file.
        test_name: default file of the test part, where it is there.
        validate_name: file of the validation part, where it is there.
        sections: split of each list, where one file holds several; others have their own name.
        columns: columns that are read of a Parquet file; None: all.
    """

    layout: json_rows.Layout = "list"
    id_key: str | None = "id"
    image_key = "image"
    image_folders: tuple[str, ...] = ("images",)
    train_name: str | None = None
    test_name: str | None = None
    validate_name: str | None = None
    sections: ClassVar[Mapping[str, str]] = {}
    columns: list[str] | None = None

    # ------------------------------------------------------------------ what a format may say

    @abstractmethod
    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The questions and answers of an annotation row.

        Raises:
            UnusableError: the row is malformed or not wanted.
        """

    def files(self) -> list[tuple[str, str | None]]:
        """The annotation files under the root with the split they stand for; None: drawn image by image."""
        train = self.data.train_file or self.train_name
        assert train is not None  # the configuration demands it where the format has no name of its own
        test = self.data.test_file or self._present(self.test_name)
        held_out = self.data.test_share > 0 and test is None
        found: list[tuple[str, str | None]] = [(train, None if held_out else "train")]
        found += [(test, "test")] if test else []
        validate = self._present(self.validate_name)
        return found + ([(validate, "validate")] if validate else [])

    def split_of(self, row: dict[str, Any], split: str | None) -> str | None:  # noqa: ARG002 - a default
        """The split of a row in a file or section of the given split.

        Raises:
            UnusableError: it belongs to none.
        """
        return split

    def position_name(self, file: str, position: int) -> str:  # noqa: ARG002 - a default
        """What a row without an id is called."""
        return f"~r{position}"

    def image(self, row: dict[str, Any], folder: str, checker: ImageChecker) -> ImageFacts:
        """The image of a row.

        Raises:
            UnusableError: there is none that can be used.
        """
        mask = self.mask(row.get(MASK_KEY), folder, checker)
        return replace(self.found_image(self.image_value(row), folder, checker), mask_uri=mask)

    def image_value(self, row: dict[str, Any]) -> Any:
        """What names or holds the image of a row.

        Raises:
            UnusableError: the row is malformed.
        """
        return row.get(self.image_key)

    def found_image(self, value: Any, folder: str, checker: ImageChecker) -> ImageFacts:
        """The image that a row names, or holds as bytes or base64.

        Raises:
            UnusableError: there is none that can be used.
        """
        value = bytes_or_name(value)
        if isinstance(value, bytes):
            uri, sha256 = checker.write(value)
            return ImageFacts(uri, sha256, sha256)
        relative = image_name(value)
        uri = self.image_address(relative, folder, checker)
        return ImageFacts(uri, checker.sha256(uri), relative)

    # ------------------------------------------------------------------ what all share

    def units(self) -> Iterator[Unit]:
        is_empty = True
        seen: dict[str | None, IdSet] = {}
        for file, file_split in self.files():
            for run in json_rows.scan(self.file(file), self._layout(file), ROWS_PER_UNIT, self.id_key):
                is_empty = False
                split = file_split if run.section is None else self._split_of_section(run.section)
                names = [self._name(file, row, place) for place, row in enumerate(run.rows, run.position)]
                repeated = seen.setdefault(split, IdSet()).add(names)
                positions = [run.position + index for index, again in enumerate(repeated) if again]
                section = None if run.section is None else storable(run.section)
                yield Unit(file, section, split, run.start, run.stop, run.position, len(run.rows), positions)
        if is_empty:
            raise UserError(
                f"the annotation files under {self.data.root} have no row: there is nothing to read."
            )

    def fingerprint(self) -> list[str]:
        files = [self.file(name) for name, _ in self.files()]
        return [
            parquet_rows.footer_sha256(file)
            if self._layout(file) == "parquet"
            else json_rows.file_sha256(file)
            for file in files
        ]

    def rows(self, unit: Unit) -> Iterator[tuple[int, str, Any]]:
        """Position, unique name and content of every row of a unit."""
        uri, layout = self.file(unit.file), self._layout(unit.file)
        rows: Iterable[Any]
        if layout == "parquet":
            rows = parquet_rows.read(uri, unit.start, unit.stop, unit.position, unit.rows, self.columns)
        else:
            rows = json_rows.read_run(uri, layout, unit.start, unit.stop)
        for position, row in enumerate(rows, unit.position):
            name = self._name(unit.file, row, position)
            yield position, f"{name}~r{position}" if position in unit.again else name, row

    def samples(self, unit: Unit, done: Container[str] = ()) -> Iterator[dict[str, Any]]:
        checker, folder = ImageChecker(self.data, self.raw_folder()), self._image_folder()
        for position, name, row in self.rows(unit):
            place, split = unit.place(position), unit.split
            try:
                if position in unit.again:
                    raise _repeated_id(self, self._name(unit.file, row, position), split)
                row = checked_row(row, unit)
                split = self.split_of(row, unit.split)
                turns = self.turns(row)
                names = [name] if len(turns) == 1 else [f"{name}~t{index}" for index in range(len(turns))]
                if self.is_done(names, split, done) or self.is_done([name], split, done):
                    continue
                image = self.image(row, folder, checker)
                shown = [list(self.by_frame(each, image, checker)) for each in names]
            except UnusableError as error:
                yield self.dropped(name, split, place, error)
                continue
            split = self.split_by_image(split, image)
            for index, (frames, turn) in enumerate(zip(shown, turns, strict=True)):
                for turn_name, frame in frames:
                    try:
                        yield self.sample(name=turn_name, split=split, image=frame, **vars(turn))
                    except UnusableError as error:
                        error.detail = f"turn {index}" if len(turns) > 1 else error.detail
                        yield self.dropped(turn_name, split, place, error)

    def _name(self, file: str, row: Any, position: int) -> str:
        given = given_name(row.get(self.id_key)) if isinstance(row, dict) else None
        return self.position_name(file, position) if given is None else given

    def _split_of_section(self, section: str) -> str:
        return self.sections.get(section, storable(section) or "unnamed")

    def _layout(self, file: str) -> json_rows.Layout:
        return json_rows.layout_of(file, self.layout)

    def _present(self, name: str | None) -> str | None:
        return name if name is not None and storage.exists(self.file(name)) else None

    def _image_folder(self) -> str:
        """Where the images are; the format's first place if none of them exists, for the messages."""
        if self.data.image_folder is not None:
            return self.file(self.data.image_folder)
        found = (name for name in self.image_folders[:-1] if self._present(name))
        return self.file(next(found, self.image_folders[-1]))


def _repeated_id(reader: Reader, name: str, split: str | None) -> UnusableError:
    """The reason to drop a row whose id an earlier row has; None if it is the first.

    The earlier row keeps the id even if its image turns out to be unusable.

    Ids are known before any image is looked at, and an image that is repaired later must not take a kept
    sample's place.

    Args:
        reader: the format.
        name: the id as part of a sample id.
        split: of both rows; None: drawn by the image, which for the earlier row may have fallen out either
            way.
    """
    found = (reader.sample_id(each, name) for each in ((split,) if split else ("train", "test")))
    return UnusableError("duplicate_id", f"its id is that of an earlier row, {' or '.join(found)}")


def checked_row(row: Any, unit: Unit) -> dict[str, Any]:
    """The row, if it is an object.

    Raises:
        UnusableError: it is not.
    """
    if row is json_rows.BROKEN:
        raise UnusableError("invalid_json")
    if row is parquet_rows.DAMAGED:
        raise UnusableError("unreadable_row_group", f"row groups {unit.start} to {unit.stop - 1}")
    if not isinstance(row, dict):
        raise UnusableError("not_an_object", f"a {type(row).__name__}")
    return row


def image_name(value: Any) -> str:
    """The file name of an image; of a list of one that of its element.

    Raises:
        UnusableError: there is none, or several.
    """
    value = only_element(value)
    value = value.get("path") if isinstance(value, dict) else value
    if not isinstance(value, str) or not value.strip():
        raise UnusableError("no_image_name")
    name = storable(value).strip()
    if len(name) > LONGEST_NAME or max(map(len, re.split(r"[/\\]", name))) > _LONGEST_PART:
        raise UnusableError("no_image_name", f"{len(name)} characters, more than a file's name has")
    return name


def talk(row: dict[str, Any]) -> Any:
    """The conversation of a LLaVA row; LLaVA-Med's instruction files misspell its key."""
    return row.get("conversations", row.get("conversatons"))


def conversation(value: Any) -> list[Turn]:
    """Pairs the turns of a LLaVA conversation (human, gpt, human, gpt, …) without a system prompt.

    Raises:
        UnusableError: it is no list of alternating turns.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict) and value[0].get("from") == "system":
        value = value[1:]
    if not isinstance(value, list) or not value or len(value) % 2:
        raise UnusableError("malformed_conversation", "no list of question-answer turns")
    turns = []
    for asked, answered in zip(value[::2], value[1::2], strict=True):
        if not isinstance(asked, dict) or not isinstance(answered, dict):
            raise UnusableError("malformed_conversation", "a turn is no object")
        if asked.get("from") not in ("human", "user") or answered.get("from") not in ("gpt", "assistant"):
            raise UnusableError("malformed_conversation", "turns are not human, gpt, human, gpt")
        turns.append(Turn(clean(asked.get("value")), clean(answered.get("value"))))
    return turns
