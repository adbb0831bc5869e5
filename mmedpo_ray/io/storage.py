"""Files by URI (local path, ``s3://``, ``gs://``) through :mod:`pyarrow.fs`.

A local path may be relative or absolute; every function takes either form of address and every
write appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import posixpath
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pyarrow import fs

from mmedpo_ray.errors import UserError

# Ends the name of a file that is not whole yet.
_TEMPORARY = ".tmp"


def resolve(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """Returns the file system of ``uri`` and the path inside it.

    Raises:
        UserError: the scheme is unknown or its credentials do not work.
    """
    text = str(uri)
    if "://" not in text:
        return fs.LocalFileSystem(), absolute(text)
    try:
        return fs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise UserError(
            f"cannot open {text}: {error}. Give a local path, s3:// or gs:// and check the credentials of "
            "this machine."
        ) from error


def join(uri: str | Path, *parts: str) -> str:
    """Joins path parts to a local path or URI."""
    return posixpath.join(str(uri), *parts)


def absolute(uri: str | Path, base: str | Path | None = None) -> str:
    """Makes a local path absolute; URIs stay as they are.

    Args:
        uri: what a user typed, where ``~`` is a home folder; with ``base`` a name out of the data, where it
            is a character.
        base: folder of a relative name; without it the working directory.
    """
    text = str(uri)
    if "://" in text:
        return text
    if base is None:
        return str(Path(home_expanded(text)).absolute())
    return str(Path(text).absolute()) if posixpath.isabs(text) else join(absolute(base), text)


def home_expanded(path: str | Path) -> str:
    """The path with a leading ``~`` or ``~user`` expanded; unchanged if there is no such user."""
    return os.path.expanduser(path)  # noqa: PTH111 - pathlib's raises where there is no such user


def exists(uri: str | Path) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(uri)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def list_files(uri: str | Path, suffix: str = "") -> list[str]:
    """File addresses directly under a folder, sorted; empty where the folder is absent."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    names = sorted(info.base_name for info in infos if info.is_file and info.base_name.endswith(suffix))
    if "://" in str(uri):
        # An address is percent-encoded, a path is not.
        names = [quote(name) for name in names]
    return [join(uri, name) for name in names]


class FileTooLargeError(Exception):
    """A file is larger than its reader allows; ``size`` is in bytes."""

    def __init__(self, uri: str | Path, size: int, max_bytes: int) -> None:
        super().__init__(f"{uri}: {size:,} bytes, limit {max_bytes:,}")
        self.size = size


def read_bytes(uri: str | Path, max_bytes: int | None = None) -> bytes:
    """Reads a whole file as it is: one that is named like a compressed one is not inflated.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        FileTooLargeError: it has more than ``max_bytes``; nothing of it was read.
    """
    filesystem, path = resolve(uri)
    with _naming(uri):
        if filesystem.type_name == "local" and Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder", path)
        with filesystem.open_input_file(path) as file:
            if max_bytes is not None and (size := file.size()) > max_bytes:
                raise FileTooLargeError(uri, size, max_bytes)
            return file.read()


def write_bytes(uri: str | Path, data: bytes | pa.Buffer) -> None:
    """Writes a whole file: it appears when all of it is there, whatever becomes of the writer."""
    filesystem, path = resolve(uri)
    if _is_object_store(filesystem):
        # An object exists once its upload is completed, has no folder to be made, and would have to be copied
        # to be renamed.
        with _naming(uri), filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    filesystem.create_dir(posixpath.dirname(path), recursive=True)
    temporary = f"{path}.{uuid.uuid4().hex}{_TEMPORARY}"
    with filesystem.open_output_stream(temporary) as stream:
        stream.write(data)
    filesystem.move(temporary, path)


@contextlib.contextmanager
def _naming(uri: str | Path) -> Iterator[None]:
    """Errors name the file; those of some object stores do not."""
    try:
        yield
    except OSError as error:
        if str(uri) in str(error):
            raise
        # With its number an error keeps its class: 2 is FileNotFoundError.
        raise OSError(error.errno, f"{uri}: {error.strerror or error}") from error


def write_parquet(uri: str | Path, table: pa.Table, **options: Any) -> str:
    """Writes one Parquet file whole, as :func:`write_bytes` does.

    Returns:
        SHA-256 of its bytes, hex.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    data = sink.getvalue()
    write_bytes(uri, data)
    return hashlib.sha256(data).hexdigest()


def read_parquet(uri: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads one Parquet file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    filesystem, path = resolve(uri)
    with filesystem.open_input_file(path) as source:
        return pq.ParquetFile(source).read(columns=columns)


def dataset(folder: str | Path, schema: pa.Schema | None = None) -> pads.Dataset:
    """Opens the Parquet files directly under a folder, in name order.

    Raises:
        UserError: there is no Parquet file.
    """
    files = _parquet_files(folder)
    filesystem, _ = resolve(folder)
    return pads.dataset(
        [resolve(name)[1] for name in files], schema=schema, filesystem=filesystem, format="parquet"
    )


def read_batches(folder: str | Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of the Parquet files directly under a folder, in name order, 8,192 at a time at most.

    One file is open at a time: a scan of a dataset would hold the footers of all files, megabytes each once
    they are decoded.

    Raises:
        UserError: there is no Parquet file.
    """
    for name in _parquet_files(folder):
        filesystem, path = resolve(name)
        with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as file:
            yield from file.iter_batches(
                8_192, columns=None if columns is None else list(columns), use_threads=False
            )


def _parquet_files(folder: str | Path) -> list[str]:
    files = list_files(folder, ".parquet")
    if not files:
        raise UserError(f"no Parquet file in {folder}. Run the stage that writes this table first.")
    return files


def move(source: str | Path, target: str | Path) -> None:
    """Moves a file or folder; an existing target is replaced."""
    filesystem, source_path = resolve(source)
    _, target_path = resolve(target)
    is_folder = filesystem.get_file_info(source_path).type == fs.FileType.Directory
    if is_folder:
        # A file is replaced in one step below, without a moment where there is none.
        remove(target)
    if is_folder and _is_object_store(filesystem):
        # There are no folders to rename, only names that begin alike.
        fs.copy_files(
            source_path, target_path, source_filesystem=filesystem, destination_filesystem=filesystem
        )
        remove(source)
        return
    filesystem.create_dir(posixpath.dirname(target_path), recursive=True)
    filesystem.move(source_path, target_path)


def remove_temporary(folder: str | Path) -> None:
    """Deletes what writers that were killed left half-written, in a folder and those in it.

    No other writer may be at work.
    """
    filesystem, path = resolve(folder)
    if _is_object_store(filesystem):
        # Nothing is half-written there.
        return
    folders = [path]
    while folders:
        # One folder at a time: together they may hold many millions of files.
        for info in filesystem.get_file_info(fs.FileSelector(folders.pop(), allow_not_found=True)):
            if info.type == fs.FileType.Directory:
                folders.append(info.path)
            elif info.base_name.endswith(_TEMPORARY):
                filesystem.delete_file(info.path)


def remove(uri: str | Path) -> None:
    """Deletes a file or folder; nothing happens where there is none."""
    filesystem, path = resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.Directory:
        # On GCS a folder is only a beginning that names share: when they are gone, deleting it finds nothing.
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_dir(path)
    elif kind == fs.FileType.File:
        filesystem.delete_file(path)


def _is_object_store(filesystem: fs.FileSystem) -> bool:
    return filesystem.type_name in ("s3", "gcs", "abfs")


def local_folder(uri: str | Path, purpose: str) -> Path:
    """The folder as a local (or shared, mounted) path, created where missing.

    Raises:
        UserError: ``uri`` is a cloud address, or no folder can be made there or written to.
    """
    path = local_path(uri, purpose)
    try:
        os.makedirs(path, exist_ok=True)  # noqa: PTH103 - tolerant of a parallel creation on shared file systems
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        what = "is a file" if path.is_file() else f"cannot be written to ({error.strerror})"
        raise UserError(
            f"{purpose}: {path} {what}. Set {purpose} to a folder that you may write to."
        ) from error
    return path


def local_path(uri: str | Path, purpose: str) -> Path:
    """The address as a local (or shared, mounted) path; nothing is created.

    Models and checkpoints go through libraries that only know paths.

    Raises:
        UserError: ``uri`` is a cloud address.
    """
    if "://" in str(uri):
        raise UserError(
            f"{purpose} needs a path that every node sees (NFS, Lustre, FSx), not {uri}. Set run.folder to "
            "one."
        )
    return Path(absolute(uri))
