"""Formats whose rows are preference pairs.

The chosen answer becomes the sample's reference; the pair goes to the `released` table.

Answers lose the leading spaces that would give chosen and rejected away.
"""

from __future__ import annotations

import bisect
from abc import abstractmethod
from collections.abc import Container, Iterator
from typing import Any, Protocol

import pyarrow as pa

from mmedpo_ray.datasets.cleaning import clean
from mmedpo_ray.datasets.preferences import Preference
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.ingest.annotations import AnnotationReader, Turn, checked_row
from mmedpo_ray.ingest.image_checker import ImageChecker
from mmedpo_ray.ingest.reader import Unit

GENERATOR = "released"
# What a pair takes over from its sample.
SAMPLE_COLUMNS = (
    "sample_id",
    "image_id",
    "dataset",
    "task",
    "answer_type",
    "image_uri",
    "question",
    "answer",
)


class Samples(Protocol):
    """Rows of `samples` by id."""

    def get(self, sample_id: str, /) -> dict[str, Any] | None: ...


class PreferenceReader(AnnotationReader):
    """Reads rows of preference pairs."""

    needs_train_file = True
    brings_pairs = True
    image_folders: tuple[str, ...] = ("images", ".")

    @abstractmethod
    def preference(self, row: dict[str, Any]) -> Preference:
        """The pair of a row.

        Raises:
            UnusableError: the row is malformed.
        """

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        found = self.preference(row)
        return [Turn(clean(found.question), clean(found.chosen))]

    def image_value(self, row: dict[str, Any]) -> Any:
        return self.preference(row).image

    def image_address(self, name: str, folder: str, checker: ImageChecker) -> str:
        """As in other formats; files beside the image folder are found too, as peers name them."""
        uri = super().image_address(name, folder, checker)
        if self.data.image_folder is not None or checker.exists(uri):
            return uri
        beside = super().image_address(name, self.file("."), checker)
        return beside if checker.exists(beside) else uri

    def pairs(self, unit: Unit, samples: Samples, done: Container[str] = ()) -> Iterator[dict[str, Any]]:
        """The `released` rows of a unit, dropped where a sample was dropped or there is no rejected answer.

        Args:
            unit: what to read.
            samples: kept rows of `samples`.
            done: ids of pairs that are written already; they are left out.
        """
        splits = (unit.split,) if unit.split else ("train", "test")
        checker, folder = ImageChecker(self.data, self.raw_folder()), self._image_folder()
        for position, name, row in self.rows(unit):
            found = (samples.get(self.sample_id(split, name)) for split in splits)
            sample = next((item for item in found if item is not None), None)
            try:
                if sample is None:
                    raise UnusableError("sample_dropped")
                pair = self._pair(sample, self.preference(checked_row(row, unit)), folder, checker)
            except UnusableError as error:
                pair = self.dropped(name, unit.split, unit.place(position), error)
                pair["pair_id"] = f"{pair['sample_id']}:text"
            if pair["pair_id"] not in done:
                yield pair

    def _pair(
        self, sample: dict[str, Any], given: Preference, folder: str, checker: ImageChecker
    ) -> dict[str, Any]:
        rejected_image = sample["image_uri"]
        if given.rejected_image is not None:
            rejected_image = self.found_image(given.rejected_image, folder, checker).uri
        kind = "text" if rejected_image == sample["image_uri"] else "visual"
        rejected = clean(given.rejected)
        if not rejected:
            raise UnusableError("no_rejected_answer")
        return {
            **{key: sample[key] for key in SAMPLE_COLUMNS if key != "answer"},
            "pair_id": f"{sample['sample_id']}:{kind}",
            "kind": kind,
            "rejected_image_uri": rejected_image,
            "chosen": sample["answer"],
            "rejected": rejected,
            "generator": GENERATOR,
            "source_score": score(given.score),
        }


class SortedSamples:
    """Rows of `samples` by id, looked up in the table itself: many tasks share one copy of it.

    Args:
        table: with `SAMPLE_COLUMNS`, sorted by ``sample_id``.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._ids = table["sample_id"]

    def get(self, sample_id: str, /) -> dict[str, Any] | None:
        # Arrow sorts strings as Python does.
        index = bisect.bisect_left(range(len(self._ids)), sample_id, key=lambda row: self._ids[row].as_py())
        if index == len(self._ids) or self._ids[index].as_py() != sample_id:
            return None
        return self._table.slice(index, 1).to_pylist()[0]


def score(value: Any) -> float | None:
    """The published relevance, 0 included; null where there is none.

    Raises:
        UnusableError: it is no number in 0..1.
    """
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise UnusableError("bad_score", "the score is no number in 0..1")
    return float(value)
