"""Vote probabilities that few votes leave open: what plans, patience and chains are chosen by. Nothing here is a certificate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import gammaincinv, gammaln, logsumexp

from rsrouter.core.bounds import Array

#: Prior weight of each outcome: unanimous votes stay nearly unanimous.
PRIOR = 0.02
#: Dissenting votes, at most, of an image that is nearly unanimous: what `dissent_shape` reads.
FEW_DISSENT = 3
#: What `dissent_shape` keeps within: .01 where nobody ever dissents, 1 where every share of dissent is as frequent.
SHAPES = (0.01, 1.0)


def posterior_shares(
    counts: Array | NDArray[np.int64], rng: np.random.Generator, prior: float = PRIOR, *, levels: Array | None = None
) -> Array:
    """Vote probabilities `(N, L)` drawn from their posterior given votes, under a Dirichlet prior.

    Args:
        counts: `(N, L)` votes; rows without votes say nothing about an image.
        rng: draws, where `levels` are not given.
        prior: weight of each outcome.
        levels: `(N, M)` in [0, 1), M at least L + 2: at which quantiles an image's shares stand. The law is the same (a Dirichlet
            law is a gamma variable each for the top outcome and for all others together, and these divided by a Dirichlet law of
            their own), but voters that take the same levels are as sure of an image together as their votes allow.

    >>> posterior_shares(np.array([[100.0, 0.0]]), np.random.default_rng(0)).round(2).tolist()
    [[1.0, 0.0]]
    """
    shape = np.asarray(counts, dtype=np.float64) + prior
    if levels is None:
        return _proportions(rng.standard_gamma(shape), shape)
    rows, top = np.arange(len(shape)), shape.argmax(1)
    others = shape.copy()
    others[rows, top] = 0.0
    both = np.column_stack([shape[rows, top], others.sum(1)])
    both = _proportions(gammaincinv(both, levels[:, :2]), both)
    parts = gammaincinv(shape, levels[:, 2 : 2 + shape.shape[1]])
    parts[rows, top] = 0.0
    shares = both[:, 1:] * _proportions(parts, others)
    shares[rows, top] = both[:, 0]
    return shares


def _proportions(weights: Array, means: Array) -> Array:
    """Each row of `weights (N, L)` over its sum; of `means` where all are 0, as gamma variables of tiny shapes are in float64."""
    weights = np.where(weights.sum(1, keepdims=True) > 0.0, weights, means)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def nearly_unanimous(counts: NDArray[np.int64], votes: int) -> NDArray[np.bool_]:
    """`(N,)` whether all but `FEW_DISSENT` of an image's `votes` are for one outcome, by its counts `(N, L)`.

    >>> nearly_unanimous(np.array([[97, 2], [96, 4], [0, 100]]), 100).tolist()
    [True, False, True]
    """
    return np.asarray(counts.max(1, initial=0) >= max(1, votes - FEW_DISSENT))


def dissent_shape(votes: NDArray[np.int64]) -> float:
    """The shape `a` of the density `share^(a - 1)` of dissent among images that a voter is nearly sure of.

    An image of that prior has `k` dissenting votes with a chance proportional to `Gamma(k + a) / k!`, for any number of
    votes that is large beside `k` (a beta-binomial near 0), so the images with few dissenting votes give `a` by maximum
    likelihood: empirical Bayes (Robbins 1956). With a fixed prior, votes too few for the share that a large radius needs
    promised too much: all of 400 votes agree on a third of the images of share .997.

    Args:
        votes: `(N, L)` counts of each outcome.

    Returns:
        `a`, within `SHAPES`; the lower one where no image has dissenting votes, or none at all has few. Rows without votes do
        not count.

    >>> dissent_shape(np.array([[100, 0]] * 50 + [[99, 1]] * 10 + [[98, 2]] * 6 + [[60, 40]] * 7)) > 0.1
    True
    """
    voted = votes[votes.sum(1) > 0]
    dissent = voted.sum(1) - voted.max(1, initial=0)
    seen = np.bincount(dissent[dissent <= FEW_DISSENT], minlength=FEW_DISSENT + 1)
    k = np.arange(FEW_DISSENT + 1)

    def loss(log_shape: float) -> float:
        weights = gammaln(k + np.exp(log_shape)) - gammaln(k + 1)
        return -float(seen @ (weights - logsumexp(weights)))

    if not seen[1:].any():
        return SHAPES[0]
    return float(np.exp(minimize_scalar(loss, bounds=np.log(SHAPES), method="bounded").x))
