"""JSON annotation files of any size, a run of neighbouring rows at a time.

The driver passes over a file once and cuts it into runs; a task then reads the bytes of its run alone, so
neither holds the file. Three layouts: a list of rows, an object of such lists (sections), and JSON Lines.

The rows are found with the standard library's scanner. Streaming parsers such as ijson refuse a whole file
for a NaN, a long integer or a byte-order mark, all of which real annotation files hold, and quote its text in
their messages.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from mmedpo_ray.datasets import parquet_rows
from mmedpo_ray.errors import UserError
from mmedpo_ray.io import storage

Layout = Literal["list", "sections", "lines", "parquet"]

# A line of a JSON Lines file that is no JSON.
BROKEN = object()

_LINES_SUFFIXES = (".jsonl", ".ndjson")
_CHUNK = 1 << 20
_LONGEST_RUN = 4 << 20
_LONGEST_ROW = 64 << 20
_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of one list.

    Attributes:
        section: name of the list in an object of lists, else None.
        position: of the first row in its list, from 0.
        start: first byte of the run in the file; its first row group of Parquet.
        stop: byte, or row group, after it.
        rows: the decoded rows; `BROKEN` for a line that is no JSON.
    """

    section: str | None
    position: int
    start: int
    stop: int
    rows: list[Any]


def layout_of(uri: str, layout: Layout) -> Layout:
    """JSON Lines or Parquet where the name ends so, else the given layout."""
    if uri.lower().endswith(".parquet"):
        return "parquet"
    return "lines" if uri.lower().endswith(_LINES_SUFFIXES) else layout


def scan(uri: str, layout: Layout, rows_per_run: int, id_key: str | None = "id") -> Iterator[Run]:
    """Cuts a file into runs, holding one at a time; rows of Parquet have their id alone.

    Raises:
        UserError: the file is missing, no JSON, of another layout, or (JSON) without a row.
    """
    if layout == "parquet":
        for start, stop, position, rows in parquet_rows.scan(uri, rows_per_run, id_key):
            yield Run(None, position, start, stop, rows)
        return
    empty = True
    with open_stream(uri) as stream:
        runs = (
            _scan_lines(stream, uri, rows_per_run)
            if layout == "lines"
            else _scan_json(_Window(stream, uri), layout, rows_per_run)
        )
        for run in runs:
            empty = False
            yield run
    if empty:
        raise UserError(f"{uri} is an empty list: there is nothing to read.")


def read_run(uri: str, layout: Layout, start: int, stop: int) -> list[Any]:
    """Reads the rows of a run that :func:`scan` found.

    Raises:
        UserError: the file is gone or was changed meanwhile.
    """
    filesystem, path = storage.resolve(uri)
    try:
        with filesystem.open_input_file(path) as file:
            file.seek(start)
            data = file.read(stop - start)
    except OSError as error:
        raise _unreadable(uri, error) from error
    if layout == "lines":
        return [_line(line) for line in data.split(b"\n") if line.strip()]
    try:
        return json.loads(b"[" + data + b"]")
    except (ValueError, RecursionError):
        raise UserError(f"{uri} was changed while it was being read. Start again.") from None


def file_sha256(uri: str) -> str:
    """SHA-256 of a file's bytes, hex, read in pieces.

    Raises:
        UserError: it is missing.
    """
    found = hashlib.sha256()
    with open_stream(uri) as stream:
        while chunk := stream.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def read_json_list(uri: str) -> list[Any]:
    """Reads a whole annotation file; for those that fit in memory.

    Raises:
        UserError: it is missing, no JSON, no list, or empty.
    """
    layout = layout_of(uri, "list")
    return [row for run in scan(uri, layout, rows_per_run=4096) for row in run.rows]


@contextmanager
def open_stream(uri: str) -> Iterator[pa.NativeFile]:
    """Opens an annotation file for reading from its start.

    Raises:
        UserError: it is missing or cannot be read.
    """
    filesystem, path = storage.resolve(uri)
    try:
        stream = filesystem.open_input_stream(path, compression=None)
    except OSError as error:
        raise _unreadable(uri, error) from error
    with stream:
        yield stream


def _unreadable(uri: str, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"no annotation file {uri}. Check data.root, data.train_file and data.test_file.")
    return UserError(
        f"cannot read {uri} ({type(error).__name__}): a file that this machine may read is needed."
    )


# ---------------------------------------------------------------------- lists and objects of lists


class _Window:
    """The stretch of a JSON text that is being decoded; grows at its end, shrinks at its start.

    Attributes:
        text: the stretch.
        start: byte of the file at which it begins.
    """

    def __init__(self, stream: pa.NativeFile, uri: str) -> None:
        self.text = ""
        self.start = 0
        self.uri = uri
        self._stream = stream
        self._line = 1
        self._bytes = codecs.getincrementaldecoder("utf-8")()
        first = stream.read(len(codecs.BOM_UTF8))
        if first == codecs.BOM_UTF8:
            self.start = len(first)
        else:
            self.text = self._decode(first)

    def grow(self) -> bool:
        """Reads on; False at the end of the file.

        Doubles, so that a long row is not decoded over and over.
        """
        data = self._stream.read(max(_CHUNK, len(self.text)))
        self.text += self._decode(data)
        return bool(data)

    def drop(self, count: int) -> None:
        """Forgets the first ``count`` characters."""
        gone = self.text[:count]
        self.start += len(gone.encode())
        self._line += gone.count("\n")
        self.text = self.text[count:]

    def byte(self, at: int) -> int:
        """The byte of the file at a character of the window."""
        return self.start + len(self.text[:at].encode())

    def skip(self, at: int) -> int:
        """The next character that is no space; the length of the text at the end of the file."""
        while True:
            while at < len(self.text) and self.text[at] in _SPACE:
                at += 1
            if at < len(self.text) or not self.grow():
                return at

    def expect(self, at: int, allowed: str) -> str:
        """The character at ``at``, which must be one of ``allowed``."""
        found = self.text[at : at + 1]
        if not found or found not in allowed:
            raise self.malformed(at)
        return found

    def value(self, at: int) -> tuple[Any, int]:
        """Decodes the value at ``at``; returns it and the place of the delimiter behind it."""
        while True:
            try:
                found, end = _DECODER.raw_decode(self.text, at)
            except json.JSONDecodeError as error:
                broken_at = error.pos
            except (ValueError, RecursionError):
                # A number of thousands of digits, or brackets as deep.
                raise self.malformed(at) from None
            else:
                while end < len(self.text) and self.text[end] in _SPACE:
                    end += 1
                if self.text[end : end + 1] in (",", "]", "}", ":"):
                    return found, end
                broken_at = end
            # Cut off by the end of the window ("12" of "123" decodes as well), or really malformed.
            if len(self.text) - at > _LONGEST_ROW or not self.grow():
                raise self.malformed(broken_at)

    def malformed(self, at: int) -> UserError:
        line = self._line + self.text.count("\n", 0, at)
        return UserError(f"{self.uri} is not valid JSON (line {line}). Give a JSON list of rows.")

    def _decode(self, data: bytes) -> str:
        try:
            return self._bytes.decode(data, final=not data)
        except UnicodeDecodeError:
            raise UserError(
                f"{self.uri} is not valid JSON: it is not UTF-8 after line "
                f"{self._line + self.text.count(chr(10))}."
            ) from None


def _scan_json(window: _Window, layout: Layout, rows_per_run: int) -> Iterator[Run]:
    at = window.skip(0)
    first = window.text[at : at + 1]
    if layout == "sections" and first == "{":
        at = yield from _scan_sections(window, at + 1, rows_per_run)
    elif layout == "list" and first == "[":
        at = yield from _scan_list(window, at + 1, None, rows_per_run)
    else:
        raise _wrong_layout(window.uri, layout, first) if first in ("{", "[") else window.malformed(at)
    if window.skip(at) < len(window.text):
        raise window.malformed(window.skip(at))


def _wrong_layout(uri: str, layout: Layout, first: str) -> UserError:
    kind = "a JSON object" if first == "{" else "a JSON list"
    wanted = (
        "an object with the lists train, val and test"
        if layout == "sections"
        else "a list of rows (JSON Lines must be named .jsonl)"
    )
    return UserError(f"{uri} holds {kind}, not {wanted}. Check data.format and the file.")


def _scan_sections(window: _Window, at: int, rows_per_run: int) -> Generator[Run, None, int]:
    """The lists of an object; its other members are no rows and are passed over.

    Returns the place behind it.
    """
    at = window.skip(at)
    if window.text[at : at + 1] == "}":
        return at + 1
    while True:
        section, at = window.value(window.skip(at))
        if not isinstance(section, str):
            raise window.malformed(at)
        window.expect(at, ":")
        at = window.skip(at + 1)
        if window.text[at : at + 1] == "[":
            at = yield from _scan_list(window, at + 1, section, rows_per_run)
            at = window.skip(at)
        else:
            _, at = window.value(at)
        if window.expect(at, ",}") == "}":
            return at + 1
        at += 1


def _scan_list(window: _Window, at: int, section: str | None, rows_per_run: int) -> Generator[Run, None, int]:
    """The rows of a list whose bracket is open; returns the place behind it."""
    at = window.skip(at)
    if window.text[at : at + 1] == "]":
        return at + 1
    position, start = 0, 0
    rows: list[Any] = []
    while True:
        at = window.skip(at)
        if not rows:
            window.drop(at)
            at, start = 0, window.start
        row, at = window.value(at)
        rows.append(row)
        closing = window.expect(at, ",]")
        if closing == "]" or len(rows) >= rows_per_run or at > _LONGEST_RUN:
            yield Run(section, position, start, window.byte(at), rows)
            position, rows = position + len(rows), []
        at += 1
        if closing == "]":
            return at


# ---------------------------------------------------------------------- JSON Lines


def _scan_lines(stream: pa.NativeFile, uri: str, rows_per_run: int) -> Iterator[Run]:
    position, start, stop, rows = 0, 0, 0, []
    for line in _lines(stream, uri):
        if line.strip():
            rows.append(_line(line))
        stop += len(line)
        if len(rows) >= rows_per_run or (rows and stop - start > _LONGEST_RUN):
            yield Run(None, position, start, stop, rows)
            position, start, rows = position + len(rows), stop, []
    if rows:
        yield Run(None, position, start, stop, rows)


def _lines(stream: pa.NativeFile, uri: str) -> Iterator[bytes]:
    """The lines of a file with their line feeds."""
    rest = b""
    while chunk := stream.read(_CHUNK):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line + b"\n" for line in whole)
        if len(rest) > _LONGEST_ROW:
            raise UserError(
                f"{uri} has a line of more than {_LONGEST_ROW >> 20} MiB. Give one JSON object a line."
            )
    if rest:
        yield rest


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return BROKEN
