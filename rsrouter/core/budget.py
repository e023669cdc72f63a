"""Planning before any vote is drawn: reachable radii, needed votes, the price of drawing fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rsrouter.core.bounds import MOST_VOTES, AlphaSplit, Array, binom_lower, check_alpha, check_whole
from rsrouter.core.certificates import vote_radius
from rsrouter.core.certify import CertifyPolicy
from rsrouter.core.errors import PlanError
from rsrouter.core.plans import AdaptivePlan, Plan
from rsrouter.core.tree import Stage, Tree


def largest_radius(sigma: float, n: int, alpha: float = 1e-3) -> float:
    """Radius of `n` unanimous votes: `sigma * Phi^-1(alpha ** (1 / n))`, one-sided; 0 where it is not above 1/2.

    Args:
        sigma: noise level in [0,1]-pixel units.
        n: estimation votes.
        alpha: failure probability.

    Raises:
        PlanError: n below 1, alpha outside (0, 1), no usable sigma.
    """
    n = check_whole("n", n, 1)
    return float(vote_radius(sigma, binom_lower(n, n, alpha)))


def votes_needed(sigma: float, radius: float, alpha: float = 1e-3) -> int | None:
    """Smallest n for which unanimous votes certify `radius` (one-sided); None beyond 10**12 votes.

    About `log alpha / log Phi(radius / sigma)`, found by bisection on `largest_radius`, rounding included. A radius
    of 0 asks for any radius above 0.
    """
    largest_radius(sigma, 1, alpha)
    if not (np.isfinite(radius) and radius >= 0):
        raise PlanError(
            "A wanted radius must be a finite number",
            expected="radius >= 0",
            received=repr(radius),
            remedy="give an L2 radius in [0,1]-pixel units",
        )
    if not -np.log(alpha) < MOST_VOTES * -special.log_ndtr(radius / sigma):
        return None

    def enough(n: int) -> bool:
        reached = largest_radius(sigma, n, alpha)
        return reached >= radius and reached > 0.0

    low, high = 0, 1
    while not enough(high):
        if high == MOST_VOTES:
            return None
        low, high = high, min(2 * high, MOST_VOTES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def smallest_certifying_count(n: int, alpha: float = 1e-3) -> int | None:
    """Fewest votes of `n` for the top class that certify any radius (one-sided); None where even n do not.

    50,490 at n = 100,000 and alpha = 0.001.
    """
    low, high = check_whole("n", n, 1) // 2, n
    if not binom_lower(n, n, alpha) > 0.5:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if binom_lower(middle, n, alpha) > 0.5 else (middle, high)
    return high


@cache
def _mean_radius(n: int, alpha: float, at_mean_count: bool) -> float:
    """Mean one-sided radius at sigma 1, exact Clopper-Pearson, vote share p ~ U[1/2, 1].

    The count k of n then has probability `2 P(Beta(k + 1, n - k + 1) > 1/2) / (n + 1)`; `floor(n p)` is uniform.
    """
    if at_mean_count:
        k = np.arange(n // 2, n)
        weight = np.diff(np.maximum(np.arange(n // 2, n + 1) / n, 0.5)) * 2.0
    else:
        k = np.arange(0, n + 1)
        weight = 2.0 * special.betaincc(k + 1.0, n - k + 1.0, 0.5) / (n + 1.0)
    return float(np.sum(weight * vote_radius(1.0, binom_lower(k, n, alpha))))


def mean_radius_ratio(n: int, n_ref: int | None = None, alpha: float = 1e-3, *, at_mean_count: bool = False) -> float:
    """Mean certified radius with `n` votes over that with `n_ref`, for a vote share uniform on [1/2, 1].

    Exact: Clopper-Pearson bounds, summed over the counts. The ratio does not depend on sigma. Seferis et al. 2024
    (arXiv 2404.17371) ask this question; `mean_radius_ratio_approx` is their answer.

    Args:
        n: estimation votes.
        n_ref: votes of the reference; None is infinitely many, where the mean radius is sigma times
            `2 * integral of Phi^-1 over [1/2, 1] = sqrt(2 / pi)`.
        alpha: failure probability.
        at_mean_count: take the count to be `floor(n p)`, without its sampling noise (a little lower at small n).
    """
    check_alpha(alpha)
    n = check_whole("n", n, 1)
    reference = float(np.sqrt(2.0 / np.pi))
    if n_ref is not None:
        reference = _mean_radius(check_whole("n_ref", n_ref, 1), float(alpha), at_mean_count)
    if not reference > 0.0:
        raise PlanError(
            "The reference certifies nothing",
            expected="an n_ref with a positive mean radius",
            received=f"n_ref = {n_ref}",
            remedy="alpha = 0.001 needs at least 10 votes",
        )
    return _mean_radius(n, float(alpha), at_mean_count) / reference


def mean_radius_ratio_approx(n: int, alpha: float = 1e-3) -> float:
    """`1 - 2.02 z_alpha / sqrt(n)`: the same against infinitely many votes, by the normal approximation of the bound.

    Seferis et al. 2024 expand `R(n) = sigma (Phi^-1(p) - z_alpha sqrt(p (1-p) / n) / phi(Phi^-1(p)))`; averaged
    over p ~ U[1/2, 1] the loss is `z_alpha / sqrt(n)` times `2 * integral of sqrt(p (1-p)) dz` over z > 0, divided by
    `sqrt(2 / pi)`. Good to a per cent from n = 1,000 on.
    """
    check_alpha(alpha)
    z = np.linspace(0.0, 12.0, 24_001)
    integral = 2.0 * np.trapezoid(np.sqrt(special.ndtr(z) * special.ndtr(-z)), z)
    return float(1.0 + special.ndtri(alpha) * integral / np.sqrt(2.0 / np.pi) / np.sqrt(check_whole("n", n, 1)))


def expected_votes(plan: Plan, share: ArrayLike, sigma: float, alpha: float = 1e-3, *, runs: int = 1000, seed: int = 0) -> Array:
    """Mean estimation votes of `plan` on a one-stage classifier, per vote share of the top class.

    By simulation: the real `CertifyPolicy` decides on `runs` binomial vote streams per share (one-sided bounds,
    the top class selected).

    Args:
        plan: the plan.
        share: true vote share of the top class, one or several.
        sigma: noise level.
        alpha: failure probability.
        runs: simulated images per share; the standard error is at most `n_max / (2 sqrt(runs))`.
        seed: of the simulation.

    Returns:
        float64 array, one mean per share.
    """
    shares = np.atleast_1d(np.asarray(share, dtype=np.float64))
    if not np.all((shares >= 0.0) & (shares <= 1.0)):
        raise PlanError(
            "A vote share must lie between 0 and 1",
            expected="0 <= share <= 1",
            received=repr(share),
            remedy="give the probability of the top class under noise",
        )
    runs = check_whole("runs", runs, 1)
    rng = np.random.default_rng(seed)
    tree = Tree.of([Stage("vote", sigma, leads_to=(0, 1))])
    p = np.repeat(shares, runs)
    policy = CertifyPolicy(tree, plan, AlphaSplit.even(alpha, tree.paths), len(p), sides="one")
    while not policy.done.all():
        requests = policy.next_requests(np.flatnonzero(~policy.done).tolist())
        images = np.array([r.image for r in requests])
        drawn = np.array([r.count for r in requests])
        select = np.array([r.purpose == "select" for r in requests])
        top = np.where(select, drawn, rng.binomial(drawn, p[images]))
        policy.update(requests, [{"vote": row} for row in np.stack([top, drawn - top], axis=1)])
    votes = np.array([policy.drawn(i) - plan.n0 for i in range(len(p))], dtype=np.float64)
    return np.asarray(votes.reshape(len(shares), runs).mean(axis=1))


@dataclass(frozen=True)
class BudgetRow:
    """What one budget buys at one noise level.

    Attributes:
        n: estimation votes.
        largest_radius: radius of unanimous votes.
        mean_ratio: mean radius relative to the reference budget, vote share uniform on [1/2, 1].
        smallest_count: fewest votes for the top class that certify anything; None where n is too small.
        adaptive_votes: mean estimation votes of an adaptive plan with this n_max, vote shares uniform on
            [1/2, 1]; None unless asked for.
    """

    n: int
    largest_radius: float
    mean_ratio: float
    smallest_count: int | None
    adaptive_votes: float | None = None


@dataclass(frozen=True)
class BudgetTable:
    """Budgets side by side, and the votes that wanted radii need; see `budget_table`."""

    sigma: float
    alpha: float
    n_ref: int
    rows: tuple[BudgetRow, ...]
    needed: tuple[tuple[float, int | None], ...]


def budget_table(
    sigma: float,
    ns: Sequence[int] = (100, 1_000, 10_000, 100_000),
    alpha: float = 1e-3,
    *,
    radii: Sequence[float] = (),
    n_ref: int = 100_000,
    simulate: bool = False,
    seed: int = 0,
) -> BudgetTable:
    """What each budget in `ns` buys at noise level `sigma`, and the votes that each radius in `radii` needs.

    Args:
        sigma: noise level in [0,1]-pixel units.
        ns: estimation votes.
        alpha: failure probability of one stage (a routed path divides its alpha among its stages).
        radii: wanted radii; also the grid of the simulated adaptive plan (default: multiples of sigma / 2).
        n_ref: the budget that mean radii are compared with.
        simulate: also simulate an adaptive plan per budget (a second or so each).
        seed: of the simulation.

    Raises:
        PlanError: an argument that cannot work.
    """
    rows = []
    for n in ns:
        top = largest_radius(sigma, n, alpha)
        votes = None
        if simulate and top > 0.0:
            wanted = [r for r in (radii or np.arange(0.0, top, sigma / 2.0)) if r <= top]
            shares = np.linspace(0.5, 1.0, 101)
            votes = float(expected_votes(AdaptivePlan(n, wanted or [0.0]), shares, sigma, alpha, runs=20, seed=seed).mean())
        rows.append(BudgetRow(int(n), top, mean_radius_ratio(n, n_ref, alpha), smallest_certifying_count(n, alpha), votes))
    needed = tuple((float(r), votes_needed(sigma, r, alpha)) for r in radii)
    return BudgetTable(float(sigma), float(alpha), n_ref, tuple(rows), needed)


__all__ = [
    "BudgetRow",
    "BudgetTable",
    "budget_table",
    "expected_votes",
    "largest_radius",
    "mean_radius_ratio",
    "mean_radius_ratio_approx",
    "smallest_certifying_count",
    "votes_needed",
]
