"""Reads the word lists in ``radiology/data``, which can be edited without knowledge of Python."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_PIECE = re.compile(r"\{([A-Z_]+)\}")


@cache
def load(subject: str) -> Any:
    """The lists of ``data/<subject>.yaml``; shared, so do not change them."""
    path = Path(__file__).parent / "data" / f"{subject}.yaml"
    # The loader in C is ten times as fast, and every worker reads the lists when it starts.
    return yaml.load(path.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


_WORDS = load("words")
NUMBER_WORDS: dict[str, int] = {word: value for value, word in enumerate(_WORDS["numbers"].split())}
# Patterns of a word for what an image shows ("seen", "present"), and of a word for an image.
SEEN = f"(?:{'|'.join(_WORDS['seen'].split())})"
IMAGE = f"(?:{'|'.join(_WORDS['image'].split())})"


def word_set(name: str) -> frozenset[str]:
    """The words of a list of ``data/words.yaml``."""
    return frozenset(_WORDS[name].split())


def pattern_of(entry: str | list[str], pieces: Mapping[str, str | list[str]]) -> str:
    """The regular expression that an entry of a list writes in parts.

    Args:
        entry: a pattern, whose line ends do not count, or a list of alternatives.
        pieces: what replaces every ``{NAME}`` in it; a piece may name others.
    """
    joined = entry.replace("\n", "") if isinstance(entry, str) else "|".join(entry)
    return _PIECE.sub(lambda name: pattern_of(pieces[name[1]], pieces), joined)
