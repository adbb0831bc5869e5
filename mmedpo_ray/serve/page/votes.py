"""Votes of readers as preference data that ``mmedpo ingest`` reads (``data.format=trl``).

    <folder>/votes.parquet           one row per vote
    <folder>/images/<sha256>.png     the images, each once

A tie and "both wrong" are rows without a chosen and a rejected answer: ingest drops them with the reason.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from datetime import UTC, datetime
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from mmedpo_ray.io import storage

TABLE = "votes.parquet"
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("voted_at", pa.string(), nullable=False),
        pa.field("vote", pa.string(), nullable=False),
        pa.field("left_model", pa.string(), nullable=False),
        pa.field("right_model", pa.string(), nullable=False),
        pa.field("left_answer", pa.string(), nullable=False),
        pa.field("right_answer", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("chosen", pa.string()),
        pa.field("rejected", pa.string()),
        pa.field("images", pa.list_(pa.string()), nullable=False),
    ]
)


class Side(BaseModel):
    """One of the two answers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=256)
    answer: str = Field(min_length=1, max_length=20_000)


class Vote(BaseModel):
    """What a reader prefers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str = Field(min_length=1, max_length=20_000)
    image: str = Field(description="data URL")
    left: Side
    right: Side
    vote: Literal["left", "right", "tie", "both_wrong"]


class Votes:
    """A folder of votes; each vote is on disk when :meth:`add` returns.

    Args:
        folder: local or in object storage; made by the first vote.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def add(self, vote: Vote, image: bytes) -> int:
        """Writes a vote and its image (a PNG or JPEG file); returns the number of votes."""
        name = f"{hashlib.sha256(image).hexdigest()}.png"
        sides = {"left": (vote.left, vote.right), "right": (vote.right, vote.left)}.get(vote.vote)
        row = {
            "id": uuid.uuid4().hex,
            "voted_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "vote": vote.vote,
            "left_model": vote.left.model,
            "right_model": vote.right.model,
            "left_answer": vote.left.answer,
            "right_answer": vote.right.answer,
            "prompt": vote.question,
            "chosen": sides[0].answer if sides else None,
            "rejected": sides[1].answer if sides else None,
            "images": [name],
        }
        with self._lock:
            target = storage.join(self._folder, "images", name)
            if not storage.exists(target):
                storage.write_bytes(target, image)
            table = storage.join(self._folder, TABLE)
            rows = pa.Table.from_pylist([row], _SCHEMA)
            if storage.exists(table):
                rows = pa.concat_tables([storage.read_parquet(table), rows])
            storage.write_parquet(table, rows)
            return rows.num_rows
