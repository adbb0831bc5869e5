"""Reads the word lists in ``radiology/data``: vocabulary, patterns and relations that need no knowledge of Python to edit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def load(subject: str) -> Any:
    """The lists of ``data/<subject>.yaml``; shared, so do not change them."""
    path = Path(__file__).parent / "data" / f"{subject}.yaml"
    # The loader in C is ten times as fast, and every worker reads the lists when it starts.
    return yaml.load(path.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


_SHARED = load("words")
NUMBER_WORDS: dict[str, int] = {word: value for value, word in enumerate(_SHARED["numbers"].split())}
# Patterns of a word for what an image shows ("seen", "present"), and of a word for an image.
SEEN = f"(?:{'|'.join(_SHARED['seen'].split())})"
IMAGE = f"(?:{'|'.join(_SHARED['image'].split())})"


def word_set(name: str) -> frozenset[str]:
    """The words of a list of ``data/words.yaml``."""
    return frozenset(_SHARED[name].split())
