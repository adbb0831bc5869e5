"""TRL's preference data, as JSON, JSON Lines or Parquet.

See :func:`~mmedpo_ray.datasets.preferences.from_trl`.
"""

from __future__ import annotations

from mmedpo_ray.datasets.preferences import from_trl
from mmedpo_ray.ingest.preference_reader import PreferenceReader


class TrlReader(PreferenceReader):
    """Reads one preference pair per row."""

    preference = staticmethod(from_trl)
