"""How a failure probability is spread over looks at one vote, so that none of it lies where nothing could be concluded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rsrouter.core.bounds import Array, binom_lower, binom_upper, check_alpha, check_counts
from rsrouter.core.errors import PlanError


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


__all__ = ["LinearSpending"]
