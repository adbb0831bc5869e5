"""LLaMA-Factory's ranking data, as JSON, JSON Lines or Parquet.

See :func:`~mmedpo_ray.datasets.preferences.from_llama_factory`.
"""

from __future__ import annotations

from mmedpo_ray.datasets.preferences import from_llama_factory
from mmedpo_ray.ingest.preference_reader import PreferenceReader


class LlamaFactoryReader(PreferenceReader):
    """Reads one preference pair per row."""

    preference = staticmethod(from_llama_factory)
