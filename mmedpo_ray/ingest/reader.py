"""What every data format shares: units of work, ids, image checks, the split, the rows of `samples`.

A format cuts its source into *units* on the driver (a few hundred neighbouring rows each, not read) and turns
a unit into rows of `samples` inside a Ray task. Whatever is wrong with a row becomes a dropped row that names
file and position.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import pyarrow as pa

from mmedpo_ray.config.tree import Config
from mmedpo_ray.datasets.cleaning import infer_answer_type, text_problem
from mmedpo_ray.datasets.embedded_images import bytes_or_name
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.ingest.image_checker import ImageChecker, ImageFacts
from mmedpo_ray.io import images, storage
from mmedpo_ray.io.text import storable
from mmedpo_ray.tables.run_folder import RunFolder
from mmedpo_ray.tables.schemas import DROP_DETAIL, DROP_REASON

_LONGEST_DETAIL = 400
_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:\\")
# Few tasks: each new worker process costs a second of imports. Not fewer: their images are decoded one after
# another.
ROWS_PER_UNIT = 256


@dataclass(frozen=True)
class Unit:
    """Neighbouring rows of one file, work for one task.

    Attributes:
        file: annotation file under the root, as messages name it.
        section: list inside the file, where it holds several.
        split: the split that the file or section stands for; None: decided row by row.
        start: where the rows begin: byte (JSON), row group (Parquet) or number (phantoms).
        stop: where they end, exclusive.
        position: of the first row in its file or section, from 0.
        rows: how many there are.
        repeated: positions of the rows whose id occurred before in the same split.
    """

    file: str
    section: str | None
    split: str | None
    start: int
    stop: int
    position: int
    rows: int
    repeated: list[int] = field(default_factory=list)

    @cached_property
    def again(self) -> frozenset[int]:
        """``repeated``, quick to look up."""
        return frozenset(self.repeated)

    def place(self, position: int) -> str:
        """Names a row of the source."""
        section = f", {storable(self.section)}" if self.section else ""
        return f"{self.file}{section}, row {position}"


UNITS = pa.schema(
    [
        pa.field("file", pa.string()),
        pa.field("section", pa.string()),
        pa.field("split", pa.string()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
        pa.field("position", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("repeated", pa.list_(pa.int64())),
    ]
)


class Reader(ABC):
    """One data format. Instances travel to the tasks, so they hold settings only.

    Args:
        config: all settings.

    Attributes:
        needs_root: whether ``data.root`` names the data; False: the reader makes them.
        needs_train_file: whether ``data.train_file`` must be given.
        brings_pairs: whether the rows are preference pairs, which :meth:`pairs` reads.
        intended_reasons: drop reasons of rows that the settings leave out on purpose.
        counts_rows: whether a unit counts the rows of `samples`, kept or dropped, that it becomes.
    """

    needs_root: ClassVar[bool] = True
    needs_train_file: ClassVar[bool] = False
    brings_pairs: ClassVar[bool] = False
    intended_reasons: ClassVar[tuple[str, ...]] = ()
    counts_rows: bool = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = config.data
        self.dataset = config.data.name or config.data.format
        self.counts_rows = self.counts_rows and config.data.frames != "all"

    @abstractmethod
    def units(self) -> Iterator[Unit]:
        """The whole source in order, cut into units without holding it.

        Raises:
            UserError: the source is missing or not of this format.
        """

    @abstractmethod
    def samples(self, unit: Unit, done: Container[str] = ()) -> Iterator[dict[str, Any]]:
        """The `samples` rows of a unit; one that is no use has ``drop_reason``.

        Runs in a Ray task, never raises on bad data.

        Args:
            unit: what to read.
            done: ids of rows that are written already; work on them may be saved, they are left out
                afterwards.
        """

    def fingerprint(self) -> list[str]:
        """What the result depends on besides the settings: hashes of the annotation files."""
        return []

    def file(self, name: str) -> str:
        """Address of a file of the data set that the settings or the format name."""
        return address(storage.home_expanded(name), storage.absolute(self.data.root or "."))

    def raw_folder(self) -> str:
        """Folder of the images that ingest writes."""
        return storage.absolute(storage.join(RunFolder(self.config.run.folder).raw, self.dataset))

    def sample_id(self, split: str, name: str) -> str:
        return f"{self.dataset}/{split}/{name}"

    def sample(
        self, *, name: str, split: str, image: ImageFacts, question: str, answer: str, answer_type: str | None
    ) -> dict[str, Any]:
        """A row of `samples`; the kind of answer is found out where the data does not say.

        Raises:
            UnusableError: the question or the answer is no use.
        """
        problem = text_problem(question, answer)
        if problem:
            raise UnusableError(problem)
        answer_type = answer_type or infer_answer_type(question, answer)
        return {
            "sample_id": self.sample_id(split, name),
            "image_id": f"{self.dataset}/{image.image_id}",
            "dataset": self.dataset,
            "split": split,
            "task": "report" if answer_type == "report" else "vqa",
            "answer_type": answer_type,
            "image_uri": image.uri,
            "image_sha256": image.sha256,
            "question": question,
            "answer": answer,
            "mask_uri": image.mask_uri,
        }

    def dropped(self, name: str, split: str | None, place: str, error: UnusableError) -> dict[str, Any]:
        """A dropped row; the detail names the place in the source, ``image_uri`` the image to blame."""
        return {
            "sample_id": self.sample_id(split or "train", name),
            "dataset": self.dataset,
            "image_uri": error.image_uri,
            DROP_REASON: error.reason,
            DROP_DETAIL: f"{place}: {_shortened(error.detail)}" if error.detail else place,
        }

    def image_address(self, name: str, folder: str, checker: ImageChecker) -> str:
        """Address of the image that a row names; backslashes separate folders where no file has them.

        Raises:
            UnusableError: ``outside_root``: the name climbs out of the data set; ``image_missing``: it begins
                with a drive's letter.
        """
        uri = self._inside(name, folder)
        if "\\" not in name or checker.exists(uri):
            return uri
        if _WINDOWS_DRIVE.match(name):
            hint = "a path on a Windows machine: name images relative to data.image_folder"
            raise UnusableError("image_missing", f"{name} is {hint}", uri)
        return self._inside(name.replace("\\", "/"), folder)

    def mask(self, value: Any, folder: str, checker: ImageChecker) -> str | None:
        """Address of the lesion mask that a row names or holds; None if there is none.

        Args:
            value: what stands in the row, of any type.
            folder: of the images, which the name is relative to.
            checker: knows what files there are.

        Raises:
            UnusableError: the store does not say, or ``outside_root``.
        """
        value = bytes_or_name(value)
        if isinstance(value, bytes):
            # A mask is judged where it is used.
            return checker.write_file(value, "mask")[0] if value else None
        if not isinstance(value, str) or not value.strip():
            return None
        name = storable(value).strip()
        if _WINDOWS_DRIVE.match(name):
            return None
        uri = self.image_address(name, folder, checker)
        return uri if checker.exists(uri) else None

    def _inside(self, name: str, folder: str) -> str:
        """Address of a name relative to a folder; it must not lead out of the data set."""
        uri = address(name, folder)
        if ".." in name.split("/") and "://" not in name and not name.startswith("/"):
            homes = (folder, storage.absolute(self.data.root or "."))
            if not any(_lies_in(uri, home) for home in homes):
                raise UnusableError("outside_root", "the name of its image leads out of the data set")
        return uri

    def by_frame(
        self, name: str, image: ImageFacts, checker: ImageChecker
    ) -> Iterator[tuple[str, ImageFacts]]:
        """The samples of an image in a row: name and image, one for each wanted frame of its file.

        The split is that of the file, so all frames are in one. A mask of several frames has one for each of
        the image.

        Args:
            name: of the row.
            image: the row's.
            checker: knows the frames of its file.

        Raises:
            UnusableError: the mask cannot be read.
        """
        frames = checker.frames(image.uri)
        has_mask_frames = bool(frames and image.mask_uri and checker.frames(image.mask_uri))
        for frame in frames:
            mask = (
                images.with_frame(image.mask_uri, frame)
                if image.mask_uri and has_mask_frames
                else image.mask_uri
            )
            shown = replace(image, uri=images.with_frame(image.uri, frame), mask_uri=mask)
            if self.data.frames == "all":
                yield f"{name}~f{frame}", replace(shown, image_id=f"{image.image_id}~f{frame}")
            else:
                yield name, shown
        if not frames:
            # A frame that the row names is called as one that is wanted of its file.
            file, named = images.file_and_frame(image.image_id)
            yield name, image if named is None else replace(image, image_id=f"{file}~f{named}")

    def split_by_image(self, split: str | None, image: ImageFacts) -> str:
        """The split, drawn by the image's content where the source has none."""
        return split or draw_split(self.config.run.seed, image.sha256, self.data.test_share)

    def is_done(self, names: Iterable[str], split: str | None, done: Container[str]) -> bool:
        """Whether the rows of these names were all written before, whichever split was drawn for them."""
        splits = (split,) if split else ("train", "test")
        return all(any(self.sample_id(each, name) in done for each in splits) for name in names)


def _shortened(detail: str) -> str:
    """The detail, cut in the middle if it is long: a row may hold anything where a name belongs."""
    if len(detail) <= _LONGEST_DETAIL:
        return detail
    return f"{detail[: _LONGEST_DETAIL // 2]} … {detail[-_LONGEST_DETAIL // 4 :]}"


def address(name: str, folder: str) -> str:
    """Address of a file, or of a frame of it, that the data names relative to a folder."""
    if "://" in folder and "://" not in name:
        file, frame = images.file_and_frame(name)
        uri = storage.join(folder, quote(file, errors="replace"))
        return uri if frame is None else images.with_frame(uri, frame)
    return storage.absolute(name, folder)


def _lies_in(uri: str, folder: str) -> bool:
    """Whether an address is below a folder once its ".." are followed."""
    path, home = (posixpath.normpath(unquote(each.split("://", 1)[-1])) for each in (uri, folder))
    return path.startswith(home.rstrip("/") + "/")


def draw_split(seed: int, image_sha256: str, test_share: float) -> str:
    """Train or test by a hash of seed and image content, so that copies of an image share a split."""
    value = int.from_bytes(hashlib.sha256(f"{seed}:{image_sha256}".encode()).digest()[:8], "big")
    return "test" if value < test_share * 2**64 else "train"
