"""Texts as the audit compares them: folded, and as numbers of 64 bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pandas.util import hash_array

from mmedpo_ray.radiology.lexicon.normalisation import same_characters

# Punctuation that has no ASCII counterpart.
_FOREIGN_MARKS = (
    r"[\x{3001}\x{3002}\x{3008}-\x{300f}\x{3010}\x{3011}\x{3014}\x{3015}\x{30fb}\x{ff61}-\x{ff65}"
    r"\x{2022}\x{25cf}\x{a1}\x{bf}]"
)
# Characters that need more than NFKC: whatever is no letter, accent, blank or full-width form.
_TYPOGRAPHIC = r"[^\x00-\x7f\p{Lu}\p{Ll}\p{Lo}\p{M}\x{3000}\x{ff01}-\x{ff5e}]|\x{ba}"
# Chinese sets no spaces; what stands between it and other letters is layout.
_SPACES_BESIDE_HAN = ((r"(\p{Han})\s+", r"\1"), (r"\s+(\p{Han})", r"\1"))
# Byte → the same byte, or a space. Bytes of other than ASCII characters are never among them.
_PUNCTUATION = np.arange(256, dtype=np.uint8)
_PUNCTUATION[list(b".,;:!?\"'`()[]{}*")] = ord(" ")
_HAS_TWO_SENSES = np.zeros(256, bool)
_HAS_TWO_SENSES[list(b".,:-")] = True
_IS_DIGIT, _IS_LETTER = np.zeros(256, bool), np.zeros(256, bool)
_IS_DIGIT[list(b"0123456789")] = True
_IS_LETTER[list(b"abcdefghijklmnopqrstuvwxyz")] = True
# Bytes of letters beyond ASCII.
_IS_LETTER[128:] = True
# Spaces beside signs and units, after all gaps are one space: "< 5", "5 - 10", "5 x 4 x 3", "effusion -
# right", "5 mm".
_MAY_BE_SPACED = r"[<>=] |[^ ] [x~-]+ |\d (?:%|[mc]m\b|ml\b)"
_SPACINGS = (
    (r"([<>=]) ", r"\1"),
    (r"(\d) ([x~-]) ", r"\1\2"),
    (r"([^\d ]) -+ ", r"\1 "),
    (r"(\d) (%|[mc]m\b|ml\b)", r"\1\2"),
)


def normalised(strings: pa.Array) -> pa.Array:
    """Texts in lower case and in one form of characters, without punctuation and needless spaces.

    Signs that carry meaning stay (+ < > / %, the point of 1.5, the minus of -5, the dash of 5-10); a hyphen
    between letters is a space. Full-width, typographic and invisible characters are those of
    `same_characters`.
    """
    lower = pc.utf8_lower(_where(strings, pc.invert(pc.string_is_ascii(strings)), _in_ascii_marks))
    folded = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(_without_punctuation(lower)))
    joined = pc.binary_join(folded, " ")
    return _where(joined, pc.match_substring_regex(joined, _MAY_BE_SPACED), _evenly_spaced)


def _where(strings: pa.Array, rows: pa.Array, change: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """The strings, some rows of them changed."""
    if not pc.any(rows, min_count=0).as_py():
        return strings
    return pc.replace_with_mask(strings, rows, change(strings.filter(rows)))


def _in_ascii_marks(strings: pa.Array) -> pa.Array:
    marked = pc.replace_substring_regex(strings, _FOREIGN_MARKS, " , ")
    # In Python, so only where there is something to do.
    marked = _where(marked, pc.match_substring_regex(marked, _TYPOGRAPHIC), _in_same_characters)
    return _replaced(pc.utf8_normalize(marked, "NFKC"), _SPACES_BESIDE_HAN)


def _in_same_characters(strings: pa.Array) -> pa.Array:
    return pa.array([same_characters(text) for text in strings.to_pylist()], pa.string())


def _evenly_spaced(strings: pa.Array) -> pa.Array:
    return _replaced(strings, _SPACINGS)


def _replaced(strings: pa.Array, rules: tuple[tuple[str, str], ...]) -> pa.Array:
    for pattern, replacement in rules:
        strings = pc.replace_substring_regex(strings, pattern, replacement)
    return strings


def _without_punctuation(strings: pa.Array) -> pa.Array:
    """Punctuation replaced by spaces, byte by byte: a regular expression takes ten times as long.

    A point or colon inside a number stays, and so does the point that begins one; a comma there is a point.
    """
    if len(strings) == 0:
        return strings
    # Line feeds at both ends, so that no byte is beside one of another text.
    ended = pc.binary_join_element_wise("\n", strings, "\n", "")
    _, offsets, data = ended.buffers()
    codes = np.frombuffer(data, np.uint8)
    folded = _PUNCTUATION[codes]
    places = np.flatnonzero(_HAS_TWO_SENSES[codes])
    before, sign, after = (codes[places + shift] for shift in (-1, 0, 1))
    in_number = _IS_DIGIT[before] & _IS_DIGIT[after]
    begins_number = (sign == ord(".")) & _IS_DIGIT[after] & ~_IS_LETTER[before]
    kept = np.where(sign == ord(","), ord("."), sign)
    is_kept = begins_number | (in_number & (sign != ord("-")))
    folded[places[is_kept]] = kept[is_kept]
    folded[places[(sign == ord("-")) & _IS_LETTER[before] & _IS_LETTER[after]]] = ord(" ")
    return pa.StringArray.from_buffers(len(ended), offsets, pa.py_buffer(folded), offset=ended.offset)


def hashes(*columns: pa.Array) -> np.ndarray:
    """A 64-bit hash of each row's strings, never 0. Equal strings have equal hashes, in every process.

    Two of a million different rows share a hash with probability 3e-8.
    """
    joined = columns[0] if len(columns) == 1 else pc.binary_join_element_wise(*columns, "\x1f")
    strings = np.array([*joined.to_pylist(), None], object)[:-1]
    values = hash_array(strings, categorize=False).view(np.int64)
    return np.where(values == 0, 1, values)
