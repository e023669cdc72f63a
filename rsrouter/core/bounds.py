"""Confidence bounds on vote probabilities, in float64 and rounded towards the safe side.

Every bound here is for a *binomial proportion*: `k` of `n` independent votes went to an outcome that was
fixed before those votes were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rsrouter.core.errors import PlanError

#: Relative shrinkage of every bound: scipy's beta quantile errs by about an ulp either way.
SAFETY = 1e-12

#: The most votes a bound is computed for. The error of scipy's beta quantile grows with n: at 10^12 the margins here still cover
#: it, at 10^15 a bound would fail ten times as often as alpha.
MOST_VOTES = 10**12

#: Relative shrinkage of alpha per vote. From n = 1e6 on, an ulp of the quantile moves the tail by more than SAFETY does:
#: measured up to 3e-9 of alpha at n = 1e6, 7e-8 at 1e7, 6e-7 at 1e8.
_TAIL_SAFETY = 3e-14

#: From this many entries on, equal ones are looked for.
_MANY = 512

#: The part of a two-sided plurality stage's alpha that its lower bound gets, unless told otherwise.
LOWER_SHARE = 0.9

Array = NDArray[np.float64]


def check_counts(k: ArrayLike, n: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts and totals as broadcast int64 arrays; refuses NaN, fractions, n < 1 or above 10^12, k < 0 and k > n."""
    arrays = []
    for name, value in (("k", k), ("n", n)):
        raw = np.asarray(value)
        if raw.dtype.kind not in "iu":
            as_float = raw.astype(np.float64)
            if not np.all(np.isfinite(as_float)) or np.any(as_float != np.floor(as_float)):
                raise PlanError(
                    "Vote counts must be whole numbers",
                    expected="integers",
                    received=f"{name} = {value!r}",
                    remedy="count votes; pass shares only after multiplying by n",
                )
            raw = as_float
        arrays.append(raw.astype(np.int64))
    counts, totals = np.broadcast_arrays(*arrays)
    if np.any(totals < 1):
        raise PlanError(
            "A bound needs at least one vote",
            expected="n >= 1",
            received=f"n = {totals.min()}",
            remedy="draw votes first; an unsampled stage has no bound",
        )
    if np.any(totals > MOST_VOTES):
        raise PlanError(
            "More votes than a bound can be computed for",
            expected=f"n <= {MOST_VOTES:,}",
            received=f"n = {totals.max():,}",
            remedy="a larger sigma reaches the radius with fewer votes",
        )
    if np.any(counts < 0) or np.any(counts > totals):
        raise PlanError(
            "Counts must lie between 0 and n",
            expected="0 <= k <= n",
            received=f"k in [{counts.min()}, {counts.max()}], n in [{totals.min()}, {totals.max()}]",
            remedy="count each vote once, invalid votes included",
        )
    return counts, totals


def check_whole(name: str, value: object, least: int, remedy: str = "n0 = 100 and n = 100,000 are the field's defaults") -> int:
    """An int from `least` to `MOST_VOTES`; refuses bool, fractions and anything else with a PlanError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= MOST_VOTES:
        raise PlanError(
            f"{name} must be a whole number of at least {least}, and of at most {MOST_VOTES:,}",
            expected=f"{least} <= {name} <= {MOST_VOTES:,}",
            received=repr(value),
            remedy=remedy,
        )
    return int(value)


def check_alpha(alpha: ArrayLike, name: str = "alpha") -> Array:
    """Failure probabilities strictly between 0 and 1; NaN is refused."""
    try:
        array = np.asarray(alpha, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full(1, np.nan)
    if not np.all((array > 0.0) & (array < 1.0)):
        raise PlanError(
            f"{name} must be a probability strictly between 0 and 1",
            expected=f"0 < {name} < 1",
            received=f"{name} = {alpha!r}",
            remedy="0.001 is the field's default",
        )
    return array


def _each_once(
    bound: Callable[[NDArray[np.int64], NDArray[np.int64], Array], Array],
    counts: NDArray[np.int64],
    totals: NDArray[np.int64],
    level: Array,
) -> Array:
    """`bound` of arrays of one shape, computed once for equal entries: a quantile costs a thousand comparisons."""
    if counts.size < _MANY:
        return bound(counts, totals, level)
    order = np.lexsort((counts.ravel(), totals.ravel(), level.ravel()))
    sorted_by = [array.ravel()[order] for array in (counts, totals, level)]
    other = np.any([array[1:] != array[:-1] for array in sorted_by], axis=0)
    first = np.flatnonzero(np.concatenate([[True], other]))
    found = np.empty(counts.size)
    once = order[first]
    values = bound(counts.ravel()[once], totals.ravel()[once], level.ravel()[once])
    found[order] = np.repeat(values, np.diff([*first, counts.size]))
    return found.reshape(counts.shape)


def _tighter(level: Array, totals: NDArray[np.int64]) -> Array:
    return np.asarray(level * (1.0 - _TAIL_SAFETY * totals))


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
        float64 array of the broadcast shape, shrunk by a relative 1e-12 (and alpha by 3e-14 n).

    Raises:
        PlanError: NaN, fractional, negative or over-full counts, n < 1 or above 10^12, alpha outside (0, 1).
    """
    counts, totals = check_counts(k, n)
    counts, totals, level = np.broadcast_arrays(counts, totals, check_alpha(alpha))
    return _each_once(_lower, counts, totals, level)


def _lower(counts: NDArray[np.int64], totals: NDArray[np.int64], level: Array) -> Array:
    inner = np.clip(counts, 1, np.maximum(totals - 1, 1))
    with np.errstate(all="ignore"):
        bound = special.betaincinv(inner.astype(np.float64), (totals - inner + 1).astype(np.float64), _tighter(level, totals))
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
    return _each_once(_upper, counts, totals, level)


def _upper(counts: NDArray[np.int64], totals: NDArray[np.int64], level: Array) -> Array:
    inner = np.clip(counts, 1, np.maximum(totals - 1, 1))
    with np.errstate(all="ignore"):
        left = np.maximum(totals - inner, 1).astype(np.float64)
        bound = special.betainccinv((inner + 1).astype(np.float64), left, _tighter(level, totals))
        bound = np.where(counts == 0, -np.expm1(np.log(level) / totals), bound)
    bound = np.where(counts == totals, 1.0, bound) * (1.0 + SAFETY)
    return np.where(np.isfinite(bound), np.clip(bound, 0.0, 1.0), 1.0)


def multiclass_bounds(
    counts: ArrayLike, top: ArrayLike, alpha: float, *, lower_share: float = LOWER_SHARE
) -> tuple[Array, Array]:
    """Two-sided bounds for one plurality vote: `p_top >= lower`, and `p_l <= upper` for the best rival.

    Theorem: let A be fixed before the votes and b the rival with the largest probability (fixed, unknown). The
    Clopper-Pearson upper bound U grows with the count, so `U(max over rivals) >= U(count of b) >= p_b` with
    probability at least `1 - alpha_hi`: no correction over the rivals. With
    `upper = min(U(most voted rival), 1 - lower)` both statements hold with probability at least `1 - alpha`,
    and `vote_radius(sigma, lower, upper)` is a certified radius.

    Args:
        counts: `(N, L)` estimation votes, every vote counted once (invalid ones in a column of their own).
        top: `(N,)` the outcome A of each row, from selection votes alone.
        alpha: failure probability of the pair of bounds.
        lower_share: the part of alpha that the lower bound gets.

    Returns:
        `lower (N,)` and `upper (N,)`, float64.

    Raises:
        PlanError: bad counts or alpha, `top` out of range.
    """
    votes = np.asarray(counts)
    chosen = np.atleast_1d(np.asarray(top))
    if votes.ndim != 2 or votes.shape[1] < 2 or chosen.shape != votes.shape[:1] or chosen.dtype.kind not in "iu":
        raise PlanError(
            "Votes and top outcomes do not fit",
            expected="counts (N, L) with L >= 2 and integer top (N,)",
            received=f"{votes.shape} and {chosen.dtype} {chosen.shape}",
            remedy="one row per image",
        )
    if np.any((chosen < 0) | (chosen >= votes.shape[1])):
        raise PlanError(
            "A top outcome does not exist",
            expected=f"0 to {votes.shape[1] - 1}",
            received=f"{chosen.min()} to {chosen.max()}",
            remedy="leave out images that selected nothing",
        )
    whole, _ = check_counts(votes, np.maximum(votes, 1))
    total = whole.sum(1)
    rows = np.arange(len(whole))
    share = float(check_alpha(lower_share, "lower_share"))
    lower = binom_lower(whole[rows, chosen], total, alpha * share)
    rivals = whole.copy()
    rivals[rows, chosen] = -1
    upper = binom_upper(rivals.max(1), total, alpha * (1.0 - share))
    return lower, np.minimum(upper, 1.0 - lower)


def _log_mixture(s: Array, n: Array, p: Array) -> Array:
    """Log e-value against H0: proportion <= p, mixing over Beta(1/2, 1/2) truncated to (p, 1]."""
    prior = np.log(2.0 / np.pi * np.arcsin(np.sqrt(1.0 - p)))
    return np.asarray(
        special.betaln(0.5 + s, 0.5 + n - s)
        - special.betaln(0.5, 0.5)
        + np.log(special.betaincc(0.5 + s, 0.5 + n - s, p))
        - prior
        - special.xlogy(s, p)
        - special.xlog1py(n - s, -p)
    )


def sequence_lower(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Array:
    """Anytime-valid lower bound: a one-sided beta-binomial mixture confidence sequence.

    Theorem (Howard, Ramdas, McAuliffe and Sekhon 2021, Propositions 6 and 7; Ville's inequality): with
    probability at least `1 - alpha` the bound is at most p *simultaneously at every n*, so drawing may stop
    for any reason. The e-value of s successes in n against p mixes the likelihood ratio over the arcsine law
    Beta(1/2, 1/2) truncated to (p, 1] (Krichevsky and Trofimov's); the bound is the p in (0, (s - 1/2) / n] where it
    falls to 1 / alpha.

    Why bisection may look for it: `d log e / dp = h(p) (1 - 1/e) - (s - n p) / (p (1-p))` with the hazard rate h of the
    arcsine law, and with `p = cos^2 t` one has `h(p) p (1-p) = sin(2t) / (4t) <= 1/2`. So e decreases wherever
    s - n p >= 1/2, and "e(low) >= 1/alpha" implies the same at every smaller p, the true one included.

    Arguments, shapes and errors as `binom_lower`; rounded down like it, and the level tightened by a relative
    1e-6 for the rounding of logarithms at large n.
    """
    counts, totals = check_counts(k, n)
    counts, totals, level = np.broadcast_arrays(counts, totals, check_alpha(alpha))
    # votes repeat: each different triple is solved once
    triples, where = np.unique(np.stack([counts.ravel(), totals.ravel(), level.ravel()]), axis=1, return_inverse=True)
    s, m, goal = triples[0], triples[1], 1e-6 - np.log(triples[2])
    low, high = np.zeros(s.shape), np.maximum(s - 0.5, 0.0) / m
    with np.errstate(all="ignore"):
        for _ in range(50):
            mid = 0.5 * (low + high)
            # an unreadable (NaN) e-value compares false and rejects nothing
            reject = _log_mixture(s, m, mid) >= goal
            low, high = np.where(reject, mid, low), np.where(reject, high, mid)
    return np.asarray(np.clip(low * (1.0 - SAFETY), 0.0, 1.0)[where.reshape(counts.shape)])


def sequence_upper(k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Array:
    """Anytime-valid upper bound: `1 - sequence_lower(n - k, n, alpha)`, rounded up."""
    counts, totals = check_counts(k, n)
    bound = 1.0 - sequence_lower(totals - counts, totals, alpha)
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
            to the upper bounds (0.9 loses almost nothing against a single rival; halves are the usual choice).

    Raises:
        PlanError: a path spends more than `total`, a stage has no alpha, or an alpha is not in (0, 1).
    """

    total: float
    stages: Mapping[str, float]
    paths: tuple[tuple[str, ...], ...]
    lower_share: float = LOWER_SHARE

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", dict(self.stages))  # a copy: the caller's mapping may change later
        check_alpha(self.total)
        check_alpha(self.lower_share, "lower_share")
        if not self.paths:
            raise PlanError(
                "A split needs the paths it is for",
                expected="at least one path",
                received="none",
                remedy="AlphaSplit.even(alpha, tree.paths)",
            )
        for path in self.paths:
            missing = [name for name in path if name not in self.stages]
            if missing:
                raise PlanError(
                    "Every stage needs its own alpha",
                    expected=f"an alpha for {missing}",
                    received=f"alphas for {sorted(self.stages)}",
                    remedy="name every stage of every path",
                )
            if path:  # else: no stage of it votes
                check_alpha([self.stages[name] for name in path], "a stage's alpha")
            spent = fsum(self.stages[name] for name in path)
            if not spent <= self.total * (1.0 + 1e-12):
                raise PlanError(
                    "The stages on one path spend more than alpha",
                    expected=f"at most {self.total}",
                    received=f"{spent} on {' -> '.join(path)}",
                    remedy="lower the stages' alphas",
                )

    @classmethod
    def even(cls, total: float, paths: tuple[tuple[str, ...], ...], lower_share: float = LOWER_SHARE) -> AlphaSplit:
        """Gives each stage `total` over the length of the longest path through it (so no path exceeds it)."""
        check_alpha(total)
        longest: dict[str, int] = {}
        for path in paths:
            for name in path:
                longest[name] = max(longest.get(name, 0), len(path))
        return cls(total, {name: total / length for name, length in longest.items()}, paths, lower_share)


class LinearSpending:
    """Clopper-Pearson bounds at looks `n_1 < ... < n_K`, all valid at once, with alpha spent in proportion to the votes.

    By look k < K the share `c_k = (1 - last_share) * n_k / n_K` is spent, by the last look all of it (linear spending, Lan and
    DeMets 1983). What is new here: *a proportion's spending starts at the first look that could reject it at all.* Against a
    proportion p near one, n votes say nothing before `p ** n <= alpha`, however unanimous; a share set aside for an earlier look
    would be lost. So its first such look gets everything that was due by then.

    Let `P_k = (alpha * c_k) ** (1 / n_k)`, what unanimous votes reach at look k; `P_1 < ... < P_{K-1}`; let `P_K` be 1. The
    lower bound at look k is Clopper-Pearson at level `alpha * (c_k - c_{k-1})` where that stays below `P_{k-1}`; otherwise the
    larger of `P_{k-1}` and Clopper-Pearson at level `alpha * c_k`.

    Theorem (THEORY.md, Theorem 3): with probability at least `1 - alpha` the lower bounds of all looks are at most p. Proof:
    let f be the first look with `p <= P_f`. Before f no bound exceeds `P_k < p`. At f a bound above p is one of level
    `alpha * c_f`. Later, as `p <= P_{k-1}`, the bound of level `alpha * (c_k - c_{k-1})` must have reached p itself. These
    levels sum to alpha for every f. The mirror image holds for the upper bounds. Both grow with the count.

    Args:
        looks: cumulative votes, ascending.
        last_share: the least part of alpha that is left for the last look; it also gets what was due since the look before it.
    """

    def __init__(self, looks: Sequence[int], last_share: float) -> None:
        self.looks = np.asarray(looks, dtype=np.int64)
        #: What is spent by each look.
        self.spent = np.append((1.0 - last_share) * self.looks[:-1] / self.looks[-1], 1.0)
        #: What each look adds, on proportions that an earlier look could reject.
        self.added = np.diff(self.spent, prepend=0.0)
        self._edges: dict[float, tuple[Array, Array]] = {}

    def _unanimous(self, level: float) -> tuple[Array, Array]:
        """`P_k` of each look, and its mirror image: the upper bound of an outcome without votes."""
        if level not in self._edges:
            none = np.zeros_like(self.looks)
            self._edges[level] = (
                binom_lower(self.looks, self.looks, level * self.spent),
                binom_upper(none, self.looks, level * self.spent),
            )
        return self._edges[level]

    def _at(self, k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> tuple[NDArray[np.int64], Array, Array, Array]:
        """Per row: its look, its level, and the edges of the look before it."""
        _, totals, levels = np.broadcast_arrays(*check_counts(k, n), check_alpha(alpha))
        look = np.minimum(np.searchsorted(self.looks, totals), len(self.looks) - 1)
        if np.any(self.looks[look] != totals):
            raise PlanError(
                "A bound of this plan needs a look of this plan",
                expected=f"n among {self.looks.tolist()}",
                received=str(np.unique(totals[self.looks[look] != totals])[:5].tolist()),
                remedy="bound the votes of completed looks",
            )
        low, high = np.zeros(totals.shape), np.ones(totals.shape)
        for level in np.unique(levels):
            (lows, highs), here = self._unanimous(float(level)), (levels == level) & (look > 0)
            low[here], high[here] = lows[look[here] - 1], highs[look[here] - 1]
        return look, np.asarray(levels, dtype=np.float64), low, high

    def lower(self, k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Array:
        """Lower bounds after looks of `n` votes, `k` of them for the outcome; `alpha` is for all looks together.

        Arguments, shapes and errors as `binom_lower`; PlanError also where `n` is none of the looks.
        """
        look, level, edge, _ = self._at(k, n, alpha)
        strict = binom_lower(k, n, level * self.added[look])
        return np.where(strict < edge, strict, np.maximum(edge, binom_lower(k, n, level * self.spent[look])))

    def upper(self, k: ArrayLike, n: ArrayLike, alpha: ArrayLike) -> Array:
        """Upper bounds, the mirror image of `lower`."""
        look, level, _, edge = self._at(k, n, alpha)
        strict = binom_upper(k, n, level * self.added[look])
        return np.where(strict > edge, strict, np.minimum(edge, binom_upper(k, n, level * self.spent[look])))
