"""Confidence bounds on vote probabilities, in float64 and rounded towards the safe side.

Every bound here is for a *binomial proportion*: `k` of `n` independent votes went to an outcome that was
fixed before those votes were drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from rsrouter.core.errors import PlanError

#: Relative shrinkage of every bound: scipy's beta quantile errs by about an ulp either way.
SAFETY = 1e-12

Array = NDArray[np.float64]


def check_counts(k: ArrayLike, n: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts and totals as broadcast int64 arrays; refuses NaN, fractions, n < 1, k < 0 and k > n."""
    arrays = []
    for name, value in (("k", k), ("n", n)):
        raw = np.asarray(value)
        if raw.dtype.kind not in "iu":
            as_float = raw.astype(np.float64)
            if not np.all(np.isfinite(as_float)) or np.any(as_float != np.floor(as_float)):
                raise PlanError("Vote counts must be whole numbers", expected="integers", received=f"{name} = {value!r}",
                                remedy="count votes; pass shares only after multiplying by n")
            raw = as_float
        arrays.append(raw.astype(np.int64))
    counts, totals = np.broadcast_arrays(*arrays)
    if np.any(totals < 1):
        raise PlanError("A bound needs at least one vote", expected="n >= 1", received=f"n = {totals.min()}",
                        remedy="draw votes first; an unsampled stage has no bound")
    if np.any(counts < 0) or np.any(counts > totals):
        raise PlanError("Counts must lie between 0 and n", expected="0 <= k <= n",
                        received=f"k in [{counts.min()}, {counts.max()}], n in [{totals.min()}, {totals.max()}]",
                        remedy="count each vote once, invalid votes included")
    return counts, totals


def check_alpha(alpha: ArrayLike, name: str = "alpha") -> Array:
    """Failure probabilities strictly between 0 and 1; NaN is refused."""
    array = np.asarray(alpha, dtype=np.float64)
    if not np.all((array > 0.0) & (array < 1.0)):
        raise PlanError(f"{name} must be a probability strictly between 0 and 1", expected=f"0 < {name} < 1",
                        received=f"{name} = {alpha!r}", remedy="0.001 is the field's default")
    return array


def binom_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Array:
    """One-sided Clopper-Pearson lower bound: `P(bound <= p) >= 1 - alpha` for every true p.

    Theorem (Clopper and Pearson 1934): with `k ~ Binomial(n, p)`, the alpha-quantile of
    `Beta(k, n - k + 1)` exceeds p with probability at most alpha. It is 0 at k = 0 and
    `alpha ** (1 / n)` at k = n.

    Args:
        k: successes, any shape; integers with `0 <= k <= n`.
        n: votes, broadcast against `k`; at least 1.
        alpha: failure probability in (0, 1), broadcast as well.

    Returns:
        float64 array of the broadcast shape, shrunk by a relative 1e-12.

    Raises:
        PlanError: NaN, fractional, negative or over-full counts, n < 1, alpha outside (0, 1).
    """
    counts, totals = check_counts(k, n)
    counts, totals, level = np.broadcast_arrays(counts, totals, check_alpha(alpha))
    inner = np.clip(counts, 1, np.maximum(totals - 1, 1))
    with np.errstate(all="ignore"):
        bound = stats.beta.ppf(level, inner, totals - inner + 1)
        bound = np.where(counts == totals, np.exp(np.log(level) / totals), bound)
    bound = np.where(counts == 0, 0.0, bound) * (1.0 - SAFETY)
    return np.where(np.isfinite(bound), np.clip(bound, 0.0, 1.0), 0.0)


def binom_upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Array:
    """One-sided Clopper-Pearson upper bound: `P(p <= bound) >= 1 - alpha` for every true p.

    The mirror image of `binom_lower`: the (1 - alpha)-quantile of `Beta(k + 1, n - k)`; 1 at k = n and
    `1 - alpha ** (1 / n)` at k = 0. Arguments, shapes and errors are the same; enlarged by a relative 1e-12.
    """
    counts, totals = check_counts(k, n)
    counts, totals, level = np.broadcast_arrays(counts, totals, check_alpha(alpha))
    inner = np.clip(counts, 1, np.maximum(totals - 1, 1))
    with np.errstate(all="ignore"):
        bound = stats.beta.isf(level, inner + 1, np.maximum(totals - inner, 1))
        bound = np.where(counts == 0, -np.expm1(np.log(level) / totals), bound)
    bound = np.where(counts == totals, 1.0, bound) * (1.0 + SAFETY)
    return np.where(np.isfinite(bound), np.clip(bound, 0.0, 1.0), 1.0)


def _log_mixture(k: Array, n: Array, p: Array, a: float, b: float) -> Array:
    """Log of the mixture e-value against H0: proportion <= p (Howard et al. 2021, Proposition 7)."""
    return np.asarray(
        special.betaln(a + k, b + n - k) - special.betaln(a, b)
        + stats.beta.logsf(p, a + k, b + n - k) - stats.beta.logsf(p, a, b)
        - special.xlogy(k, p) - special.xlog1py(n - k, -p)
    )


def sequence_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike, *, a: float = 1.0, b: float = 1.0) -> Array:
    """Anytime-valid lower bound: a one-sided beta-binomial mixture confidence sequence.

    Theorem (Howard, Ramdas, McAuliffe and Sekhon 2021, Propositions 6 and 7; Ville's inequality): with
    probability at least `1 - alpha` the bound is at most p *simultaneously at every n*, so drawing may stop
    for any reason. The mixing density is Beta(a, b) truncated to (p, 1].

    Arguments, shapes and errors as `binom_lower`; `a`, `b` > 0 shape the mixing density. The bound solves
    `log e(p) = log(1 / alpha)` on (0, k / n) by bisection from the safe side.
    """
    counts, totals = check_counts(k, n)
    counts, totals, level = np.broadcast_arrays(counts, totals, check_alpha(alpha))
    if not (a > 0 and b > 0):
        raise PlanError("The mixing density needs positive shapes", expected="a > 0 and b > 0",
                        received=f"a = {a}, b = {b}", remedy="a = b = 1 is the uniform mixture")
    s, m = counts.astype(np.float64), totals.astype(np.float64)
    goal = -np.log(level)
    low, high = np.zeros(s.shape), s / m
    with np.errstate(all="ignore"):
        for _ in range(60):
            mid = 0.5 * (low + high)
            # `not (<)` keeps low where the e-value is NaN: an unreadable value rejects nothing
            reject = _log_mixture(s, m, mid, a, b) >= goal
            low, high = np.where(reject, mid, low), np.where(reject, high, mid)
    return np.asarray(np.clip(low * (1.0 - SAFETY), 0.0, 1.0))


def sequence_upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike, *, a: float = 1.0, b: float = 1.0) -> Array:
    """Anytime-valid upper bound: `1 - sequence_lower(n - k, n, alpha)` with the shapes exchanged."""
    counts, totals = check_counts(k, n)
    bound = 1.0 - sequence_lower(totals - counts, totals, alpha, a=b, b=a)
    return np.asarray(np.clip(bound * (1.0 + SAFETY), 0.0, 1.0))


@dataclass(frozen=True)
class AlphaSplit:
    """How a failure probability is divided over the stages of a tree; cannot be over-spent.

    Theorem (THEORY.md, section 4): the routed certificate fails with probability at most the maximum over
    root-to-leaf paths of the sum of the stages' alphas. The constructor checks exactly that sum.

    Args:
        total: alpha of the whole certificate.
        stages: stage name to its own alpha.
        paths: every root-to-leaf path as a tuple of stage names.
        lower_share: the part of a two-sided plurality stage's alpha that its lower bound gets; the rest goes
            to the upper bounds (0.9 loses almost nothing against a single rival, PEERS of the field use 0.5).

    Raises:
        PlanError: a path spends more than `total`, a stage has no alpha, or an alpha is not in (0, 1).
    """

    total: float
    stages: Mapping[str, float]
    paths: tuple[tuple[str, ...], ...]
    lower_share: float = 0.9

    def __post_init__(self) -> None:
        check_alpha(self.total)
        check_alpha(self.lower_share, "lower_share")
        for path in self.paths:
            missing = [name for name in path if name not in self.stages]
            if missing:
                raise PlanError("Every stage needs its own alpha", expected=f"an alpha for {missing}",
                                received=f"alphas for {sorted(self.stages)}", remedy="name every stage of every path")
            check_alpha([self.stages[name] for name in path], "a stage's alpha")
            spent = fsum(self.stages[name] for name in path)
            if not spent <= self.total * (1.0 + 1e-12):
                raise PlanError("The stages on one path spend more than alpha", expected=f"at most {self.total}",
                                received=f"{spent} on {' -> '.join(path)}", remedy="lower the stages' alphas")

    @classmethod
    def even(cls, total: float, paths: tuple[tuple[str, ...], ...], lower_share: float = 0.9) -> AlphaSplit:
        """Gives each stage `total` over the length of the longest path through it (so no path exceeds it)."""
        check_alpha(total)
        longest: dict[str, int] = {}
        for path in paths:
            for name in path:
                longest[name] = max(longest.get(name, 0), len(path))
        return cls(total, {name: total / length for name, length in longest.items()}, paths, lower_share)
