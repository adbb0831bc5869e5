"""How sure a score is: intervals by resampling whole images.

Questions about one image stand and fall together, so resampling single answers would claim too much. Here images are
drawn with replacement and each brings all its answers along (clustered percentile bootstrap). Differences between two
models are taken on the same images in each resample, so what is hard for both cancels out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

# Resamples × images are held at once up to this many numbers.
_BLOCK = 8_000_000


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: of the whole set.
        low: lower end of the interval.
        high: upper end.
        n: answers counted.
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON; what is not a number becomes ``None``."""
        return {
            name: None if isinstance(number, float) and not np.isfinite(number) else number
            for name, number in (("value", self.value), ("low", self.low), ("high", self.high), ("n", self.n))
        }


def cluster_sums(statistics: Array, clusters: Sequence[str], order: Sequence[str]) -> Array:
    """Adds up the statistics of each cluster.

    Args:
        statistics: (N, K).
        clusters: cluster of each row, N.
        order: clusters of the result, C; one without rows gets zeros.

    Returns:
        (C, K)
    """
    position = {name: index for index, name in enumerate(order)}
    sums = np.zeros((len(order), statistics.shape[1]))
    np.add.at(sums, [position[name] for name in clusters], statistics)
    return sums


def bootstrap(
    values: Callable[[Array], Array],
    sums: Sequence[Array],
    *,
    combine: Callable[..., Array] | None = None,
    n: int,
    resamples: int,
    confidence: float,
    seed: int,
) -> Estimate:
    """Percentile interval of a score, or of a combination of scores of several models on the same clusters.

    Args:
        values: sums of statistics (…, K) → (…) values.
        sums: for each model the sums of each cluster, (C, K), clusters in the same order.
        combine: the models' values → the quantity estimated; default: the first model's value.
        n: answers counted, for the record.
        resamples: R, draws of C clusters out of C with replacement.
        confidence: probability that the interval covers, such as 0.95.
        seed: of the draws.

    Returns:
        Value and interval; NaN without clusters.
    """
    combine = combine or (lambda first: first)
    num_clusters = len(sums[0])
    if num_clusters == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), n)
    value = float(combine(*(values(item.sum(axis=0)) for item in sums)))
    draws = []
    for counts in _draws(num_clusters, resamples, seed):
        draws.append(combine(*(values(counts @ item) for item in sums)))
    tail = (1 - confidence) / 2
    drawn = np.concatenate(draws)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Estimate(value, float("nan"), float("nan"), n)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n)


def difference(first: Array, second: Array) -> Array:
    """For ``combine``: how much better the first model is."""
    return first - second


def _draws(num_clusters: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each cluster was drawn; the same seed and number of clusters give the same draws."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // num_clusters)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        picks = generator.integers(0, num_clusters, size=(size, num_clusters))
        flat = picks + np.arange(size)[:, None] * num_clusters
        yield (
            np.bincount(flat.ravel(), minlength=size * num_clusters)
            .reshape(size, num_clusters)
            .astype(np.float64)
        )
