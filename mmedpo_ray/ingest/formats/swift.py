"""ms-swift's RLHF data, as JSON, JSON Lines or Parquet.

See :func:`~mmedpo_ray.datasets.preferences.from_swift`.
"""

from __future__ import annotations

from mmedpo_ray.datasets.preferences import from_swift
from mmedpo_ray.ingest.preference_reader import PreferenceReader


class SwiftReader(PreferenceReader):
    """Reads one preference pair per row."""

    preference = staticmethod(from_swift)
