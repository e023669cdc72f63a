"""The planner's figures against published and derived ones."""

from __future__ import annotations

import numpy as np
import pytest

from rsrouter.core import AdaptivePlan, FixedPlan, PlanError
from rsrouter.core.budget import (
    budget_table,
    expected_votes,
    largest_radius,
    mean_radius_ratio,
    mean_radius_ratio_approx,
    smallest_certifying_count,
    votes_needed,
)


def test_published_figures():
    for n, radius in ((10**5, 3.81), (10**4, 3.20), (10**3, 2.46), (10**2, 1.50)):
        assert largest_radius(1.0, n) == pytest.approx(radius, abs=6e-3)
    assert smallest_certifying_count(100_000) == 50_490
    assert smallest_certifying_count(9) is None
    # mean over p ~ U[1/2, 1], count at floor(n p), against infinitely many votes
    for n, ratio in ((10**5, 0.981), (10**4, 0.938), (10**3, 0.809), (10**2, 0.453)):
        assert mean_radius_ratio(n, at_mean_count=True) == pytest.approx(ratio, abs=1e-3)
        assert mean_radius_ratio(n) >= mean_radius_ratio(n, at_mean_count=True)
    assert mean_radius_ratio_approx(10_000) == pytest.approx(1 - 2.02 * 3.0902 / 100, abs=1e-3)
    assert mean_radius_ratio_approx(100_000) == pytest.approx(mean_radius_ratio(100_000), abs=1e-3)


def test_mean_radius_by_simulation():
    from rsrouter.core import binom_lower, vote_radius

    rng = np.random.default_rng(0)
    k = rng.binomial(500, rng.uniform(0.5, 1.0, 200_000))
    simulated = vote_radius(1.0, binom_lower(np.arange(501), 500, 1e-3))[k].mean() / np.sqrt(2 / np.pi)
    assert mean_radius_ratio(500) == pytest.approx(simulated, abs=5e-3)
    assert mean_radius_ratio(500, 5000) > mean_radius_ratio(500)


@pytest.mark.parametrize(("sigma", "radius"), [(0.25, 0.0), (0.25, 0.5), (1.0, 3.8), (0.5, 1.0)])
def test_votes_needed_is_the_smallest(sigma: float, radius: float):
    n = votes_needed(sigma, radius)
    assert largest_radius(sigma, n) >= radius
    assert largest_radius(sigma, n) > 0
    assert not (largest_radius(sigma, n - 1) >= radius and largest_radius(sigma, n - 1) > 0)


def test_votes_needed_gives_up():
    assert votes_needed(0.25, 10.0) is None
    # between the largest power of two below 10^12 and 10^12 itself there is still an answer, beyond there is none
    reach = largest_radius(1.0, 10**12)
    assert 2**39 < votes_needed(1.0, largest_radius(1.0, 9 * 10**11)) <= 9 * 10**11
    assert votes_needed(1.0, reach) <= 10**12
    assert votes_needed(1.0, np.nextafter(reach, 9.0)) is None
    assert votes_needed(1.0, 0.0) == 10


def test_expected_votes():
    plan = AdaptivePlan(4000, [0.25, 0.5])
    (fixed,) = expected_votes(FixedPlan(100, 4000), 0.9, 0.5, runs=20)
    assert fixed == 4000
    sure, border, hopeless = expected_votes(plan, [0.999, 0.69, 0.3], 0.5, runs=100)
    assert sure < 1000
    assert hopeless < 1000
    assert border > 1500


def test_table():
    table = budget_table(0.5, (100, 1000), radii=(0.25, 1.0), simulate=True)
    assert [row.n for row in table.rows] == [100, 1000]
    assert table.needed == ((0.25, votes_needed(0.5, 0.25)), (1.0, 301))
    assert 0 < table.rows[1].adaptive_votes <= 1000
    assert table.rows[0].mean_ratio < table.rows[1].mean_ratio < 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: largest_radius(1.0, 0),
        lambda: largest_radius(np.nan, 10),
        lambda: votes_needed(1.0, np.nan),
        lambda: votes_needed(1.0, -1.0),
        lambda: mean_radius_ratio(10, 5),
        lambda: expected_votes(FixedPlan(), 1.5, 0.5),
        lambda: largest_radius(1.0, 10, 1.0),
    ],
)
def test_bad_input(call):
    with pytest.raises(PlanError):
        call()
