"""The released MMedPO rows: a LLaVA conversation, the same with the rejected answer, and a relevance score.

The chosen answer becomes the sample's reference answer; the pair itself goes to the `released` table with its score.
Answers lose the leading spaces that would give chosen and rejected away.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from mmedpo_ray.data.reader import AnnotationReader, UnusableError, conversation

GENERATOR = "released"


class MMedPOJsonReader(AnnotationReader):
    """Reads the published preference rows."""

    def turns(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        turns = conversation(row.get("conversations"))
        if len(turns) > 1:
            raise UnusableError("malformed_conversation", f"{len(turns)} turns, expected one")
        return turns

    def pairs(self, unit: dict[str, Any], samples: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The `released` row of a unit, dropped where its sample was dropped or it has no rejected answer.

        Args:
            unit: the annotation row.
            samples: kept rows of `samples` by id.
        """
        name = unit["unit_id"]
        splits = (unit["split"],) if unit["split"] else ("train", "test")
        found = [self.sample_id(split, name) for split in splits if self.sample_id(split, name) in samples]
        if not found:
            yield self._dropped_pair(unit, UnusableError("sample_dropped"))
            return
        sample = samples[found[0]]
        try:
            row = json.loads(unit["payload"])
            rejected = self._rejected(row)
            score = _score(row.get("weighted_score"))
        except UnusableError as error:
            yield self._dropped_pair(unit, error)
            return
        yield {
            "pair_id": f"{sample['sample_id']}:text",
            "kind": "text",
            "rejected_image_uri": sample["image_uri"],
            "chosen": sample["answer"],
            "rejected": rejected,
            "generator": GENERATOR,
            "source_score": score,
            **{
                key: sample[key]
                for key in (
                    "sample_id",
                    "image_id",
                    "dataset",
                    "task",
                    "answer_type",
                    "image_uri",
                    "question",
                )
            },
        }

    def _rejected(self, row: dict[str, Any]) -> str:
        turns = conversation(row.get("rejected_conversations"))
        if len(turns) > 1 or not turns[0][1]:
            raise UnusableError("no_rejected_answer")
        return turns[0][1]

    def _dropped_pair(self, unit: dict[str, Any], error: UnusableError) -> dict[str, Any]:
        row = self.dropped(unit, unit["unit_id"], error.reason, error.detail)
        row["pair_id"] = f"{row['sample_id']}:text"
        return row


def _score(value: Any) -> float | None:
    """The published relevance, 0 included; null where there is none.

    Raises:
        UnusableError: it is no number in 0..1.
    """
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= 1:
        raise UnusableError("bad_score", "weighted_score is no number in 0..1")
    return float(value)
