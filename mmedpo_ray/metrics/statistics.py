"""How sure a score is: intervals by resampling whole images, tests of differences by swapping whole images.

Answers about one image depend on each other, so resampling single answers would claim too much. Here
images are drawn with replacement and each brings all its answers along (clustered percentile bootstrap).
Differences between two models are taken on the same images in each resample, so what is hard for both cancels
out.

Whether a difference is more than chance is tested by approximate randomisation (Noreen, 1989; Riezler and
Maxwell, 2005, whose test sacrebleu's ``--paired-ar`` is too): if the models were alike, each image's two sets
of answers could as well be swapped. Several metrics are several chances to find something, so p-values are
corrected together (Holm, 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from scipy.stats import binomtest

Array = np.ndarray

# Resamples × images are held at once up to this many numbers.
_BLOCK = 8_000_000
# From so many clusters on, alike ones are drawn together.
_MANY = 10_000
# Swaps drawn by the test. Up to as many it takes every one there is.
PERMUTATIONS = 9_999
# Sums of the same numbers in another order differ by less than this.
_ROUNDING = 1e-12


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
        """For JSON; NaN and infinity become None."""
        return {name: number if np.isfinite(number) else None for name, number in asdict(self).items()}


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
    return coded_sums(statistics, np.array([position[name] for name in clusters], int), len(order))


def coded_sums(statistics: Array, codes: Array, num_clusters: int) -> Array:
    """Adds up the statistics of each cluster, given its number, int (N,), for each row: (C, K)."""
    columns = [np.bincount(codes, column, num_clusters) for column in statistics.T]
    return np.stack(columns, axis=1)


def bootstrap(
    values: Callable[[Array], Array],
    sums: Sequence[Array],
    *,
    n: int,
    resamples: int,
    confidence: float,
    seed: int,
) -> Estimate:
    """Percentile interval of a model's score, or of the difference between the scores of two models.

    Args:
        values: sums of statistics (…, K) → (…) values.
        sums: for one or two models the sums of each cluster, (C, K), clusters in the same order; of two
            models the first minus the second is estimated.
        n: answers counted, for the record.
        resamples: R, draws of C clusters out of C with replacement.
        confidence: probability that the interval covers, such as 0.95.
        seed: of the draws.

    Returns:
        Value and interval; NaN without clusters.
    """
    nan = float("nan")
    num_clusters = len(sums[0])
    if num_clusters == 0:
        return Estimate(nan, nan, nan, n)

    def estimated(of_models: Sequence[Array]) -> Array:
        first, *others = map(values, of_models)
        return first - others[0] if others else first

    value = float(estimated([item.sum(axis=0) for item in sums]))
    kinds, sizes = _kinds(np.concatenate(sums, axis=1))
    if sizes is not None:
        sums = np.split(kinds, np.cumsum([item.shape[1] for item in sums])[:-1], axis=1)
    draws = (
        _draws(num_clusters, resamples, seed) if sizes is None else _draws_of_kinds(sizes, resamples, seed)
    )
    drawn = np.concatenate([estimated([counts @ item for item in sums]) for counts in draws])
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Estimate(value, nan, nan, n)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n)


def _kinds(rows: Array) -> tuple[Array, Array | None]:
    """The distinct rows and how many clusters have each, if clusters are many and most are alike.

    How often alike clusters are drawn or swapped is a single multinomial or binomial number, of the same
    distribution as one by one. Few clusters are drawn one by one, by the same numbers in every comparison.

    Returns:
        Rows (G, K) and sizes (G,); or the rows as given and None.
    """
    if len(rows) < _MANY:
        return rows, None
    kinds, sizes = np.unique(rows, axis=0, return_counts=True)
    return (kinds, sizes) if len(kinds) <= len(rows) / 4 else (rows, None)


def _draws_of_kinds(sizes: Array, resamples: int, seed: int) -> Iterator[Array]:
    """How often clusters of each kind were drawn."""
    generator, total = np.random.default_rng(seed), int(sizes.sum())
    block = max(1, _BLOCK // len(sizes))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        yield generator.multinomial(total, sizes / total, size).astype(np.float64)


def _draws(num_clusters: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each cluster was drawn; the same seed and number of clusters give the same draws."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // num_clusters)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        picks = generator.integers(0, num_clusters, size=(size, num_clusters))
        flat = picks + np.arange(size)[:, None] * num_clusters
        counts = np.bincount(flat.ravel(), minlength=size * num_clusters)
        yield counts.reshape(size, num_clusters).astype(np.float64)


def paired_p_value(
    values: Callable[[Array], Array],
    first: Array,
    second: Array,
    *,
    seed: int,
    permutations: int = PERMUTATIONS,
) -> float:
    """Two-sided p-value of the difference between two models on the same clusters.

    Args:
        values: sums of statistics (…, K) → (…) values.
        first: sums of each cluster of the one model, (C, K).
        second: of the other, clusters in the same order.
        seed: of the draws.
        permutations: drawn at random if there are more swaps than that; then the observed one counts too
            (p is never 0).

    Returns:
        Share of swaps whose difference is at least as large as the observed one; 1 without clusters.
    """
    total = first.sum(axis=0) + second.sum(axis=0)
    delta = first - second
    # A swap of equal sums changes nothing.
    delta = delta[np.abs(delta).max(axis=1, initial=0.0) > 0]
    if not len(delta):
        return 1.0
    kept = second.sum(axis=0)
    observed = abs(float(values(kept + delta.sum(axis=0)) - values(kept))) - _ROUNDING
    as_large = 0
    exact = 2 ** min(len(delta), 60) <= permutations
    delta, sizes = _kinds(delta)
    for keeps in _all_swaps(len(delta)) if exact else _swaps(len(delta), permutations, seed, sizes):
        sums = kept + keeps @ delta
        as_large += int((np.abs(values(sums) - values(total - sums)) >= observed).sum())
    return as_large / 2 ** len(delta) if exact else (1 + as_large) / (1 + permutations)


def _all_swaps(num_clusters: int) -> Iterator[Array]:
    bits = np.arange(2**num_clusters)[:, None] >> np.arange(num_clusters)
    yield (bits & 1).astype(np.float64)


def _swaps(num_clusters: int, permutations: int, seed: int, sizes: Array | None) -> Iterator[Array]:
    """1 where a cluster keeps its sums, 0 where the models swap theirs; with sizes, how many of a kind do."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // num_clusters)
    for start in range(0, permutations, block):
        shape = (min(block, permutations - start), num_clusters)
        if sizes is None:
            yield generator.integers(0, 2, size=shape, dtype=np.int8).astype(np.float64)
        else:
            yield generator.binomial(sizes, 0.5, size=shape).astype(np.float64)


def mcnemar_p_value(gained: int, lost: int) -> float:
    """Two-sided exact p-value of McNemar's test (1947), which takes every question for independent.

    Args:
        gained: questions that only the one model answers right.
        lost: questions that only the other does.

    Returns:
        1 where there are none.
    """
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def detectable_difference(
    low: float | None, high: float | None, confidence: float, power: float = 0.8
) -> float | None:
    """The smallest true difference that a set of this size and noise shows with the given power.

    (z(confidence) + z(power)) standard errors, the error taken from a difference's interval as of a normal
    distribution.

    Args:
        low: lower end of the interval of a paired difference.
        high: its upper end.
        confidence: of the interval and of the two-sided test.
        power: probability of finding it.

    Returns:
        None without an interval.
    """
    if low is None or high is None:
        return None
    normal = NormalDist()
    half = normal.inv_cdf((1 + confidence) / 2)
    return (high - low) / (2 * half) * (half + normal.inv_cdf(power))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for looking at all of them (Holm, 1979), in the same order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected
