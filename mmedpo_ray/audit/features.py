"""Pairs → numbers: what the audit's checks need of every row, so that no text has to stay in memory.

A row leaves about 90 bytes behind however long its answers are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmedpo_ray.audit.hashing import hashes, normalised
from mmedpo_ray.audit.samples import HELD_OUT, Samples, SplitImages
from mmedpo_ray.radiology.finding_prompts import names_finding
from mmedpo_ray.radiology.lexicon import polarity
from mmedpo_ray.radiology.lexicon.meta_text import COMMENTARY_PARTS, LEAKED_PROMPT

# One bit each of `format_chosen` and `format_rejected`: what a model could tell the sides apart by without
# the image.
FORMATS: dict[str, str] = {
    "leading_space": r"\A\s",
    "trailing_space": r"\s\z",
    "capital": r"\A\W*\p{Lu}",
    "final_period": r"\.\s*\z",
    "newline": r"\S\s*\n\s*\S",
    "quotes": "[\"“”„‘]|\\A\\s*'|'\\s*\\z",
    "says_yes": r"(?i)\A\W*(yes|yeah|yep|true|correct)\b",
    "says_no": r"(?i)\A\W*(no|nope|none|false|incorrect)\b",
}
_BIT = {name: 1 << index for index, name in enumerate(FORMATS)}

# The patterns are in small letters.
_LEAKED_PROMPT = f"(?im){LEAKED_PROMPT}"
_COMMENTARY = [f"(?im){part}" for part in COMMENTARY_PARTS]
# What a question asks for, by its first words; the first pattern that matches counts.
QUESTION_FORMS: dict[str, str] = {
    "report": r"(?i)\b(write|generate|provide|give|create|draft|describe|summari[sz]e|compose)\b.*"
    r"\b(report|findings|impression)\b",
    "choice": r"(?i)^\W*(is|are|was|were|does|do|did|has|have|can|which|what)\b.*\b\w+,? or \w+",
    "yes/no": r"(?i)^\W*(is|are|was|were|does|do|did|has|have|can|could|should|will|would|any)\b",
    "how many": r"(?i)^\W*how (many|much|often)\b",
    "where": r"(?i)\bwhere\b",
    "which": r"(?i)\b(in )?which\b",
    "what": r"(?i)\bwhat\b",
    "how or why": r"(?i)\b(how|why)\b",
    "other": r"",
}

_SIGN = {"yes": 1, "no": -1, None: 0}
# Bits of `leak`.
LEAK_CHOSEN, LEAK_REJECTED, COMMENT_CHOSEN, COMMENT_REJECTED = 1, 2, 4, 8
# Values of `noise_bound`: what decides how much of the image the noise covers.
AREA_SHARE, GIVEN_MASK, EVEN_MAP, RELEASED_SCRIPT = range(4)
# Values of `truth`.
UNKNOWN, AGREES, DIFFERS, OPPOSITE = -1, 0, 1, 2


class NotCheckedError(Exception):
    """The table lacks what a check needs; the message says what."""


@dataclass(frozen=True)
class Features:
    """Numbers of N pairs, in the table's order.

    Attributes:
        columns: columns that the table has; checks ask here whether they apply.
        has_samples: there is a samples table.
        held_out: those of test and validate that the samples table has rows of.
        visual: (N,) bool, kind is visual.
        words_chosen, words_rejected: (N,) int32, runs of non-space.
        chars_chosen, chars_rejected: (N,) int32, code points.
        format_chosen, format_rejected: (N,) uint16, bits in the order of `FORMATS`.
        polarity: (N,) int8, 1 where chosen says yes, -1 no, 0 neither.
        equal: (N,) bool, both sides are the same text.
        near_equal: (N,) bool, they differ in case, spacing, punctuation or other characters for the same
            signs only.
        empty: (N,) bool, a side has no text.
        untrimmed: (N,) bool, a side begins or ends with white space.
        leak: (N,) uint8, bits `LEAK_CHOSEN`, `LEAK_REJECTED`, `COMMENT_CHOSEN`, `COMMENT_REJECTED`.
        pair_id: (N,) int64, hash of the id.
        asked: (N,) int64, hash of image and question (0 where no image is named).
        answer: (N,) int64, hash of the chosen answer's normalised text.
        content: (N,) int64, hash of kind, images, question and both normalised sides.
        same_image: (N,) bool, rejected_image_uri is image_uri.
        weight: (N,) float64, NaN where null.
        question_form: (N,) int8, index in `QUESTION_FORMS`.
        first_word: (N,) int32, index in ``first_words``.
        answer_type: (N,) int32, index in ``answer_types``.
        finding_named: (N,) bool, question or answer of a visual pair name a finding; False for text pairs,
            where nobody asks.
        noise_share: (N,) float32, share of the image that the noise covers, NaN where unknown.
        noise_bound: (N,) int8, `AREA_SHARE` (also where nothing is recorded), `GIVEN_MASK` (the data set's),
            `EVEN_MAP` (the tool's map has one value over more than that share, so that it is kept whole) or
            `RELEASED_SCRIPT`.
        lesion_covered: (N,) float32, share of the lesion that lies under the noise, as recorded with the
            pair; NaN where unknown.
        sample_row: (N,) int64, row of the samples table, -1 where unknown.
        truth: (N,) int8, `UNKNOWN`, `AGREES`, `DIFFERS` or `OPPOSITE` (yes for no).
        of_test: (N,) bool, the pair's sample is of split test.
        image_in_test: (N,) bool, it is not, but one of the pair's images is also one of split test.
        image_in_validation: (N,) bool, neither is so, but one of the pair's images, or its sample, is of
            split validate.
    """

    columns: frozenset[str]
    has_samples: bool
    held_out: frozenset[str]
    visual: np.ndarray
    words_chosen: np.ndarray
    words_rejected: np.ndarray
    chars_chosen: np.ndarray
    chars_rejected: np.ndarray
    format_chosen: np.ndarray
    format_rejected: np.ndarray
    polarity: np.ndarray
    equal: np.ndarray
    near_equal: np.ndarray
    empty: np.ndarray
    untrimmed: np.ndarray
    leak: np.ndarray
    pair_id: np.ndarray
    asked: np.ndarray
    answer: np.ndarray
    content: np.ndarray
    same_image: np.ndarray
    weight: np.ndarray
    question_form: np.ndarray
    first_word: np.ndarray
    answer_type: np.ndarray
    finding_named: np.ndarray
    noise_share: np.ndarray
    noise_bound: np.ndarray
    lesion_covered: np.ndarray
    sample_row: np.ndarray
    truth: np.ndarray
    of_test: np.ndarray
    image_in_test: np.ndarray
    image_in_validation: np.ndarray
    first_words: tuple[str, ...]
    answer_types: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.visual)

    @property
    def text(self) -> np.ndarray:
        """(N,) bool, the pairs whose two answers differ by design."""
        return ~self.visual

    @property
    def leaked(self) -> np.ndarray:
        """(N,) bool, a side repeats the prompt that made it."""
        return (self.leak & (LEAK_CHOSEN | LEAK_REJECTED)) > 0

    def has_format(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool each: the chosen, and the rejected side has this format."""
        return (self.format_chosen & _BIT[name]) > 0, (self.format_rejected & _BIT[name]) > 0


def features_of(batch: pa.Table, samples: Samples | None) -> dict[str, np.ndarray | pa.Array]:
    """The numbers of some rows, by the names in `Features`; first words and answer types stay strings.

    Args:
        batch: rows with the columns that checks use, each in one chunk.
        samples: the samples behind them, or None.
    """
    size = batch.num_rows
    visual = (
        _numpy(pc.fill_null(pc.equal(batch["kind"], "visual"), False))
        if _has(batch, "kind")
        else np.zeros(size, bool)
    )
    chosen, rejected, question = (_text(batch, name) for name in ("chosen", "rejected", "question"))
    image = _text(batch, "image_uri")
    rejected_image = _text(batch, "rejected_image_uri") if _has(batch, "rejected_image_uri") else image
    norm_question, norm_chosen, norm_rejected = (
        normalised(strings) for strings in (question, chosen, rejected)
    )
    formats = [_formats(side) for side in (chosen, rejected)]
    equal = _numpy(pc.equal(chosen, rejected))
    said = _polarity(chosen)
    kind = pa.array(np.where(visual, "v", "t"))
    asked = hashes(image, norm_question)
    first = pc.utf8_lower(pc.struct_field(pc.extract_regex(question, r"^\W*(?P<word>\w*)"), [0]))
    found: dict[str, np.ndarray | pa.Array] = {
        "visual": visual,
        "words_chosen": _words(chosen),
        "words_rejected": _words(rejected),
        "chars_chosen": _numpy(pc.utf8_length(chosen)),
        "chars_rejected": _numpy(pc.utf8_length(rejected)),
        "format_chosen": formats[0],
        "format_rejected": formats[1],
        "polarity": said,
        "equal": equal,
        "near_equal": ~equal & _numpy(pc.equal(norm_chosen, norm_rejected)),
        "empty": _empty_text(chosen) | _empty_text(rejected),
        "untrimmed": _untrimmed(chosen) | _untrimmed(rejected),
        "leak": _leaks(chosen, rejected),
        "pair_id": hashes(_text(batch, "pair_id")),
        "asked": np.where(_numpy(pc.equal(image, "")), 0, asked),
        "answer": hashes(norm_chosen),
        "content": hashes(kind, image, rejected_image, norm_question, norm_chosen, norm_rejected),
        "same_image": _numpy(pc.equal(image, rejected_image)),
        "weight": _numpy(batch["weight"].combine_chunks())
        if _has(batch, "weight")
        else np.full(size, np.nan),
        "question_form": _question_forms(question),
        "first_word": first,
        "answer_type": _text(batch, "answer_type"),
        "finding_named": _finding_named(visual, question, chosen),
        "noise_share": _noise_share(batch),
        "noise_bound": _noise_bound(batch),
        "lesion_covered": _noise_parameter(batch, "lesion_covered").astype(np.float32),
    }
    return found | _against_samples(batch, samples, norm_chosen, said)


def _words(strings: pa.Array) -> np.ndarray:
    """Runs of non-space, as ``len(text.split())`` counts them."""
    trimmed = pc.utf8_trim_whitespace(strings)
    counts = _numpy(pc.list_value_length(pc.utf8_split_whitespace(trimmed)))
    return np.where(_numpy(pc.equal(trimmed, "")), 0, counts).astype(np.int32)


def _has(batch: pa.Table, name: str) -> bool:
    return name in batch.column_names


def _text(batch: pa.Table, name: str) -> pa.Array:
    """A text column as one array, null read as empty; empty strings where there is no such column."""
    if not _has(batch, name):
        return pa.array(np.full(batch.num_rows, ""), pa.string())
    column = batch[name].combine_chunks() if batch.num_rows else pa.array([], pa.string())
    return pc.fill_null(column, "")


def _numpy(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    if isinstance(values, pa.ChunkedArray):
        return values.to_numpy()
    return values.to_numpy(zero_copy_only=False)


def _empty_text(strings: pa.Array) -> np.ndarray:
    return _numpy(pc.equal(pc.utf8_trim_whitespace(strings), ""))


def _untrimmed(strings: pa.Array) -> np.ndarray:
    return _numpy(pc.not_equal(pc.utf8_trim_whitespace(strings), strings))


def _formats(strings: pa.Array) -> np.ndarray:
    bits = np.zeros(len(strings), np.uint16)
    for name, pattern in FORMATS.items():
        bits |= np.where(_numpy(pc.match_substring_regex(strings, pattern)), _BIT[name], 0).astype(np.uint16)
    return bits


def _polarity(strings: pa.Array) -> np.ndarray:
    """1 where a text says yes, -1 where it says no; each distinct text is read once."""
    encoded = strings.dictionary_encode()
    signs = [_SIGN[polarity(text)] for text in encoded.dictionary.to_pylist()]
    return np.array(signs, np.int8)[_numpy(encoded.indices)] if signs else np.zeros(len(strings), np.int8)


def _leaks(chosen: pa.Array, rejected: pa.Array) -> np.ndarray:
    bits = np.zeros(len(chosen), np.uint8)
    for strings, leak, comment in (
        (chosen, LEAK_CHOSEN, COMMENT_CHOSEN),
        (rejected, LEAK_REJECTED, COMMENT_REJECTED),
    ):
        leaked = _numpy(pc.match_substring_regex(strings, _LEAKED_PROMPT))
        talks = np.logical_or.reduce(
            [_numpy(pc.match_substring_regex(strings, each)) for each in _COMMENTARY]
        )
        bits |= np.where(leaked, leak, np.where(talks, comment, 0)).astype(np.uint8)
    return bits


def _question_forms(question: pa.Array) -> np.ndarray:
    forms = np.full(len(question), -1, np.int8)
    for index, pattern in enumerate(QUESTION_FORMS.values()):
        open_rows = np.flatnonzero(forms < 0)
        matched = _numpy(pc.match_substring_regex(question.take(pa.array(open_rows)), pattern))
        forms[open_rows[matched]] = index
    return forms


def _finding_named(visual: np.ndarray, question: pa.Array, chosen: pa.Array) -> np.ndarray:
    named = visual.copy()
    rows = pa.array(visual)
    strings = zip(question.filter(rows).to_pylist(), chosen.filter(rows).to_pylist(), strict=True)
    named[visual] = [names_finding(*each) for each in strings]
    return named


def _noise_share(batch: pa.Table) -> np.ndarray:
    """Changed share where the noise parameters give it, else the mask's."""
    changed, masked = (_noise_parameter(batch, key) for key in ("changed_share", "mask_share"))
    return np.where(np.isnan(changed), masked, changed).astype(np.float32)


def _noise_bound(batch: pa.Table) -> np.ndarray:
    released = pc.match_substring_regex(_text(batch, "noise"), r'"mode":\s*"released"')
    even = _noise_parameter(batch, "mask_share") > _noise_parameter(batch, "area_share")
    given = pc.equal(_text(batch, "tool"), "dataset_mask")
    bounds = np.where(even, EVEN_MAP, AREA_SHARE)
    bounds = np.where(_numpy(given), GIVEN_MASK, bounds)
    return np.where(_numpy(released), RELEASED_SCRIPT, bounds).astype(np.int8)


def _noise_parameter(batch: pa.Table, key: str) -> np.ndarray:
    """A number of the column ``noise``, float64; NaN where it has none."""
    pattern = rf'"{key}":\s*(?P<value>[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*[,}}]'
    found = pc.struct_field(pc.extract_regex(_text(batch, "noise"), pattern), [0])
    return _numpy(pc.fill_null(pc.cast(found, pa.float64()), np.nan))


def _against_samples(
    batch: pa.Table, samples: Samples | None, norm_chosen: pa.Array, said: np.ndarray
) -> dict[str, np.ndarray]:
    size = batch.num_rows
    rows = np.full(size, -1, np.int64)
    truth = np.full(size, UNKNOWN, np.int8)
    of_test = np.zeros(size, bool)
    image_in = {split: np.zeros(size, bool) for split in HELD_OUT}
    if samples is not None and size:
        if _has(batch, "sample_id"):
            rows = samples.rows_of(_text(batch, "sample_id"))
        else:
            rows = samples.rows_asking(_text(batch, "image_uri"), normalised(_text(batch, "question")))
        known = rows >= 0
        answers = pc.fill_null(samples.table["answer"].take(pa.array(rows[known])), "").combine_chunks()
        norm_answers = normalised(answers)
        expected = _polarity(answers)
        same = _numpy(pc.equal(norm_chosen.filter(pa.array(known)), norm_answers))
        opposite = expected * said[known] < 0
        truth[known] = np.where(same, AGREES, np.where(opposite, OPPOSITE, DIFFERS))
        of_test[known] = samples.in_test[rows[known]]
        for split, images in samples.held_out.items():
            image_in[split] = _shows(batch, images)
            image_in[split][known] |= images.of_rows[rows[known]]
    image_in_test = image_in["test"] & ~of_test
    return {
        "sample_row": rows,
        "truth": truth,
        "of_test": of_test,
        "image_in_test": image_in_test,
        "image_in_validation": image_in["validate"] & ~of_test & ~image_in_test,
    }


def _shows(batch: pa.Table, images: SplitImages) -> np.ndarray:
    """(N,) bool: the image of either side of a pair belongs to a split."""
    shown = images.with_id(_text(batch, "image_id"))
    for name in ("image_uri", "rejected_image_uri"):
        shown |= images.at(_text(batch, name))
    return shown
