"""What a chain of threshold stages would certify, from votes that were drawn once: every idea costs milliseconds.

The numbers steer choices on validation images; nothing here is a certificate. `chain_radius` is the tree
certificate of `rsrouter.core.certificates` on counts, for chains, with the quantiles in look-up tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from rsrouter.core.bounds import LOWER_SHARE, Array, binom_lower, binom_upper

Counts = NDArray[np.int64]


@dataclass
class SimulatedVotes:
    """Votes of one voter on N images: `counts (N, C)` of `n` for estimation, `selection (N, C)` of `n0` for the choice
    of the class. Rows may sum to less: the other votes name no class (a head's "defer")."""

    counts: Counts
    selection: Counts
    n: int
    n0: int
    sigma: float
    _bounds: dict[float, tuple[Array, Array]] = field(default_factory=dict, repr=False)

    @classmethod
    def draw(
        cls, votes: Counts, sigma: float, n: int, n0: int, rng: np.random.Generator, classes: int | None = None
    ) -> SimulatedVotes:
        """What `n` votes might look like after the few in `votes (N, L)`: multinomial counts at probabilities from
        the posterior (a Dirichlet prior of 0.02 per outcome, which leaves unanimous votes nearly unanimous). Only the
        first `classes` outcomes are classes."""
        weights = rng.standard_gamma(np.maximum(votes, 0) + 0.02)
        shares = weights / weights.sum(1, keepdims=True)
        counts, selection = rng.multinomial(n, shares), rng.multinomial(n0, shares)
        return cls(counts[:, :classes], selection[:, :classes], n, n0, sigma)

    def quantiles(self, alpha: float) -> tuple[Array, Array]:
        """`Phi^-1` of the lower and upper Clopper-Pearson bound of every count, each at `alpha`."""
        if alpha not in self._bounds:
            k = np.arange(self.n + 1)
            self._bounds[alpha] = (
                ndtri(binom_lower(k, self.n, alpha))[self.counts],
                ndtri(binom_upper(k, self.n, alpha))[self.counts],
            )
        return self._bounds[alpha]

    def take(self, rows: NDArray[np.int64]) -> SimulatedVotes:
        """The votes on some images."""
        return SimulatedVotes(self.counts[rows], self.selection[rows], self.n, self.n0, self.sigma)


def expert_radius(votes: SimulatedVotes, alpha: float) -> tuple[NDArray[np.int64], Array]:
    """Class and one-sided certified radius of one expert alone (Cohen et al. 2019)."""
    c = votes.selection.argmax(1)
    lower, _ = votes.quantiles(alpha)
    return c, np.maximum(0.0, votes.sigma * lower[np.arange(len(c)), c])


def chain_radius(
    voters: Mapping[str, SimulatedVotes], chain: Sequence[tuple[str, float | None]], alpha: float
) -> tuple[NDArray[np.int64], Array]:
    """Class and certified radius of threshold stages in a row and a last plurality stage.

    Args:
        voters: votes by name.
        chain: `(voter, tau)` per stage; the last tau is None.
        alpha: of the whole certificate; split evenly over the stages.

    Returns:
        `c (N,)` (-1 where every vote was invalid) and `radius (N,)`.
    """
    level = alpha / len(chain)
    first = voters[chain[0][0]]
    rows = np.arange(len(first.counts))
    c = np.full(len(rows), -1)
    for name, tau in chain:
        selection = voters[name].selection
        top = selection.argmax(1)
        wins = selection[rows, top] >= tau * voters[name].n0 if tau is not None else np.ones(len(rows), bool)
        c = np.where((c < 0) & wins, top, c)
    last = voters[chain[-1][0]]
    if len(chain) == 1:
        return expert_radius(last, alpha)
    lower, _ = last.quantiles(level * LOWER_SHARE)
    _, upper = last.quantiles(level * (1.0 - LOWER_SHARE))
    rival = upper.copy()
    rival[rows, c] = -np.inf
    own = lower[rows, c]
    radius = np.maximum(0.0, last.sigma / 2.0 * (own - np.minimum(rival.max(1), -own)))
    for name, tau in reversed(chain[:-1]):
        votes = voters[name]
        lower, upper = votes.quantiles(level)
        entry = votes.sigma * (ndtri(tau) - upper)
        entry[rows, c] = np.inf
        defer = np.maximum(0.0, votes.sigma * (lower[rows, c] - ndtri(tau)))
        radius = np.minimum(np.maximum(0.0, entry.min(1)), np.maximum(defer, radius))
    return c, radius


def accuracy(c: NDArray[np.int64], radius: Array, labels: NDArray[np.int64], radii: Sequence[float]) -> Array:
    """Certified accuracy at each radius (0: certified at all)."""
    held = np.where(c == labels, radius, 0.0)
    return np.array([np.mean(held >= max(r, 1e-12)) for r in radii])
