"""The cost of requests, kept on disk until the stage's manifest holds it."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from typing import Any

from mmedpo_ray.clients.usage import Usage
from mmedpo_ray.io import storage


class UsageLog:
    """Counters in a folder, one small file per batch, so that a crash does not lose what was paid for.

    Args:
        folder: of the stage's attempt; the first entry makes it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def add(self, usage: Usage) -> None:
        """Writes the counters of a batch."""
        path = storage.join(self.folder, f"{uuid.uuid4().hex}.json")
        storage.write_bytes(path, json.dumps(asdict(usage)).encode())

    def carry_over(self, figures: dict[str, Any]) -> None:
        """Starts an empty log with the counters that the manifest of an earlier run holds."""
        if not storage.list_files(self.folder):
            self.add(Usage.of(figures))

    def total(self) -> Usage:
        """The sum of all entries."""
        total = Usage()
        for path in storage.list_files(self.folder, ".json"):
            total += Usage(**json.loads(storage.read_bytes(path)))
        return total
