"""LLaVA conversation JSON: `{"id", "image", "conversations": [{"from": "human", …}, {"from": "gpt", …}, …]}`.

Every question-answer turn becomes a sample of its own; turns do not see one another. A system
prompt is left out. LLaVA-Med's own files spell the key "conversatons", which is read too.
"""

from __future__ import annotations

from typing import Any

from mmedpo_ray.ingest.annotations import AnnotationReader, Turn, conversation, talk


class LlavaJsonReader(AnnotationReader):
    """Reads LLaVA conversations, of one turn or several."""

    needs_train_file = True
    # A turn is a row of `samples`, and how many a conversation has is seen when it is read.
    counts_rows = False

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        return conversation(talk(row))
