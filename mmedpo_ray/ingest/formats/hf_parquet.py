"""Hugging Face style Parquet (`train-*.parquet`, `test-*.parquet`, …) with the image in a column.

The files lie under the root or in `data/`; file names give the split, ``data.columns`` names the columns. An
image is struct<bytes, path>, bytes, or the path of a file, and so is a lesion mask. Their bytes are written
once per distinct image under the run's `raw/` by the task that reads them, so that the tables carry addresses
as with every other format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from mmedpo_ray.config.tree import Config
from mmedpo_ray.datasets import parquet_rows
from mmedpo_ray.datasets.cleaning import clean, stated_answer_type
from mmedpo_ray.datasets.row_names import given_name
from mmedpo_ray.errors import UserError
from mmedpo_ray.ingest.annotations import AnnotationReader, Turn
from mmedpo_ray.ingest.image_checker import ImageChecker, ImageFacts
from mmedpo_ray.ingest.reader import Unit
from mmedpo_ray.io import storage

_FOLDERS = ("", "data")
# The words by which the Hub's `datasets` tells the splits of files, and one more of ours: validate.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev"), "validate"),
}


class HfParquetReader(AnnotationReader):
    """Reads Parquet files whose columns the settings name."""

    image_folders = ("",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        names = self.data.columns.model_dump().values()
        self.columns = sorted({name for name in names if name is not None})
        self.id_key = self.data.columns.sample_id

    def files(self) -> list[tuple[str, str | None]]:
        if self.data.train_file is not None:
            held_out = self.data.test_share > 0 and self.data.test_file is None
            found: list[tuple[str, str | None]] = [(self.data.train_file, None if held_out else "train")]
            return found + ([(self.data.test_file, "test")] if self.data.test_file else [])
        names = next(filter(None, map(self._names, _FOLDERS)), [])
        if not names:
            raise UserError(
                f"no Parquet file in {self.data.root} or its folder data/. Check data.root, or name the file "
                "in data.train_file."
            )
        stated = {name: _split_of_name(name) for name in names}
        held_out = self.data.test_share > 0 and "test" not in stated.values()
        rest = None if held_out else "train"
        return [(name, rest if split in (None, "train") else split) for name, split in stated.items()]

    def units(self) -> Iterator[Unit]:
        for name, _ in self.files():
            self._check_columns(self.file(name))
        yield from super().units()

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        columns = self.data.columns
        answer_type = row[columns.answer_type] if columns.answer_type is not None else None
        question, answer = clean(row[columns.question]), clean(row[columns.answer])
        return [Turn(question, answer, stated_answer_type(answer_type))]

    def image(self, row: dict[str, Any], folder: str, checker: ImageChecker) -> ImageFacts:
        columns = self.data.columns
        found = self.found_image(row[columns.image], folder, checker)
        named = given_name(row[columns.image_id]) if columns.image_id is not None else None
        mask = row[columns.mask] if columns.mask is not None else None
        return replace(found, image_id=named or found.sha256, mask_uri=self.mask(mask, folder, checker))

    def position_name(self, file: str, position: int) -> str:
        return f"~{PurePosixPath(file).stem}/{position}"

    def _names(self, folder: str) -> list[str]:
        """The Parquet files in a folder under the root."""
        found = storage.list_files(self.file(folder) if folder else storage.absolute(self.data.root or "."))
        names = [PurePosixPath(uri).name for uri in found if uri.endswith(".parquet")]
        if "://" in (self.data.root or ""):
            # As a file is called, not as its address spells it: `file` makes an address of the name.
            names = [unquote(name) for name in names]
        return [f"{folder}/{name}" if folder else name for name in names]

    def _check_columns(self, uri: str) -> None:
        names = parquet_rows.column_names(uri)
        for key, wanted in self.data.columns.model_dump().items():
            if wanted is not None and wanted not in names:
                raise UserError(
                    f"{uri} has no column {wanted!r} (data.columns.{key}); it has {', '.join(names)}."
                )


def _split_of_name(name: str) -> str | None:
    """The split that a file name states ("train-00000-of-00003.parquet"), else None."""
    words = re.split(r"[^a-z]+", PurePosixPath(name).stem.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)
