"""Hugging Face style Parquet: `train-*.parquet`, `test-*.parquet`, `validation-*.parquet`, with the image in a column.

The files lie under the root or in `data/`; file names give the split, ``data.columns`` names the columns. An image is
struct<bytes, path>, bytes, or the path of a file, and so is a lesion mask. Their bytes are written once per distinct image
under the run's `raw/` by the task that reads them, so that the tables carry addresses as with every other format.

A row group may be of any size: its rows are taken a few at a time. Parquet cannot be entered in the midst of a row group, so
where a large one is shared among n tasks, each reads over the rows before its own, and together they read the group
(n + 1) / 2 times: at most 4.5 times, which is little beside decoding all its images on one CPU.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from mmedpo_ray.datasets.embedded_images import EmbeddedImages, bytes_or_name
from mmedpo_ray.datasets.texts import clean, stated_answer_type
from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest.annotations import image_name, repeated_id
from mmedpo_ray.ingest.reader import (
    ROWS_PER_UNIT,
    ImageChecker,
    ImageFacts,
    Reader,
    Unit,
    UnusableError,
    given_name,
)
from mmedpo_ray.io import storage
from mmedpo_ray.tables.id_set import IdSet

_FOLDERS = ("", "data")
# The words by which the Hub's `datasets` tells the splits of files, and one more of ours: validate.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev"), "validate"),
}
_TAIL = 8
# Rows decoded at a time: their images are in memory together.
_ROWS_AT_A_TIME = 16
# A row group is shared among up to so many tasks, if each gets as many rows at least.
_MOST_SHARES = 8
_ROWS_OF_A_SHARE = 4_096
# What reading damaged files raises.
_DAMAGED = (pa.ArrowException, OSError)
# Bytes read at once where only that they can be read counts.
_PIECE = 1 << 20
# What values raise that are no values in Python: texts that are no UTF-8, dates far away.
_NO_VALUE = (ValueError, OverflowError)


class HfParquetReader(Reader):
    """Reads Parquet files; a unit is a few row groups, one, or a share of a very large one."""

    def units(self) -> Iterator[Unit]:
        seen: dict[str | None, IdSet] = {}
        empty = True
        for name, split in self._files():
            with self._open(name) as file:
                self._check_columns(name, file.schema_arrow)
                for start, stop, first, total in _row_groups(file.metadata):
                    empty = False
                    ids = self._ids(name, file, start, stop, first, total)
                    for position, rows in _shares(first, total):
                        named = list(islice(ids, rows))
                        repeated = seen.setdefault(split, IdSet()).add(named) if named else []
                        positions = [position + index for index, again in enumerate(repeated) if again]
                        yield Unit(name, None, split, start, stop, position, rows, positions)
        if empty:
            raise UserError(
                f"the Parquet files under {self.data.root} have no row: there is nothing to read."
            )

    def fingerprint(self) -> list[str]:
        # The footer holds place, size and extremes of every column chunk, so it changes with the content.
        return [f"{name} {_footer_sha256(self.file(name))}" for name, _ in self._files()]

    def samples(self, unit: Unit, done: Container[str] = ()) -> Iterator[dict[str, Any]]:
        images_of_unit = _UnitImages(self)
        for position, row in self._rows(unit):
            place, split = unit.place(position), unit.split
            name = self._name(unit.file, row, position)
            try:
                if position in unit.again:
                    name, given = f"{name}~r{position}", name
                    raise repeated_id(self, given, split)
                if row is None:
                    raise UnusableError("unreadable_row_group", f"row groups {unit.start} to {unit.stop - 1}")
                if self.is_done([name], split, done):
                    continue
                image = images_of_unit.facts(row, place)
                split = self.split_by_image(split, image)
                for frame_name, frame in self.by_frame(name, image, images_of_unit.checker):
                    yield self.sample(name=frame_name, split=split, image=frame, **self._texts(row))
            except UnusableError as error:
                yield self.dropped(name, split, place, error)

    # ------------------------------------------------------------------ files

    def _files(self) -> list[tuple[str, str | None]]:
        """The Parquet files under the root with the split they stand for; None: drawn image by image."""
        if self.data.train_file is not None:
            held_out = self.data.test_share > 0 and self.data.test_file is None
            found: list[tuple[str, str | None]] = [(self.data.train_file, None if held_out else "train")]
            return found + ([(self.data.test_file, "test")] if self.data.test_file else [])
        names = next(filter(None, map(self._names, _FOLDERS)), [])
        if not names:
            raise UserError(
                f"no Parquet file in {self.data.root} or its folder data/. Check data.root, or name the file in "
                "data.train_file."
            )
        stated = {name: _split_of_name(name) for name in names}
        held_out = self.data.test_share > 0 and "test" not in stated.values()
        rest = None if held_out else "train"
        return [(name, rest if split in (None, "train") else split) for name, split in stated.items()]

    def _names(self, folder: str) -> list[str]:
        found = storage.list_files(self.file(folder) if folder else storage.absolute(self.data.root or "."))
        names = [PurePosixPath(uri).name for uri in found if uri.endswith(".parquet")]
        if "://" in (self.data.root or ""):
            # As a file is called, not as its address spells it: `file` makes an address of the name.
            names = [unquote(name) for name in names]
        return [f"{folder}/{name}" if folder else name for name in names]

    @contextmanager
    def _open(self, name: str) -> Iterator[pq.ParquetFile]:
        with open_file(self.file(name)) as file:
            try:
                # Without reading ahead, a row group of gigabytes is taken page by page.
                parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"{self.file(name)} is no Parquet file ({type(error).__name__}). Check data.root and the file."
                ) from error
            yield parquet

    def _check_columns(self, name: str, schema: pa.Schema) -> None:
        columns = self.data.columns
        for key in type(columns).model_fields:
            wanted = getattr(columns, key)
            if wanted is not None and wanted not in schema.names:
                raise UserError(
                    f"{self.file(name)} has no column {wanted!r} (data.columns.{key}); it has {', '.join(schema.names)}."
                )

    # ------------------------------------------------------------------ rows

    def _rows(self, unit: Unit) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Position and content of every row; None from where the file is damaged."""
        wanted = sorted({value for value in self.data.columns.model_dump().values() if value is not None})
        position, end = unit.position, unit.position + unit.rows
        with self._open(unit.file) as file:
            # A share of a large row group begins somewhere in it.
            left_out = position - _rows_before(file.metadata, unit.start)
            try:
                for batch in self._batches(file, unit.start, unit.stop, wanted):
                    start = min(left_out, batch.num_rows)
                    left_out -= start
                    for row in _python_rows(batch.slice(start, end - position)):
                        yield position, row
                        position += 1
                    if position == end:
                        return
            except _DAMAGED:
                self._check_bytes(unit.file, file.metadata, unit.start, unit.stop)
                yield from ((damaged, None) for damaged in range(position, end))

    def _ids(
        self, name: str, file: pq.ParquetFile, start: int, stop: int, position: int, rows: int
    ) -> Iterator[str]:
        """Names of the rows of some row groups, from the id column alone; none where there is no such column."""
        column, end = self.data.columns.sample_id, position + rows
        if column is None:
            return
        try:
            # In the batches of the rows, so that damage begins at the same row.
            for batch in self._batches(file, start, stop, [column]):
                for row in _python_rows(batch):
                    yield self._name(name, row, position)
                    position += 1
        except _DAMAGED:
            self._check_bytes(name, file.metadata, start, stop)
            yield from (self._name(name, None, damaged) for damaged in range(position, end))

    def _check_bytes(self, name: str, metadata: pq.FileMetaData, start: int, stop: int) -> None:
        """Tells damage from storage that fails, which Parquet's reader reports alike: damaged bytes can be read.

        Raises:
            UserError: the bytes of these row groups cannot be read.
        """
        uri, chunks = self.file(name), _chunks(metadata, start, stop)
        try:
            with open_file(uri) as file:
                for place, size in chunks:
                    file.seek(place)
                    for done in range(0, size, _PIECE):
                        file.read(min(_PIECE, size - done))
        except OSError as error:
            raise UserError(
                f"{uri} could not be read to its end ({type(error).__name__}): storage failed. Run again, which goes on "
                "from here."
            ) from error

    def _batches(
        self, file: pq.ParquetFile, start: int, stop: int, columns: list[str]
    ) -> Iterator[pa.RecordBatch]:
        yield from file.iter_batches(_ROWS_AT_A_TIME, row_groups=list(range(start, stop)), columns=columns)

    def _name(self, file: str, row: dict[str, Any] | None, position: int) -> str:
        column = self.data.columns.sample_id
        given = given_name(row[column]) if column is not None and row is not None else None
        return f"~{PurePosixPath(file).stem}/{position}" if given is None else given

    def _texts(self, row: dict[str, Any]) -> dict[str, Any]:
        columns = self.data.columns
        answer_type = row[columns.answer_type] if columns.answer_type is not None else None
        return {
            "question": clean(row[columns.question]),
            "answer": clean(row[columns.answer]),
            "answer_type": stated_answer_type(answer_type),
        }


class _UnitImages:
    """The images of a unit's rows, each distinct one decoded and written once.

    Args:
        reader: whose settings apply.
    """

    def __init__(self, reader: HfParquetReader) -> None:
        self._columns = reader.data.columns
        self._reader = reader
        self._folder = reader.file(reader.data.image_folder or "")
        self._embedded = EmbeddedImages(reader.config, reader.dataset)
        self.checker = ImageChecker(reader.data)

    def facts(self, row: dict[str, Any], place: str) -> ImageFacts:
        """The image of a row as a file.

        Raises:
            UnusableError: it is missing, broken or too large.
        """
        value = bytes_or_name(row[self._columns.image])
        if isinstance(value, bytes):
            uri, sha256 = self._embedded.write(value, place)
        else:
            uri = self._reader.image_address(image_name(value), self._folder, self.checker)
            sha256 = self.checker.sha256(uri)
        named = row[self._columns.image_id] if self._columns.image_id is not None else None
        return ImageFacts(uri, sha256, given_name(named) or sha256, self._mask(row))

    def _mask(self, row: dict[str, Any]) -> str | None:
        """The lesion mask of a row as a file; it is judged where it is used, as one that only has a path is.

        Raises:
            UnusableError: the store does not say whether there is such a file.
        """
        value = bytes_or_name(row[self._columns.mask]) if self._columns.mask is not None else None
        if isinstance(value, bytes):
            return self._embedded.write_mask(value)
        return self._reader.mask(value, self._folder, self.checker)


@contextmanager
def open_file(uri: str) -> Iterator[pa.NativeFile]:
    """Opens a file for reading at any place.

    Raises:
        UserError: it is missing or cannot be read.
    """
    filesystem, path = storage.resolve(uri)
    try:
        file = filesystem.open_input_file(path)
    except OSError as error:
        raise UserError(
            f"cannot read {uri} ({type(error).__name__}). Check data.root, data.train_file and data.test_file."
        ) from error
    with file:
        yield file


def _row_groups(metadata: pq.FileMetaData) -> Iterator[tuple[int, int, int, int]]:
    """Neighbouring row groups of about a unit's rows: first, past the last, position of the first row, rows."""
    start = position = rows = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= ROWS_PER_UNIT or group == metadata.num_row_groups - 1:
            if rows:
                yield start, group + 1, position, rows
            start, position, rows = group + 1, position + rows, 0


def _python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch; None in the place of a value that Python cannot hold."""
    try:
        return batch.to_pylist()
    except _NO_VALUE:
        columns = [[_python_value(value) for value in column] for column in batch.columns]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _python_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except _NO_VALUE:
        return None


def _shares(position: int, rows: int) -> Iterator[tuple[int, int]]:
    """First row and rows of each unit that some row groups make: one, or several of a large group."""
    count = min(_MOST_SHARES, rows // _ROWS_OF_A_SHARE) or 1
    limits = [position + rows * number // count for number in range(count + 1)]
    yield from ((start, stop - start) for start, stop in pairwise(limits))


def _rows_before(metadata: pq.FileMetaData, group: int) -> int:
    return sum(metadata.row_group(number).num_rows for number in range(group))


def _chunks(metadata: pq.FileMetaData, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """First byte and bytes of every column of some row groups."""
    for group in range(start, stop):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            first = column.dictionary_page_offset or column.data_page_offset
            yield max(0, first), max(0, column.total_compressed_size)


def _footer_sha256(uri: str) -> str:
    with open_file(uri) as file:
        size = file.size()
        file.seek(max(0, size - _TAIL))
        tail = file.read()
        length = int.from_bytes(tail[:4], "little")
        if not tail.endswith(b"PAR1") or length + _TAIL > size:
            raise UserError(f"{uri} is no Parquet file. Check data.root and the file.")
        file.seek(size - _TAIL - length)
        return f"{size} {hashlib.sha256(file.read()).hexdigest()}"


def _split_of_name(name: str) -> str | None:
    """The split that a file name states ("train-00000-of-00003.parquet"), else None."""
    words = re.split(r"[^a-z]+", PurePosixPath(name).stem.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)
