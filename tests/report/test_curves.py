"""Curves against hand counts, published figures, statsmodels, and simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rsrouter.core.errors import InputError
from rsrouter.report import curves
from tests.helpers.report_tables import make_table


def test_certified_accuracy_by_hand() -> None:
    # right at 0.5; right at exactly 1.0; wrong at 2.0; abstained; right with radius 0
    table = make_table("t", [0.5, 1.0, 2.0, 0.0, 0.0], [1, 1, 0, 0, 1], abstain=[False, False, False, True, False])
    curve = curves.certified_accuracy(table, [0.0, 0.25, 0.5, 0.75, 1.0, 1.25])
    assert curve.accuracy.tolist() == [0.6, 0.4, 0.4, 0.2, 0.2, 0.0]
    assert curve.images == 5
    assert curves.abstention_rate(table) == 0.2
    assert curves.average_certified_radius(table) == pytest.approx(1.5 / 5)
    share = curves.certified_share(table, [0.0, 1.5])
    assert share.accuracy.tolist() == [0.8, 0.2]


@pytest.mark.parametrize(("ours", "theirs"), [("clopper-pearson", "beta"), ("wilson", "wilson")])
def test_intervals_against_statsmodels(ours: str, theirs: str) -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for n, k in [(10, 0), (10, 10), (10, 3), (1000, 1), (10_000, 6570)]:
        low, high = curves.proportion_interval(k, n, confidence=0.95, method=ours)
        expected = proportion.proportion_confint(k, n, alpha=0.05, method=theirs)
        assert (float(low), float(high)) == pytest.approx(expected, abs=1e-10)


def test_clopper_pearson_never_undercovers() -> None:
    n = 40
    low, high = curves.proportion_interval(np.arange(n + 1), n, confidence=0.9)
    for p in np.linspace(0.01, 0.99, 33):
        inside = (low <= p) & (p <= high)
        assert stats.binom.pmf(np.arange(n + 1), n, p)[inside].sum() >= 0.9


def test_envelope_oracle_and_coverage_by_hand() -> None:
    a = make_table("a", [0.5, 0.5, 0.0, 0.0], [1, 1, 1, 0])
    b = make_table("b", [1.0, 0.2, 1.0, 3.0], [1, 0, 0, 0])
    routed = make_table("r", [1.0, 0.5, 0.0, 3.0], [1, 0, 0, 0])
    radii = [0.0, 0.5, 1.0, 2.0]
    assert curves.envelope([a, b], radii).tolist() == [0.75, 0.5, 0.25, 0.0]
    assert curves.oracle([a, b], radii).tolist() == [0.75, 0.5, 0.25, 0.0]
    assert curves.oracle([a, b], [0.7]).tolist() == [0.25]
    assert curves.oracle_choice([a, b]).tolist() == [1, 0, 0, -1]
    # routed: 1/4, 1/4, 1/4 against 3/4, 1/2, 1/4; where the envelope is 0 there is nothing to cover
    assert curves.coverage(routed, [a, b], radii) == pytest.approx((1 / 3 + 1 / 2 + 1) / 3)
    assert np.isnan(curves.coverage(routed, [a, b], [2.0]))


def test_tables_over_different_images_have_no_envelope() -> None:
    a, b = make_table("a", [1.0, 1.0], [1, 1]), make_table("b", [1.0, 1.0], [1, 1], idx=[0, 5])
    with pytest.raises(InputError, match="different images"):
        curves.envelope([a, b], [0.0])
    with pytest.raises(InputError, match="no expert"):
        curves.envelope([], [0.0])


def test_unknown_labels_have_no_accuracy() -> None:
    table = make_table("t", [1.0, 1.0], [1, -1])
    with pytest.raises(InputError, match="1 of 2 rows"):
        curves.certified_accuracy(table, [0.0])
    assert curves.certified_share(table, [0.5]).accuracy.tolist() == [1.0]


@pytest.mark.parametrize("radii", [[], [-0.1], [np.nan], [np.inf], "x"])
def test_radii_that_are_none(radii: object) -> None:
    table = make_table("t", [1.0], [1])
    with pytest.raises((InputError, ValueError)):
        curves.certified_accuracy(table, radii)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"confidence": 1.0}, {"confidence": np.nan}, {"interval": "wald"}])
def test_levels_and_intervals_that_are_none(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        curves.certified_accuracy(make_table("t", [1.0], [1]), [0.0], **change)  # type: ignore[arg-type]


def sampled(rng: np.random.Generator, n: int) -> tuple[object, object, object]:
    """Routed table and two experts, correlated over images."""
    easy = rng.uniform(size=n)
    tables = []
    for name, scale in (("routed", 1.0), ("a", 0.8), ("b", 0.7)):
        radius = scale * easy + 0.2 * rng.uniform(size=n)
        tables.append(make_table(name, radius, (rng.uniform(size=n) < 0.4 + 0.6 * easy).astype(int)))
    return tuple(tables)  # type: ignore[return-value]


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    routed, a, _ = sampled(np.random.default_rng(0), 4000)
    difference, low, high = curves.accuracy_difference(routed, a, [0.5], seed=1)  # type: ignore[arg-type]
    paired = curves.certified_correct(routed, [0.5]).astype(float) - curves.certified_correct(a, [0.5])  # type: ignore[arg-type]
    half = 1.96 * paired.std() / np.sqrt(len(paired))
    assert difference[0] == pytest.approx(paired.mean())
    assert high[0] - difference[0] == pytest.approx(half, rel=0.1)
    assert difference[0] - low[0] == pytest.approx(half, rel=0.1)


def test_coverage_interval_covers() -> None:
    radii = [0.0, 0.3, 0.6]
    routed, a, b = sampled(np.random.default_rng(99), 200_000)
    truth = curves.coverage(routed, [a, b], radii)  # type: ignore[arg-type, list-item]
    inside = 0
    for trial in range(200):
        routed, a, b = sampled(np.random.default_rng(trial), 300)
        low, high = curves.coverage_interval(routed, [a, b], radii, confidence=0.9, resamples=300, seed=trial)  # type: ignore[arg-type, list-item]
        inside += low <= truth <= high
    # percentile intervals of a ratio with a maximum below: allow two points of under-coverage, then the binomial test
    assert stats.binomtest(inside, 200, 0.88, alternative="less").pvalue > 1e-3


def test_coverage_difference_is_paired() -> None:
    rng = np.random.default_rng(3)
    expert = make_table("e", rng.uniform(0, 2, 400), [1] * 400)
    low = make_table("l", 0.6 * expert.radius, [1] * 400)
    high = make_table("h", np.maximum(expert.radius - 0.05, 0.0), [1] * 400)
    radii = [0.5, 1.0, 1.5]
    value, below, above = curves.coverage_difference(high, low, [expert], radii)
    assert value == pytest.approx(curves.coverage(high, [expert], radii) - curves.coverage(low, [expert], radii))
    assert below < value < above
    # the same images go into both: narrower than the two intervals laid side by side
    ends = [curves.coverage_interval(t, [expert], radii) for t in (high, low)]
    assert above - below < sum(b - a for a, b in ends)
    assert curves.coverage_difference(low, low, [expert], radii) == (0.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    routed, a, b = sampled(np.random.default_rng(1), 100)
    first, again, other = (curves.coverage_interval(routed, [a, b], [0.0, 0.5], seed=s) for s in (3, 3, 4))  # type: ignore[arg-type, list-item]
    assert first == again != other


@pytest.mark.parametrize(
    ("n", "alpha", "delta"), [(100, 0.001, 0.001), (10_000, 0.001, 0.001), (500, 0.05, 0.01), (3, 0.5, 0.2), (1, 0.001, 0.01)]
)
def test_wrong_certificates_is_the_smallest_valid_number(n: int, alpha: float, delta: float) -> None:
    q = curves.wrong_certificates(n, alpha, delta=delta)
    pmf = stats.binom.pmf(np.arange(n + 1), n, alpha)
    assert pmf[q + 1 :].sum() <= delta
    assert q == 0 or pmf[q:].sum() > delta
    markov = curves.wrong_certificates(n, alpha, delta=delta, independent=False)
    assert markov >= q
    assert n * alpha / (markov + 1) <= delta * (1 + 1e-12) or markov == n


def test_the_whole_tables_lower_bound_holds_in_simulation() -> None:
    # certificates of half of the images are wrong (claim a radius that is not true) with probability exactly alpha
    n, alpha, delta, rng = 400, 0.02, 0.05, np.random.default_rng(0)
    truly = np.arange(n) % 2 == 0
    population_truth = 0.5
    misses = {False: 0, True: 0}
    trials = 1500
    for _ in range(trials):
        drawn = rng.uniform(size=n) < population_truth
        for population, robust in ((False, truly), (True, drawn)):
            claims = robust | (rng.uniform(size=n) < alpha)
            table = make_table("t", np.where(claims, 1.0, 0.1), np.ones(n, int))
            low = curves.certified_lower(table, [0.5], alpha=alpha, delta=delta, population=population)[0]
            misses[population] += low > (population_truth if population else robust.mean())
    for count in misses.values():
        assert stats.binomtest(count, trials, delta, alternative="greater").pvalue > 1e-3


def test_the_whole_tables_lower_bound_by_hand() -> None:
    table = make_table("t", [1.0] * 50 + [0.2] * 50, [1] * 100)
    q = curves.wrong_certificates(100, 0.001, delta=0.001)
    assert curves.certified_lower(table, [0.0, 0.5, 2.0], alpha=0.001).tolist() == [(100 - q) / 100, (50 - q) / 100, 0.0]
    population = curves.certified_lower(table, [0.0, 0.5, 2.0], alpha=0.001, population=True)
    assert np.all(population <= [(100 - q) / 100, (50 - q) / 100, 0.0])


def test_the_populations_lower_bound_spends_half_of_delta_on_each_step() -> None:
    alpha, delta, table = 0.01, 1e-3, make_table("t", [1.0] * 50 + [0.2] * 50, [1] * 100)
    counts = np.arange(101)
    tail = stats.binom.sf(counts, 100, alpha)
    q, whole = int(counts[tail <= delta / 2][0]), int(counts[tail <= delta][0])
    assert q > whole
    # Clopper-Pearson by its definition: at the bound, so many successes or more have probability delta / 2
    bound = curves.certified_lower(table, [0.5], alpha=alpha, delta=delta, population=True)[0]
    assert stats.binom.sf(50 - q - 1, 100, bound) == pytest.approx(delta / 2, rel=1e-6)


def test_shares() -> None:
    table = make_table("t", [1.0, 0.5, 0.2, 0.0], [1, 1, 0, 0], abstain=[False, False, False, True], expert=["a", "b", "a", "a"])
    shares = curves.shares_by_radius(table.expert, table, [0.0, 0.5, 0.8])
    assert {k: v.tolist() for k, v in shares.items()} == {"a": [0.5, 0.25, 0.25], "b": [0.25, 0.25, 0.0]}


def test_the_least_ratio_by_hand() -> None:
    a, b = make_table("a", [0.5, 0.5, 0.5, 0.5], [1, 1, 1, 0]), make_table("b", [2.0, 2.0, 2.0, 2.0], [1, 1, 0, 0])
    routed = make_table("r", [2.0, 0.6, 0.6, 0.6], [1, 1, 1, 1])
    # envelope 3/4, 3/4, 2/4, none; routed 4/4, 4/4, 1/4
    assert curves.least_ratio(routed, [a, b], [0.0, 0.5, 1.0, 3.0]) == (0.5, 1.0)
    assert all(np.isnan(curves.least_ratio(routed, [a, b], [3.0])))


def test_default_radii() -> None:
    wide = make_table("t", np.linspace(0, 3.9, 1000).tolist(), [1] * 1000)
    assert curves.default_radii([wide]).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert curves.default_radii([make_table("t", [1.1] * 10, [1] * 10)]).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curves.default_radii([make_table("t", [0.0] * 10, [0] * 10)]).tolist() == [0, 0.25]
