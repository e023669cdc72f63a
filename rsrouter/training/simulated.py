"""Votes of a whole certification, simulated from few: what routers are chosen by. Nothing here is a certificate."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from rsrouter.core.bounds import Array, binom_lower, binom_upper
from rsrouter.core.errors import InputError
from rsrouter.core.posterior import dissent_shape, posterior_shares
from rsrouter.experts.pool import ExpertPool
from rsrouter.training.record import SELECTION_VOTES

Counts = NDArray[np.int64]


@dataclass
class SimulatedVotes:
    """Votes of one voter on N images: `counts (N, C)` of `n` for estimation, `selection (N, C)` of `n0` for the choice
    of the class. Rows may sum to less: the other votes name no class."""

    counts: Counts
    selection: Counts
    n: int
    n0: int
    sigma: float
    _bounds: dict[float, tuple[Array, Array]] = field(default_factory=dict, repr=False)

    @classmethod
    def draw(
        cls,
        votes: Counts,
        sigma: float,
        n: int,
        n0: int,
        rng: np.random.Generator,
        classes: int | None = None,
        levels: Array | None = None,
    ) -> SimulatedVotes:
        """What `n` votes might look like after the few in `votes (N, L)`: multinomial counts at probabilities from
        the posterior. The prior is Dirichlet, each of the other outcomes with its part of `dissent_shape(votes)`, so that an
        image whose few votes agree dissents as often as such images do. Only the first `classes` outcomes are classes.

        Voters of one chain take the same `levels (N, M)` (`posterior_shares`): a chain holds as far as its surest
        stage does, and would promise the luckiest of several draws if each stage had its own.
        """
        votes = np.maximum(votes, 0)
        shares = posterior_shares(votes, rng, dissent_shape(votes) / (votes.shape[1] - 1), levels=levels)
        some = votes.any(1, keepdims=True)  # a network that is invalid on an image names no class there
        counts, selection = rng.multinomial(n, shares) * some, rng.multinomial(n0, shares) * some
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


def shared_levels(images: int, classes: int, rng: np.random.Generator) -> Array:
    """`levels` for all voters of a chain, whose outcomes are the classes, invalid votes and unsure ones."""
    return rng.random((images, classes + 4))


def simulate_pool(
    pool: ExpertPool,
    votes: Counts,
    *,
    plan_n: int,
    rng: np.random.Generator,
    n0: int = SELECTION_VOTES,
    levels: Array | None = None,
) -> dict[str, SimulatedVotes]:
    """`SimulatedVotes` of every expert from few votes `(N, K, classes + 1)`, all at the same `levels`.

    Raises:
        InputError: votes of another shape.
    """
    if votes.ndim != 3 or votes.shape[1:] != (len(pool), pool.num_classes + 1):
        raise InputError(
            "Votes do not fit the pool",
            expected=f"(N, {len(pool)}, {pool.num_classes + 1})",
            received=str(votes.shape),
            remedy="pass what label_votes returned",
        )
    levels = shared_levels(len(votes), pool.num_classes, rng) if levels is None else levels
    given = (plan_n, n0, rng, pool.num_classes, levels)
    return {e.name: SimulatedVotes.draw(votes[:, k], e.sigma, *given) for k, e in enumerate(pool)}
