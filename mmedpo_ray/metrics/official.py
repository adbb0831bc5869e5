"""The rules of the scripts of LLaVA-Med, which the paper used; for comparison with published figures only.

Equal to ``llava/eval`` of microsoft/LLaVA-Med (commit ad758b6) to the last digit, but for one thing: its
script leaves a closed answer that holds a yes or no and is wrong out of the denominator, so that its accuracy
cannot tell models apart. Here, as in the paper's figures, every closed question counts.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import yaml

from mmedpo_ray.metrics.base import Answer, Metric, mean_of

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The script passes re.UNICODE where re.sub takes a count, so a call drops at most this many full stops.
_PERIODS_DROPPED = int(re.UNICODE)
_ARTICLES = frozenset({"a", "an", "the"})
_WORDS = yaml.safe_load((Path(__file__).parent / "official_words.yaml").read_text("utf-8"))
# What the script writes with an apostrophe if an answer does without ("dont").
_CONTRACTIONS: dict[str, str] = _WORDS["contractions"]
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS["numbers"].split())} | {"none": "0"}


def closed_correct_official(answer: Answer) -> bool:
    """The paper's rule: the reference is a substring of the answer."""
    return _normalised(answer.reference) in _normalised(answer.prediction)


def recall_official(answer: Answer) -> float:
    """Recall of words, each counted as often as the *answer* repeats it; 0 if a side is empty."""
    prediction = Counter(_normalised(answer.prediction).split())
    reference = Counter(_normalised(answer.reference).split())
    if not prediction or not reference:
        return 0.0
    hits = sum(count for word, count in prediction.items() if word in reference)
    misses = sum(count for word, count in reference.items() if word not in prediction)
    return hits / (hits + misses)


@lru_cache(maxsize=8192)
def _normalised(text: str) -> str:
    """The script normalises every text twice, and the second time may change it again."""
    return _normalised_once(_normalised_once(text.lower()))


def _normalised_once(text: str) -> str:
    """One pass of the script's normalisation.

    A punctuation mark becomes a blank, or nothing if the text has it beside a blank or has a comma between
    digits anywhere; apostrophes and decimal points stay; number words up to ten are digits; no articles."""
    drops_all = _NUMBER_COMMA.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        drops = drops_all or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if drops else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_PERIODS_DROPPED)
    words = (_NUMBERS.get(word, word) for word in cleaned.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


CLOSED_ACCURACY = Metric(
    "closed_accuracy_official",
    "closed accuracy (official rule)",
    "closed",
    mean_of(closed_correct_official),
    role="official",
)
RECALL = Metric(
    "open_recall_official",
    "open recall (official rule)",
    "open",
    mean_of(recall_official),
    role="official",
)
