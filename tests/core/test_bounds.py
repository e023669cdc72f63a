"""Bounds: reference values, exact coverage, exact crossing probability, refusals."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, optimize, stats
from statsmodels.stats.proportion import proportion_confint

from rsrouter.core import AlphaSplit, PlanError, binom_lower, binom_upper, sequence_lower, sequence_upper
from rsrouter.core.bounds import LinearSpending, check_counts, multiclass_bounds


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


@pytest.mark.parametrize("bound", [binom_lower, binom_upper])
def test_equal_entries_are_computed_once_and_get_their_own_values(bound):
    rng = np.random.default_rng(3)
    n = rng.choice([1, 40, 3000], (30, 40))
    k, alpha = rng.integers(0, n + 1), rng.choice([1e-3, 2e-3, 0.05], 40)
    one_by_one = [[float(bound(k[i, j], n[i, j], alpha[j])) for j in range(40)] for i in range(30)]
    np.testing.assert_array_equal(bound(k, n, alpha), one_by_one)


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


def integrated_log_e_value(s: int, n: int, p: float) -> float:
    """Log of the likelihood ratio of s in n against p, averaged over q > p under the arcsine law: q = sin^2 t, t uniform."""

    def log_ratio(t: float) -> float:
        q = np.sin(t) ** 2
        return float(s * np.log(q / p) + ((n - s) * np.log((1 - q) / (1 - p)) if s < n else 0.0))

    start, end, peak = np.arcsin(np.sqrt(p)), np.pi / 2, np.arcsin(np.sqrt(s / n))
    most = log_ratio(peak)
    width = 8 / (2 * np.sqrt(n))
    edges = sorted({start, end, *(float(np.clip(peak + k * width, start, end)) for k in (-1, 0, 1))})
    parts = [
        integrate.quad(lambda t: np.exp(log_ratio(t) - most), a, b, epsabs=0, epsrel=1e-11, limit=200)[0]
        for a, b in pairwise(edges)
    ]
    return float(most + np.log(sum(parts) / (end - start)))


@pytest.mark.parametrize(
    ("s", "n", "alpha"), [(7, 10, 0.05), (1, 3, 0.3), (10, 10, 0.01), (60, 100, 1e-3), (3, 400, 1e-2), (950, 1000, 1e-3)]
)
def test_sequence_is_where_the_mixture_integrated_numerically_reaches_one_over_alpha(s: int, n: int, alpha: float):
    expected = optimize.brentq(lambda p: integrated_log_e_value(s, n, p) + np.log(alpha), 1e-9, (s - 0.5) / n, xtol=1e-13)
    found = float(sequence_lower(s, n, alpha))
    assert found == pytest.approx(expected, rel=3e-6)  # the level is tightened by 1e-6
    assert found < expected
    assert float(sequence_upper(n - s, n, alpha)) == pytest.approx(1 - expected, rel=3e-6)


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_sequence_stays_below_the_count_less_a_half(n: int):
    """With hardly any confidence asked for, the mixture alone would go higher than where it is proved to fall."""
    cap = (n - 0.5) / n
    assert float(sequence_lower(n, n, 0.99)) < cap
    assert float(sequence_lower(n, n, 0.99)) == pytest.approx(cap, rel=2e-12)
    assert float(sequence_lower(0, n, 0.99)) == 0.0
    assert float(sequence_upper(n, n, 0.99)) == 1.0
    assert 1 - cap < float(sequence_upper(0, n, 0.99)) == pytest.approx(1 - cap, abs=3e-12)


def test_bounds_broadcast_and_keep_their_shape():
    k, n = np.array([[3], [4]]), np.array([5, 10, 20])
    for bound in (binom_lower, binom_upper, sequence_lower, sequence_upper):
        found = bound(k, n, 0.05)
        assert found.shape == (2, 3)
        assert found.dtype == np.float64
        for i in range(2):
            for j in range(3):
                assert found[i, j] == bound(int(k[i, 0]), int(n[j]), 0.05)
        assert bound(3.0, 10.0, "0.05") == bound(3, 10, 0.05)
        assert bound(3, 10, [0.05, 0.1]).shape == (2,)
        assert bound(np.uint8(3), np.int16(10), 0.05) == bound(3, 10, 0.05)


def test_counts_stay_exact_where_floats_do_not():
    for k in (2**53 + 1, np.uint64(2**53 + 1)):
        with pytest.raises(PlanError) as refused:
            check_counts(k, 10)
        assert str(2**53 + 1) in str(refused.value)


@pytest.mark.parametrize("bound", [binom_lower, binom_upper, sequence_lower, sequence_upper])
def test_no_bound_from_more_votes_than_its_quantile_is_good_for(bound):
    n = 10**12
    found = float(bound(n // 10 * 9, n, 1e-3))
    assert (found < 0.9) == (bound in (binom_lower, sequence_lower))
    with pytest.raises(PlanError, match="More votes"):
        bound(n // 10 * 9, n + 1, 1e-3)


@pytest.mark.parametrize("alpha", [1e-3, 1e-5])
def test_at_the_most_votes_the_margins_cover_the_quantiles_error(alpha: float):
    """There the binomial law is normal to many digits."""
    n = 10**12
    k = np.round(np.linspace(0.01, 0.99, 197) * n).astype(np.int64)
    spread = np.sqrt(k / n * (1 - k / n) / n)
    for gap in (k / n - binom_lower(k, n, alpha), binom_upper(k, n, alpha) - k / n):
        assert np.all(gap / spread > stats.norm.isf(alpha))
        assert np.all(gap / spread < stats.norm.isf(alpha) + 0.02)


def test_the_level_is_tightened_where_a_quantiles_last_bit_moves_the_tail():
    """An ulp of the quantile is worth more of alpha the more votes there are."""
    k, n, alpha = 9 * 10**6, 10**7, 1e-3
    for found, law in (
        (binom_lower(k, n, alpha), stats.beta(k, n - k + 1)),
        (binom_upper(k, n, alpha), stats.beta(k + 1, n - k)),
    ):
        exact = law.ppf(alpha) if found < 0.9 else law.isf(alpha)
        beyond = abs(float(found) - exact) - 1e-12 * exact
        assert beyond == pytest.approx(3e-14 * n * alpha / law.pdf(exact), rel=0.05)


def test_refusals_name_what_was_wrong():
    for k, n, received in (
        (1.5, 10, "k = 1.5"),
        (1, np.inf, "n = inf"),
        ([3, 4], [5, -2], "n = -2"),
        ([-1, 4], 9, "[-1, 4]"),
        (7, [5, 9], "[5, 9]"),
    ):
        with pytest.raises(PlanError) as refused:
            binom_lower(k, n, 0.1)
        assert received in str(refused.value)
    for share in (0.0, 1.0, np.nan):
        with pytest.raises(PlanError, match=r"^lower_share"):
            multiclass_bounds(np.array([[5, 5]]), [0], 1e-3, lower_share=share)
        with pytest.raises(PlanError, match=r"^lower_share"):
            AlphaSplit(1e-3, {"r": 1e-3}, (("r",),), share)
    with pytest.raises(PlanError, match=r"^alpha must"):
        AlphaSplit(1.5, {"r": 1e-3}, (("r",),))
    with pytest.raises(PlanError, match="alpha = 'much'"):
        binom_lower(1, 2, "much")


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


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_multiclass_bounds_by_hand(share: float):
    """Row by row from beta quantiles: the top's lower bound, and the best rival's upper bound or what is left over."""
    alpha, top = 0.01, [0, 2, 1]
    counts = np.array([[90, 6, 4], [10, 30, 60], [0, 100, 0]])
    lower, upper = multiclass_bounds(counts, top, alpha, lower_share=share)
    for row, chosen, low, high in zip(counts, top, lower, upper, strict=True):
        n, rival = int(row.sum()), int(np.delete(row, chosen).max())
        p = stats.beta.ppf(alpha * share, row[chosen], n - row[chosen] + 1)
        q = stats.beta.isf(alpha * (1 - share), rival + 1, n - rival)
        assert low == pytest.approx(p, rel=1e-10)
        assert high == pytest.approx(min(q, 1 - p), rel=1e-9)
    assert lower[0] + upper[0] <= 1.0
    default = multiclass_bounds(counts, top, alpha)
    np.testing.assert_array_equal(default, multiclass_bounds(counts, top, alpha, lower_share=0.9))


@pytest.mark.parametrize(
    ("counts", "top"),
    [
        ([[5, 5], [5, 5]], [0]),
        ([[5, 5]], [0, 0]),
        ([[5, 5]], [0.0]),
        ([[5], [5]], [0, 0]),
        ([[[5, 5]]], [0]),
        ([[5, 5]], [-1]),
        ([[5, 5], [5, 5]], [1, 2]),
        ([[5, 5]], [True]),
    ],
)
def test_votes_and_tops_that_do_not_fit_are_refused(counts, top):
    with pytest.raises(PlanError, match=r"do not fit|does not exist"):
        multiclass_bounds(np.array(counts), top, 1e-3)
    assert len(multiclass_bounds(np.array([[5, 5]]), np.uint8(0), 1e-3)[0]) == 1


def test_multiclass_bounds_cover_jointly():
    """P(lower > p_top or upper < p_rival) by enumerating a trinomial with near-tied rivals."""
    n, alpha, p = 30, 0.05, np.array([0.4, 0.3, 0.3])
    grid = np.array([(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)])
    weight = stats.multinomial.pmf(grid, n, p)
    lower, upper = multiclass_bounds(grid, np.zeros(len(grid), int), alpha)
    assert weight[(lower > p[0]) | (upper < p[1])].sum() <= alpha


@pytest.mark.parametrize("looks", [(100,), (20, 50), (20, 50, 100, 160)])
@pytest.mark.parametrize("last_share", [0.4, 0.75])
def test_linear_spending_is_its_definition_look_by_look(looks: tuple[int, ...], last_share: float):
    """Every count, by scipy's quantiles: the level of the look alone where that stays below what an earlier look could
    reject, else the better of that edge and of everything due by then."""
    spending, levels = LinearSpending(looks, last_share), (1e-3, 0.05)
    due = [(1.0 - last_share) * n / looks[-1] for n in looks[:-1]] + [1.0]
    counts, totals, alphas, wanted = [], [], [], []
    for at, n in enumerate(looks):
        for alpha in levels:
            for k in range(n + 1):

                def bound(level: float, k: int = k, n: int = n) -> float:
                    return float(stats.beta.ppf(level, k, n - k + 1)) if k else 0.0

                low = bound(alpha * (due[at] - (due[at - 1] if at else 0.0)))
                if at and not low < (edge := (alpha * due[at - 1]) ** (1 / looks[at - 1])):
                    low = max(edge, bound(alpha * due[at]))
                counts, totals = [*counts, k], [*totals, n]
                alphas, wanted = [*alphas, alpha], [*wanted, low]
    k, n, alpha, low = (np.array(column) for column in (counts, totals, alphas, wanted))
    for _ in range(2):  # the edges of a level are kept
        found = spending.lower(k, n, alpha)
        np.testing.assert_allclose(found, low, rtol=1e-9)
        assert np.all(found <= low)
        found = spending.upper(n - k, n, alpha)
        np.testing.assert_allclose(found, 1.0 - low, rtol=1e-9, atol=1e-12)
        assert np.all(found >= (1.0 - low) * (1.0 - 1e-15))
    assert spending.lower(3, looks[0], 0.05).shape == spending.upper(3, looks[0], 0.05).shape == ()
    for bad in (looks[0] - 1, looks[-1] + 1):
        for refused in (spending.lower, spending.upper):
            with pytest.raises(PlanError):
                refused(1, bad, 0.05)
            with pytest.raises(PlanError):
                refused([1, 1], [looks[0], bad], 0.05)


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
    # one path that is fine does not excuse the next
    with pytest.raises(PlanError, match="spend more"):
        AlphaSplit(1e-3, {"r": 5e-4, "a": 5e-4, "b": 4e-4, "c": 4e-4}, paths)
    with pytest.raises(PlanError, match=r"an alpha for \['c'\]"):
        AlphaSplit(1e-3, missing, paths)
    with pytest.raises(PlanError, match=r"^a stage's alpha"):
        AlphaSplit(1e-3, {"r": 0.0, **rest}, paths)
    for total, named in ((0.0, "alpha must"), (1.0, "alpha must")):
        with pytest.raises(PlanError, match=named):
            AlphaSplit.even(total, paths)
    # sums are exact up to the rounding of their last bits
    tenth = AlphaSplit(0.3, {"r": 0.1, "a": 0.2}, (("r", "a"),))
    assert tenth.lower_share == 0.9
    assert AlphaSplit.even(0.3, (("r", "a"),), 0.5).lower_share == 0.5
    # the longest path through a stage counts, in whatever order the paths come
    assert AlphaSplit.even(1e-3, paths[::-1]).stages == even.stages
    with pytest.raises(PlanError, match="spend more"):
        AlphaSplit(1e-3, {"r": 1e-3 * (1 + 1e-11)}, (("r",),))
    given = {"r": 5e-4, "a": 5e-4, "b": 2e-4, "c": 3e-4}
    split = AlphaSplit(1e-3, given, paths)
    given["a"] = 0.5
    assert split.stages["a"] == 5e-4
