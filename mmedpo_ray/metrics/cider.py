"""CIDEr: n-grams shared with the reference, which count the more the rarer they are in the test set.

The variant CIDEr-D (Vedantam et al., 2015, arXiv 1411.5726), equal to ``Cider`` of pycocoevalcap 1.2, which
image captioning and R2Gen's successors publish. That package is no dependency: it is 100 MB of Java programs
and computes documents' frequencies again in each call. Here they come once from the references of the whole
test set, so that each answer has a score of its own and the bootstrap can draw answers; intervals take the
frequencies as given.

The score depends on the test set: never compare it between data sets, or between a whole set and a part of
it. What is in every reference weighs nothing, so if all references agree even exact copies score 0.
The range is 0 to 10, as published.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from mmedpo_ray.metrics.answer_texts import prediction_text, reference_text, words
from mmedpo_ray.metrics.base import Answer, Array, Metric, as_means

_ORDERS = (1, 2, 3, 4)
_SIGMA = 6.0
_SCALE = 10.0
_Ngrams = Counter[tuple[str, ...]]


def cider(answers: Sequence[Answer], references: Sequence[str]) -> Array:
    """Statistics of CIDEr-D, (N, 2).

    Args:
        answers: N answers.
        references: the references that words are counted in, each question's once.
    """
    frequencies: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        frequencies.update(set(_ngrams(reference_text(reference))))
    log_documents = math.log(max(len(references), 1))

    def vectors(text: str) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Weighted n-grams of each order, their norms, and the number of bigrams, which is the length."""
        found: list[dict[tuple[str, ...], float]] = [{} for _ in _ORDERS]
        counts = _ngrams(text)
        for ngram, count in counts.items():
            weight = log_documents - math.log(max(1.0, frequencies[ngram]))
            found[len(ngram) - 1][ngram] = count * weight
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in found]
        return found, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def score(answer: Answer) -> float:
        said, said_norms, said_length = vectors(prediction_text(answer.prediction))
        expected, expected_norms, expected_length = vectors(reference_text(answer.reference))
        penalty = math.exp(-((said_length - expected_length) ** 2) / (2 * _SIGMA**2))
        total = 0.0
        for order in range(len(_ORDERS)):
            norm = said_norms[order] * expected_norms[order]
            other = expected[order]
            product = sum(
                min(value, other.get(ngram, 0.0)) * other.get(ngram, 0.0)
                for ngram, value in said[order].items()
            )
            total += penalty * (product / norm if norm else product)
        return _SCALE * total / len(_ORDERS)

    return as_means([score(answer) for answer in answers])


def _ngrams(text: str) -> _Ngrams:
    found = words(text)
    return Counter(
        tuple(found[start : start + order]) for order in _ORDERS for start in range(len(found) - order + 1)
    )


CIDER = Metric("report_cider", "report CIDEr (0–10)", "report", cider)
