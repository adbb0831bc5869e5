"""The released MMedPO rows: a LLaVA conversation, its rejected variant, and a relevance score."""

from __future__ import annotations

from typing import Any

from mmedpo_ray.datasets.preferences import Preference
from mmedpo_ray.datasets.unusable import UnusableError
from mmedpo_ray.ingest.annotations import conversation, talk
from mmedpo_ray.ingest.preference_reader import PreferenceReader


class MMedPOJsonReader(PreferenceReader):
    """Reads the published preference rows."""

    image_folders = ("images",)

    def preference(self, row: dict[str, Any]) -> Preference:
        turns = conversation(talk(row))
        if len(turns) > 1:
            raise UnusableError("malformed_conversation", f"{len(turns)} turns, expected one")
        return Preference(
            turns[0].question,
            turns[0].answer,
            _rejected(row.get("rejected_conversations")),
            row.get(self.image_key),
            score=row.get("weighted_score"),
        )


def _rejected(value: Any) -> str:
    """The rejected answer; empty where there is none, which costs the pair, not the sample."""
    try:
        turns = conversation(value)
    except UnusableError:
        return ""
    return turns[0].answer if len(turns) == 1 else ""
