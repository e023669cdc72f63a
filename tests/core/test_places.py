"""Clopper-Pearson for votes that are independent but not identically distributed: exact coverage of the mean (THEORY.md, 5)."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from rsrouter.core.bounds import binom_lower, binom_upper

ALPHAS = (0.001, 0.01, 0.05, 0.25)


def successes(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(S = k) for k = 0 ... n, S the number of successes of independent trials with probabilities p."""
    pmf = np.zeros(len(p) + 1)
    pmf[0] = 1.0
    for x in p:
        pmf[1:] = pmf[1:] * (1 - x) + pmf[:-1] * x
        pmf[0] *= 1 - x
    return pmf


def misses(p: NDArray[np.float64], alpha: float) -> tuple[float, float]:
    """How often the lower bound exceeds the mean of p, and how often the upper bound is below it."""
    n, mean, pmf = len(p), p.mean(), successes(p)
    k = np.arange(n + 1)
    return float(pmf[binom_lower(k, n, alpha) > mean].sum()), float(pmf[binom_upper(k, n, alpha) < mean].sum())


def probabilities() -> list[NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    found: list[NDArray[np.float64]] = []
    for n in (2, 3, 7, 20, 60):
        for mean in (0.5 / n, 1 / n, 1.5 / n, 0.1, 0.5, 0.9, 1 - 1 / n):
            found.append(np.full(n, mean))
            # certain successes and failures, and one trial between them
            sure = np.zeros(n)
            sure[: int(n * mean)] = 1.0
            sure[-1] = max(0.0, min(1.0, n * mean - int(n * mean)))
            found.append(sure)
            for _ in range(20):
                spread = rng.uniform(0.05, 5)
                found.append(rng.beta(mean * spread, (1 - mean) * spread, n))
                low, high = sorted(rng.uniform(0, 1, 2))
                found.append(np.where(rng.uniform(size=n) < mean, high, low))
    return found


@pytest.mark.parametrize("alpha", ALPHAS)
def test_bounds_on_the_mean_hold_where_the_theorem_says(alpha: float) -> None:
    worst, strict = 0.0, 0
    for p in probabilities():
        n, mean = len(p), p.mean()
        low, high = misses(p, alpha)
        if mean >= 1 / n:
            assert low <= alpha * (1 + 1e-9)
            worst, strict = max(worst, low), strict + 1
        if mean <= 1 - 1 / n:
            assert high <= alpha * (1 + 1e-9)
        assert max(low, high) <= -np.log1p(-alpha) * (1 + 1e-9)
    assert strict > 1000
    assert worst > alpha / 2  # the check is near the level, so that it can fail


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", [3, 20, 60])
def test_below_one_success_in_n_the_bound_may_fail_a_little_more_often(alpha: float, n: int) -> None:
    """Why the theorem names a condition: all of a small mean in one trial."""
    p = np.zeros(n)
    p[0] = n * -np.expm1(np.log1p(-alpha) / n) * (1 - 1e-6)
    low, _ = misses(p, alpha)
    assert alpha < low <= -np.log1p(-alpha)
    # what certifies anything needs two successes
    assert successes(p)[2:].sum() <= alpha
    assert binom_lower(1, n, alpha) < binom_upper(0, n, alpha)


def test_votes_that_hang_together_break_it() -> None:
    """Independence is what it needs: by one coin for all, the bound fails far more often than alpha."""
    n, alpha = 60, 0.05
    both = np.zeros(n + 1)
    both[[0, n]] = 0.5
    assert both[binom_lower(np.arange(n + 1), n, alpha) > 0.5].sum() == 0.5
