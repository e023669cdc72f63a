"""Figures from results tables: certified accuracy, its intervals, envelope, oracle, coverage. Pure numpy and scipy.

Two kinds of randomness, never to be mixed up. The *images* are a sample of the data distribution: the intervals
here and the bootstrap are over images. The *votes* are a sample of the noise: each certificate may be wrong with
probability alpha, which `certified_lower` accounts for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rsrouter.core.errors import InputError
from rsrouter.results import Table

Array = NDArray[np.float64]

INTERVALS = ("clopper-pearson", "wilson")


@dataclass(frozen=True)
class Curve:
    """A share of images per radius, with a confidence interval over images.

    Attributes:
        radii: `(R,)` L2 radii in [0,1]-pixel units, ascending as given.
        accuracy: `(R,)` shares in [0, 1].
        low, high: `(R,)` pointwise interval at `confidence`.
        images: how many images.
        confidence: level of the interval.
    """

    radii: Array
    accuracy: Array
    low: Array
    high: Array
    images: int
    confidence: float


def check_radii(radii: ArrayLike) -> Array:
    """Finite radii >= 0 as a float64 array `(R,)`, R >= 1; InputError otherwise."""
    array = np.atleast_1d(np.asarray(radii, dtype=np.float64))
    if array.ndim != 1 or array.size == 0 or not np.all(np.isfinite(array) & (array >= 0)):
        raise InputError(
            "Certified accuracy needs radii",
            expected="finite numbers >= 0",
            received=repr(radii),
            remedy="0, 0.25, 0.5, ... as in the tables you compare with",
        )
    return array


def _check_level(value: float, name: str) -> None:
    if not 0.0 < value < 1.0:
        raise InputError(
            f"{name} must be a probability strictly between 0 and 1",
            expected=f"0 < {name} < 1",
            received=repr(value),
            remedy="0.95 for an interval, 0.001 for a failure probability",
        )


def certified(table: Table, radii: ArrayLike) -> NDArray[np.bool_]:
    """`(N, R)`: whether each image got a class and a radius of at least r, right or wrong."""
    return np.asarray(~table.abstained[:, None] & (table.radius[:, None] >= check_radii(radii)[None, :]))


def certified_correct(table: Table, radii: ArrayLike) -> NDArray[np.bool_]:
    """`(N, R)`: whether each image is correct with a radius of at least r (at r = 0: correct, not abstaining).

    Raises:
        InputError: some label is unknown (`correct` -1), so there is nothing to be right about.
    """
    if not table.labelled:
        unknown = int(np.sum(table.correct < 0))
        raise InputError(
            f"Table {table.name!r} has images without a label",
            expected="correct 0 or 1 in every row",
            received=f"{unknown} of {len(table)} rows with correct -1",
            remedy="certify with labels at hand",
        )
    return np.asarray((table.correct == 1)[:, None] & certified(table, radii))


def proportion_interval(
    hits: ArrayLike, n: int, *, confidence: float = 0.95, method: str = "clopper-pearson"
) -> tuple[Array, Array]:
    """Two-sided interval for a proportion over `n` independent images with `hits` successes (any shape).

    `clopper-pearson` is exact (never under-covers), `wilson` is the score interval (on average at its level).
    """
    _check_level(confidence, "confidence")
    if method not in INTERVALS:
        raise InputError(
            "Unknown interval", expected=f"one of {INTERVALS}", received=repr(method), remedy="clopper-pearson is exact"
        )
    k = np.asarray(hits, dtype=np.float64)
    tail = (1.0 - confidence) / 2.0
    if method == "clopper-pearson":
        low = np.where(k > 0, stats.beta.ppf(tail, np.maximum(k, 1), n - k + 1), 0.0)
        high = np.where(k < n, stats.beta.isf(tail, k + 1, np.maximum(n - k, 1)), 1.0)
        return low, high
    z = stats.norm.isf(tail)
    centre = (k + z * z / 2.0) / (n + z * z)
    half = z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4.0)
    return np.where(k > 0, np.maximum(centre - half, 0.0), 0.0), np.where(k < n, np.minimum(centre + half, 1.0), 1.0)


def certified_accuracy(table: Table, radii: ArrayLike, *, confidence: float = 0.95, interval: str = "clopper-pearson") -> Curve:
    """Share of images that are correct with a certified radius of at least r, for every r in `radii`.

    Args:
        table: results with labels.
        radii: `(R,)` L2 radii in [0,1]-pixel units. At r = 0: correct and not abstaining.
        confidence: level of the interval over images.
        interval: "clopper-pearson" or "wilson".

    Raises:
        InputError: unknown labels, or arguments out of range.
    """
    return _curve(certified_correct(table, radii), radii, confidence, interval)


def natural_accuracy(table: Table, *, confidence: float = 0.95) -> tuple[float, float, float] | None:
    """Share of images that a classifier with a core answers right, certified or not, and its interval; None without a core.

    Certified accuracy at radius 0 is another figure: no answer of the core counts there.

    Raises:
        InputError: unknown labels.
    """
    right = table.natural
    if right is None:
        return None
    if not table.labelled:
        raise InputError(
            "Accuracy needs labels", expected="the label of every image", received=table.name, remedy="certify labelled images"
        )
    low, high = proportion_interval(right.sum(), len(right), confidence=confidence)
    return float(right.mean()), float(low), float(high)


def certified_share(table: Table, radii: ArrayLike, *, confidence: float = 0.95, interval: str = "clopper-pearson") -> Curve:
    """Share of images with *any* class certified at radius r: what a table without labels can say."""
    return _curve(certified(table, radii), radii, confidence, interval)


def _curve(hits: NDArray[np.bool_], radii: ArrayLike, confidence: float, interval: str) -> Curve:
    low, high = proportion_interval(hits.sum(0), len(hits), confidence=confidence, method=interval)
    return Curve(check_radii(radii), hits.mean(0), low, high, len(hits), confidence)


def abstention_rate(table: Table) -> float:
    """Share of images without a certified class."""
    return float(table.abstained.mean())


def average_certified_radius(table: Table) -> float:
    """ACR: the mean over images of the radius, 0 where not correct (Zhai et al. 2020, MACER).

    A secondary figure: large radii on few easy images outweigh everything else (arXiv 2410.06895).
    """
    return float(np.mean(np.where(certified_correct(table, [0.0])[:, 0], table.radius, 0.0)))


def _stack(experts: Sequence[Table], radii: ArrayLike) -> NDArray[np.bool_]:
    """`(K, N, R)` hits of several tables, which must hold the same images in the same order (`results.align`)."""
    if not experts:
        raise InputError(
            "There is no expert to compare with",
            expected="at least one table",
            received="none",
            remedy="certify the experts alone",
        )
    if any(not np.array_equal(t.idx, experts[0].idx) for t in experts[1:]):
        raise InputError(
            "The tables are over different images",
            expected="the same image ids in the same order",
            received=", ".join(f"{t.name}: {len(t)} images" for t in experts),
            remedy="use rsrouter.results.align",
        )
    return np.stack([certified_correct(t, radii) for t in experts])


def envelope(experts: Sequence[Table], radii: ArrayLike) -> Array:
    """`(R,)`: at each radius the accuracy of the expert that is best *there*.

    What a user who knew the radius of interest could have by picking one expert; no single model reaches it
    everywhere. As a maximum of estimates it is slightly optimistic.
    """
    return np.asarray(_stack(experts, radii).mean(1).max(0), dtype=np.float64)


def oracle(experts: Sequence[Table], radii: ArrayLike) -> Array:
    """`(R,)`: share of images that *some* expert certifies correctly at radius r: the limit of routing by image."""
    return np.asarray(_stack(experts, radii).any(0).mean(0), dtype=np.float64)


def oracle_choice(experts: Sequence[Table]) -> NDArray[np.int64]:
    """`(N,)`: position of the expert with the largest correct radius, -1 where none is correct."""
    right = _stack(experts, [0.0])[:, :, 0]
    radius = np.where(right, np.stack([t.radius for t in experts]), -1.0)
    return np.where(right.any(0), radius.argmax(0), -1)


def _ratio(routed: Array, best: Array) -> Array:
    """Mean over the last axis of routed / best, over the radii where best is above 0; NaN if there is none."""
    use = best > 0.0
    with np.errstate(all="ignore"):
        ratio = np.where(use, routed / np.where(use, best, 1.0), 0.0)
        return np.asarray(ratio.sum(-1) / use.sum(-1), dtype=np.float64)


def coverage(routed: Table, experts: Sequence[Table], radii: ArrayLike) -> float:
    """Mean over `radii` of routed accuracy / envelope, where the envelope is above 0.

    1 keeps up with the best expert at every radius; the oracle is above 1.
    """
    _stack([routed, *experts], [0.0])
    return float(_ratio(certified_correct(routed, radii).mean(0), envelope(experts, radii)))


def _resampled(hits: NDArray[np.bool_], resamples: int, seed: int) -> Array:
    """`(B, ...)` means of `hits (N, ...)` over bootstrap samples of its first axis; the same draws for the same seed and N."""
    n = hits.shape[0]
    rng = np.random.default_rng(seed)
    flat = hits.reshape(n, -1).astype(np.float32)
    means = np.empty((resamples, flat.shape[1]))
    for start in range(0, resamples, 100):
        count = min(100, resamples - start)
        weights = rng.multinomial(n, np.full(n, 1.0 / n), size=count).astype(np.float32)
        means[start : start + count] = weights @ flat / n
    return means.reshape(resamples, *hits.shape[1:])


def _percentiles(values: Array, confidence: float) -> tuple[Array, Array]:
    _check_level(confidence, "confidence")
    tail = 100.0 * (1.0 - confidence) / 2.0
    low, high = np.percentile(values, [tail, 100.0 - tail], axis=0)
    return np.asarray(low), np.asarray(high)


def least_ratio(routed: Table, experts: Sequence[Table], radii: ArrayLike) -> tuple[float, float]:
    """The smallest of routed accuracy / envelope over `radii` where the envelope is above 0, and the radius where it is.

    What routing costs where it costs most: coverage is a mean, and a mean forgives. NaN, NaN where the envelope is 0 everywhere.
    """
    _stack([routed, *experts], [0.0])
    held, best = certified_correct(routed, radii).mean(0), envelope(experts, radii)
    ratio = np.where(best > 0, held / np.where(best > 0, best, 1.0), np.inf)
    if not np.isfinite(ratio).any():
        return float("nan"), float("nan")
    i = int(ratio.argmin())
    return float(ratio[i]), float(check_radii(radii)[i])


def coverage_interval(
    routed: Table, experts: Sequence[Table], radii: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `coverage` over images; the images are drawn jointly for all tables."""
    hits = np.moveaxis(_stack([routed, *experts], radii), 0, 1)
    means = _resampled(hits, resamples, seed)
    low, high = _percentiles(_ratio(means[:, 0], means[:, 1:].max(1)), confidence)
    return float(low), float(high)


def accuracy_difference(
    a: Table, b: Table, radii: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Certified accuracy of `a` minus that of `b`, `(R,)`, with a *paired* percentile bootstrap interval over images.

    Returns:
        difference, low, high.
    """
    first, second = _stack([a, b], radii)
    means = _resampled(np.stack([first, second], axis=1), resamples, seed)
    low, high = _percentiles(means[:, 0] - means[:, 1], confidence)
    return np.asarray(first.mean(0) - second.mean(0)), low, high


def coverage_difference(
    a: Table,
    b: Table,
    experts: Sequence[Table],
    radii: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """`coverage` of `a` minus that of `b`, with a *paired* percentile bootstrap interval over images.

    Returns:
        difference, low, high.
    """
    means = _resampled(np.moveaxis(_stack([a, b, *experts], radii), 0, 1), resamples, seed)
    best = means[:, 2:].max(1)
    low, high = _percentiles(_ratio(means[:, 0], best) - _ratio(means[:, 1], best), confidence)
    return coverage(a, experts, radii) - coverage(b, experts, radii), float(low), float(high)


def wrong_certificates(n: int, alpha: float, *, delta: float = 1e-3, independent: bool = True) -> int:
    """A number q such that with probability at least `1 - delta` at most q of `n` certificates are wrong.

    Each certificate is wrong with probability at most alpha over its own noise. With independent noise across
    images the number of wrong ones is stochastically dominated by Binomial(n, alpha) (a sum of independent
    indicators, each dominated by a Bernoulli(alpha)), so q is the smallest with `P(Binomial(n, alpha) > q) <= delta`.
    Without independence only its mean is known, at most n alpha, and Markov's inequality gives the smallest q
    with `n alpha / (q + 1) <= delta`.
    """
    _check_level(alpha, "alpha")
    _check_level(delta, "delta")
    if not independent:
        return int(min(n, max(np.ceil(n * alpha / delta) - 1, 0)))
    q = int(stats.binom.isf(delta, n, alpha))
    while stats.binom.sf(q, n, alpha) > delta:
        q += 1
    return min(n, q)


def certified_lower(
    table: Table, radii: ArrayLike, *, alpha: float, delta: float = 1e-3, independent: bool = True, population: bool = False
) -> Array:
    """`(R,)` lower bound on the *true* certified accuracy, valid with probability at least `1 - delta`.

    Theorem. Call an image truly robust at r if the ideal classifier answers its label everywhere within r. A row
    that claims so without it being so is a wrong certificate. At most q rows are wrong, whatever the radius, with
    probability at least `1 - delta` (`wrong_certificates`), and then the truly robust images at r number at
    least (claimed at r) - q. Hence, simultaneously in r, the share of *these images* that is truly robust is
    at least `max(0, claimed(r) - q) / N`.

    With `population` (images drawn independently from the data distribution, noise independent of them) half of
    delta goes to each step: the Clopper-Pearson lower bound at delta / 2 on `max(0, claimed(r) - q)` successes
    of N, q taken at delta / 2. It holds because that bound is increasing in the count; for each r by itself, not
    for all at once.

    Args:
        table: results with labels.
        radii: `(R,)`.
        alpha: failure probability of one certificate.
        delta: failure probability of the whole statement.
        independent: whether the noise is independent across images (each image has its own stream).
        population: bound the accuracy on the distribution rather than on these images.
    """
    claimed = certified_correct(table, radii).sum(0)
    q = wrong_certificates(len(table), alpha, delta=delta / 2 if population else delta, independent=independent)
    sure = np.maximum(claimed - q, 0)
    if not population:
        return np.asarray(sure / len(table), dtype=np.float64)
    return np.where(sure > 0, stats.beta.ppf(delta / 2, np.maximum(sure, 1), len(table) - sure + 1), 0.0)


def shares_by_radius(names: Sequence[str] | NDArray[np.object_], table: Table, radii: ArrayLike) -> dict[str, Array]:
    """Per name the share of *all* images that are certified at r and carry that name (expert, binding stage, ...): `(R,)` each.

    Args:
        names: `(N,)` one name per image.
        table: the results; images that abstain count for nobody.
        radii: `(R,)`.
    """
    held = certified(table, radii)
    labels = np.asarray(names, dtype=object)
    return {str(name): held[labels == name].sum(0) / len(table) for name in dict.fromkeys(labels.tolist())}


def default_radii(tables: Sequence[Table], *, step: float = 0.25, most: int = 12) -> Array:
    """`(R,)` columns of a headline table: 0, step, 2 step, ... as far as one image in a hundred is still certified.

    The step doubles until at most `most` radii are left; the radii depend on the tables' radii only.
    """
    top = max((float(np.quantile(t.radius, 0.99, method="inverted_cdf")) for t in tables), default=0.0)
    while top / step >= most:
        step *= 2
    return np.arange(0.0, max(np.floor(top / step), 1.0) + 0.5) * step
