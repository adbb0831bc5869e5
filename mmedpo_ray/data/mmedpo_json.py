"""The released MMedPO rows: a LLaVA conversation, the same with the rejected answer, and a relevance score.

The chosen answer becomes the sample's reference answer; the pair itself goes to the `released` table with its score.
Answers lose the leading spaces that would give chosen and rejected away.
"""

from __future__ import annotations

import bisect
from collections.abc import Container, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from mmedpo_ray.data.annotations import AnnotationReader, Turn, checked_row, conversation, talk
from mmedpo_ray.data.reader import Unit, UnusableError

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


class MMedPOJsonReader(AnnotationReader):
    """Reads the published preference rows."""

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        turns = conversation(talk(row))
        if len(turns) > 1:
            raise UnusableError("malformed_conversation", f"{len(turns)} turns, expected one")
        return turns

    def pairs(self, unit: Unit, samples: Samples, done: Container[str] = ()) -> Iterator[dict[str, Any]]:
        """The `released` rows of a unit, dropped where a sample was dropped or there is no rejected answer.

        Args:
            unit: what to read.
            samples: kept rows of `samples`.
            done: ids of pairs that are written already; they are left out.
        """
        splits = (unit.split,) if unit.split else ("train", "test")
        for position, name, row in self.rows(unit):
            found = (samples.get(self.sample_id(split, name)) for split in splits)
            sample = next((item for item in found if item is not None), None)
            try:
                if sample is None:
                    raise UnusableError("sample_dropped")
                pair = _pair(sample, checked_row(row))
            except UnusableError as error:
                pair = self.dropped(name, unit.split, unit.place(position), error)
                pair["pair_id"] = f"{pair['sample_id']}:text"
            if pair["pair_id"] not in done:
                yield pair


class SortedSamples:
    """Rows of `samples` by id, looked up in the table itself: many tasks share one copy of it.

    Args:
        table: with `SAMPLE_COLUMNS`, sorted by ``sample_id``.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._ids = _Strings(table["sample_id"])

    def get(self, sample_id: str, /) -> dict[str, Any] | None:
        index = bisect.bisect_left(self._ids, sample_id)
        if index == len(self._ids) or self._ids[index] != sample_id:
            return None
        return self._table.slice(index, 1).to_pylist()[0]


class _Strings(Sequence[str]):
    """A column of strings as a sequence; Arrow's order of them is Python's."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[index].as_py()


def _pair(sample: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    pair = {key: sample[key] for key in SAMPLE_COLUMNS if key != "answer"}
    return {
        **pair,
        "pair_id": f"{sample['sample_id']}:text",
        "kind": "text",
        "rejected_image_uri": sample["image_uri"],
        "chosen": sample["answer"],
        "rejected": _rejected(row),
        "generator": GENERATOR,
        "source_score": _score(row.get("weighted_score")),
    }


def _rejected(row: dict[str, Any]) -> str:
    turns = conversation(row.get("rejected_conversations"))
    if len(turns) > 1 or not turns[0].answer:
        raise UnusableError("no_rejected_answer")
    return turns[0].answer


def _score(value: Any) -> float | None:
    """The published relevance, 0 included; null where there is none.

    Raises:
        UnusableError: it is no number in 0..1.
    """
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise UnusableError("bad_score", "weighted_score is no number in 0..1")
    return float(value)
