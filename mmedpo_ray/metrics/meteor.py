"""METEOR as nltk computes it, and a score without synonyms if there is no WordNet.

METEOR (Lavie and Agarwal, 2007) matches words that are equal, have one stem, or are synonyms in WordNet. nltk
reads WordNet from ``corpora/wordnet`` in one of its data folders (``python -m nltk.downloader wordnet``, or
that folder copied and named by NLTK_DATA). Without it ``report_meteor`` is left out, and
``report_meteor_exact`` takes its place: the same formula on equal words and stems only. The two are different
scores with different names; never compare one with the other.

nltk's METEOR is no METEOR 1.5 (Java): an exact copy of m words has 1 − 0.5/m³ here, so a copy of one word has
0.5, and synonyms are looked up by the stems of the words ("opac" for opacity), so most of them are not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from mmedpo_ray.metrics.answer_texts import prediction_text, reference_text, words
from mmedpo_ray.metrics.base import Answer, Array, Metric, UnavailableError, as_means


def meteor(answers: Sequence[Answer], _references: Sequence[str]) -> Array:
    """Statistics of METEOR with synonyms; (N, 2).

    Raises:
        UnavailableError: WordNet is not installed.
    """
    if not wordnet_found():
        raise UnavailableError(
            "METEOR is left out: nltk finds no WordNet (`python -m nltk.downloader wordnet`; offline, copy "
            "its folder corpora/ and set NLTK_DATA to where it lies). In its place, meteor-exact is another "
            "score"
        )
    from nltk.corpus import wordnet

    return _scores(answers, wordnet)


def meteor_exact(answers: Sequence[Answer], _references: Sequence[str]) -> Array:
    """Statistics of METEOR without synonyms; (N, 2).

    Raises:
        UnavailableError: WordNet is at hand, so that METEOR itself is computed.
    """
    if wordnet_found():
        raise UnavailableError("")
    return _scores(answers, _NoSynonyms())


def wordnet_found() -> bool:
    """Whether nltk can read WordNet here."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except Exception:  # A LookupError if there is none; a damaged copy raises anything.
        return False
    return True


class _NoSynonyms:
    """A WordNet without words."""

    def synsets(self, _word: str) -> list[Any]:
        return []


def _scores(answers: Sequence[Answer], wordnet: Any) -> Array:
    from nltk.translate.meteor_score import single_meteor_score

    stemmer = _Stemmer()
    return as_means(
        [
            single_meteor_score(
                words(reference_text(answer.reference)),
                words(prediction_text(answer.prediction)),
                stemmer=stemmer,
                wordnet=wordnet,
            )
            for answer in answers
        ]
    )


class _Stemmer:
    """nltk's default stemmer, which takes most of the time, asked once a word."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = cache(PorterStemmer().stem)


METEOR = Metric("report_meteor", "report METEOR", "report", meteor)
METEOR_EXACT = Metric("report_meteor_exact", "report meteor-exact (no synonyms)", "report", meteor_exact)
