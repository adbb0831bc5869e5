"""Texts as the audit compares them: folded, and as numbers of 64 bits."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pandas.util import hash_array

_NUMBER_POINT = r"(\d)[.,:](\d)"
_QUOTES = "‘’“”„"
# Byte → the same byte, or a space. Bytes of other than ASCII characters are never among them.
_PUNCTUATION = np.arange(256, dtype=np.uint8)
_PUNCTUATION[list(b".,;:!?\"'`()[]{}*")] = ord(" ")


def normalised(texts: pa.Array) -> pa.Array:
    """Texts in lower case, with spaces and punctuation folded; signs that carry meaning (+ - < > / %, 1.5) stay."""
    lower = pc.utf8_lower(pc.utf8_normalize(texts, "NFKC"))
    if not pc.all(pc.string_is_ascii(lower)).as_py():
        for sign in _QUOTES:
            lower = pc.replace_substring(lower, sign, " ")
    kept = pc.replace_substring_regex(lower, _NUMBER_POINT, r"\1_\2")
    return pc.binary_join(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(_without_punctuation(kept))), " ")


def _without_punctuation(texts: pa.Array) -> pa.Array:
    """Punctuation replaced by spaces, byte by byte: a regular expression takes ten times as long."""
    if len(texts) == 0 or texts.buffers()[2] is None:
        return texts
    _, offsets, data = texts.buffers()
    folded = _PUNCTUATION[np.frombuffer(data, np.uint8)]
    return pa.StringArray.from_buffers(len(texts), offsets, pa.py_buffer(folded), offset=texts.offset)


def hashes(*columns: pa.Array) -> np.ndarray:
    """A 64-bit hash of each row's texts, never 0. Equal texts have equal hashes, in every process.

    Two of a million different rows share a hash with probability 3e-8.
    """
    joined = columns[0] if len(columns) == 1 else pc.binary_join_element_wise(*columns, "\x1f")
    texts = np.array([*joined.to_pylist(), None], object)[:-1]
    values = hash_array(texts, categorize=False).view(np.int64)
    return np.where(values == 0, 1, values)
