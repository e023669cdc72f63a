"""Bounds: reference values, exact coverage, exact crossing probability, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from rsrouter.core import AlphaSplit, PlanError, binom_lower, binom_upper, sequence_lower, sequence_upper
from rsrouter.core.bounds import multiclass_bounds


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 1e-6])
@pytest.mark.parametrize("n", [1, 10, 100, 10_000, 100_000])
def test_agrees_with_statsmodels(n: int, alpha: float):
    k = np.unique(np.linspace(0, n, 23).astype(int))
    low, high = proportion_confint(k, n, alpha=2 * alpha, method="beta")
    lower, upper = binom_lower(k, n, alpha), binom_upper(k, n, alpha)
    np.testing.assert_allclose(lower, np.nan_to_num(low), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(upper, np.where(k == n, 1.0, high), rtol=1e-9)
    # towards the safe side, never beyond the reference
    assert np.all(lower <= np.nan_to_num(low))
    assert np.all(upper >= np.where(k == n, 1.0, high))


def test_published_values():
    lower = float(binom_lower(100_000, 100_000, 1e-3))
    assert lower == pytest.approx(1e-3 ** (1 / 100_000), rel=1e-11)
    assert stats.norm.ppf(lower) == pytest.approx(3.811457, abs=5e-7)
    assert binom_lower(50_490, 100_000, 1e-3) > 0.5 >= binom_lower(50_489, 100_000, 1e-3)


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("n", [1, 2, 10, 57, 300])
def test_coverage_is_exact_at_the_worst_proportions(n: int, alpha: float):
    """P(lower > p) only grows just below a value that the bound takes: sum the pmf there."""
    k = np.arange(n + 1)
    lower, upper = binom_lower(k, n, alpha), binom_upper(k, n, alpha)
    assert np.all(np.diff(lower) > 0)
    assert np.all(np.diff(upper) > 0)
    for p in [*np.nextafter(lower[1:], 0), *np.linspace(0.01, 0.99, 25)]:
        assert stats.binom.pmf(k[lower > p], n, p).sum() <= alpha * (1 + 1e-9)
    for p in [*np.nextafter(upper[:-1], 1), *np.linspace(0.01, 0.99, 25)]:
        assert stats.binom.pmf(k[upper < p], n, p).sum() <= alpha * (1 + 1e-9)


@pytest.mark.slow
def test_bound_inverts_the_binomial_tail_at_large_n():
    """The safety margin covers scipy's beta quantile: the tail at the bound is at most alpha."""
    rng = np.random.default_rng(5)
    for n in (10**3, 10**5, 10**6, 10**7, 10**8):
        k = np.unique(np.concatenate([rng.integers(1, n, 3000), np.arange(1, 50), n - np.arange(1, 50)]))
        for alpha in (1e-2, 1e-3, 1e-5, 1e-9):
            assert np.all(stats.binom.sf(k - 1, n, binom_lower(k, n, alpha)) <= alpha)
            assert np.all(stats.binom.cdf(k, n, binom_upper(k, n, alpha)) <= alpha)


def crossing_probability(p: np.ndarray, alpha: float, most: int) -> np.ndarray:
    """P(sequence_lower > p at some n <= most), exactly: the law of the count among paths that did not cross yet."""
    law = np.zeros((len(p), most + 2))
    law[:, 0] = 1.0
    crossed = np.zeros(len(p))
    edge = np.ones(len(p), dtype=int)  # smallest count that crosses, so far
    columns = np.arange(most + 2)
    for n in range(1, most + 1):
        stay = law * (1 - p[:, None])
        stay[:, 1:] += law[:, :-1] * p[:, None]
        law = stay
        while True:  # the boundary only grows with n
            free = (edge <= n) & ~(sequence_lower(np.minimum(edge, n), n, alpha) > p)
            if not free.any():
                break
            edge = edge + free
        out = columns[None, :] >= edge[:, None]
        crossed += np.where(out, law, 0.0).sum(1)
        law = np.where(out, 0.0, law)
    return crossed


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_sequence_never_crosses_more_often_than_alpha(alpha: float):
    p = np.array([0.02, 0.3, 0.5, 0.77, 0.95, 0.99])
    crossed = crossing_probability(p, alpha, 150)
    assert np.all(crossed <= alpha)
    assert crossed.max() > 0.1 * alpha  # the test can fail: the bound is not vacuous


@pytest.mark.slow
def test_sequence_never_crosses_more_often_than_alpha_up_to_3000():
    p = np.array([0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999])
    for alpha in (1e-3, 0.05):
        crossed = crossing_probability(p, alpha, 3000)
        print("\nsequence, alpha", alpha, "crossing probability up to n = 3000:", np.round(crossed, 6))
        assert np.all(crossed <= alpha)


def test_planted_mistake_repeated_clopper_pearson_crosses_too_often():
    p, n, alpha = 0.9, 400, 0.05
    law, crossed = np.zeros(n + 2), 0.0
    law[0] = 1.0
    for m in range(1, n + 1):
        law[1:] = law[1:] * (1 - p) + law[:-1] * p
        law[0] *= 1 - p
        out = binom_lower(np.minimum(np.arange(n + 2), m), m, alpha) > p
        crossed += law[out].sum()
        law[out] = 0.0
    assert crossed > 3 * alpha


def test_sequence_is_monotone_symmetric_and_a_little_wider():
    k = np.arange(0, 1001, 50)
    low, high = sequence_lower(k, 1000, 1e-3), sequence_upper(k, 1000, 1e-3)
    assert np.all(np.diff(low) > 0)
    np.testing.assert_allclose(high, 1 - sequence_lower(1000 - k, 1000, 1e-3), rtol=1e-11)
    assert np.all(low <= binom_lower(k, 1000, 1e-3))
    assert np.all(high >= binom_upper(k, 1000, 1e-3))
    # derived value: 3.773 sigma at n = 1e5, every vote for one class
    assert stats.norm.ppf(sequence_lower(100_000, 100_000, 1e-3)) == pytest.approx(3.773, abs=6e-4)


@pytest.mark.parametrize("bound", [binom_lower, binom_upper, sequence_lower, sequence_upper])
@pytest.mark.parametrize(
    ("k", "n", "alpha"),
    [
        (np.nan, 10, 0.1),
        (1, np.nan, 0.1),
        (1, 0, 0.1),
        (0, 0, 0.1),
        (-1, 10, 0.1),
        (11, 10, 0.1),
        (1.5, 10, 0.1),
        (np.inf, 10, 0.1),
        (1, 10, 0.0),
        (1, 10, 1.0),
        (1, 10, np.nan),
        (1, 10, -0.1),
    ],
)
def test_bad_counts_and_levels_are_refused(bound, k, n, alpha):
    with pytest.raises(PlanError):
        bound(k, n, alpha)


def test_multiclass_bounds_match_the_derived_radii():
    from rsrouter.core import vote_radius

    n = 100_000
    for shares, radius in (
        ((0.8, 0.2), 0.8267),
        ((0.6, 0.3, *[0.0125] * 8), 0.375),
        ((0.8, *[0.2 / 9] * 9), 1.404),
        ((0.45, *[0.55 / 9] * 9), 0.693),
    ):
        counts = np.round(np.array(shares) * n).astype(int)[None]
        counts[0, 0] += n - counts.sum()
        lower, upper = multiclass_bounds(counts, [0], 1e-3, lower_share=0.5)
        assert vote_radius(1.0, lower, upper)[0] == pytest.approx(radius, abs=2e-3)
    for bad in ([[5, 5]], [[5]], 5):
        with pytest.raises(PlanError):
            multiclass_bounds(np.array(bad), [2], 1e-3)
    with pytest.raises(PlanError):
        multiclass_bounds(np.array([[5, -1]]), [0], 1e-3)


def test_multiclass_bounds_cover_jointly():
    """P(lower > p_top or upper < p_rival) by enumerating a trinomial with near-tied rivals."""
    n, alpha, p = 30, 0.05, np.array([0.4, 0.3, 0.3])
    grid = np.array([(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)])
    weight = stats.multinomial.pmf(grid, n, p)
    lower, upper = multiclass_bounds(grid, np.zeros(len(grid), int), alpha)
    assert weight[(lower > p[0]) | (upper < p[1])].sum() <= alpha


def test_alpha_split_cannot_be_overspent():
    paths = (("r", "a"), ("r", "b", "c"))
    even = AlphaSplit.even(1e-3, paths)
    assert even.stages["r"] == pytest.approx(1e-3 / 3)
    assert even.stages["a"] == pytest.approx(1e-3 / 2)
    AlphaSplit(1e-3, {"r": 5e-4, "a": 5e-4, "b": 2e-4, "c": 3e-4}, paths)
    rest = {"a": 1e-4, "b": 1e-4, "c": 1e-4}
    missing = {"r": 5e-4, "a": 5e-4, "b": 2e-4}
    for stages in ({"r": 5e-4, **rest, "a": 5.1e-4}, missing, {"r": np.nan, **rest}, {"r": -1e-4, **rest}):
        with pytest.raises(PlanError):
            AlphaSplit(1e-3, stages, paths)
    with pytest.raises(PlanError):
        AlphaSplit(1e-3, {}, ())
    given = {"r": 5e-4, "a": 5e-4, "b": 2e-4, "c": 3e-4}
    split = AlphaSplit(1e-3, given, paths)
    given["a"] = 0.5
    assert split.stages["a"] == 5e-4
