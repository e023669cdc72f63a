"""Chains: whom to ask, in which order, and how sure each must be; chosen on votes of validation images that were drawn once.

The numbers steer choices; nothing here is a certificate. `chain_radius` is the tree certificate
(`rsrouter.core.certificates`) of stages in a row, with the quantiles in look-up tables; `replay` is CERTIFY itself on any tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from rsrouter.core.bounds import LOWER_SHARE, AlphaSplit, Array
from rsrouter.core.certify import CertifyPolicy
from rsrouter.core.plans import FixedPlan
from rsrouter.core.requests import SELECT
from rsrouter.core.tree import Tree
from rsrouter.training.simulated import SimulatedVotes

#: `(voter, tau)` per stage; the last tau is None.
Chain = tuple[tuple[str, float | None], ...]

#: Thresholds that are tried.
TAUS = (0.505, 0.53, 0.56, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.94, 0.97, 0.99)


def expert_radius(votes: SimulatedVotes, alpha: float) -> tuple[NDArray[np.int64], Array]:
    """Class and one-sided certified radius of one expert alone (Cohen et al. 2019)."""
    c = votes.selection.argmax(1)
    lower, _ = votes.quantiles(alpha)
    return c, np.maximum(0.0, votes.sigma * lower[np.arange(len(c)), c])


def chain_radius(voters: Mapping[str, SimulatedVotes], chain: Chain, alpha: float) -> tuple[NDArray[np.int64], Array]:
    """Class and certified radius of threshold stages in a row and a last plurality stage.

    Args:
        voters: votes by name.
        chain: who is asked.
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


def replay(
    tree: Tree, voters: Mapping[str, SimulatedVotes], alpha: float, *, rule: str = "tree"
) -> tuple[NDArray[np.int64], Array]:
    """Class (-1: none) and radius of every image if the stages' votes were `voters` (one entry per stage, equal n and n0)."""
    first = next(iter(voters.values()))
    count = len(first.counts)
    policy = CertifyPolicy(tree, FixedPlan(first.n0, first.n), AlphaSplit.even(alpha, tree.paths), count, rule=rule)
    on = {network: [s.name for s in tree.stages.values() if s.network == network] for network in tree.networks}

    def whole(stage: str, purpose: str, image: int, size: int) -> NDArray[np.int64]:
        row = (voters[stage].selection if purpose == SELECT else voters[stage].counts)[image]
        return np.append(row, size - row.sum())  # votes for no class are invalid ones

    while live := [i for i in range(count) if not policy.done[i]]:
        requests = policy.next_requests(live)
        policy.update(requests, [{s: whole(s, r.purpose, r.image, r.count) for s in on[r.network]} for r in requests])
    return np.where(policy.radius > 0.0, policy.c, -1), np.where(policy.c >= 0, policy.radius, 0.0)


def accuracy(c: NDArray[np.int64], radius: Array, labels: NDArray[np.int64], radii: Sequence[float]) -> Array:
    """Certified accuracy at each radius (0: certified at all).

    >>> accuracy(np.array([1, 0]), np.array([0.6, 0.3]), np.array([1, 1]), (0.0, 0.5, 1.0)).tolist()
    [0.5, 0.5, 0.0]
    """
    held = np.where(c == labels, radius, 0.0)
    return np.array([np.mean(held >= max(r, 1e-12)) for r in radii])


@dataclass(frozen=True)
class Goal:
    """What a routed classifier should reach.

    Attributes:
        radii: the radii the user cares about.
        envelope: `(R,)` certified accuracy of the best single expert at each of them.
        floor: least wanted ratio to the envelope, one number or `(R,)`.
        strictness: the largest shortfall below `floor` costs so many times itself.
        weights: `(R,)`, what each radius counts in the mean; None: all alike.
        experts: each expert's own certified accuracy, by name.

    >>> goal = Goal((0.0, 1.0), np.array([0.8, 0.4]), floor=0.9)
    >>> goal.coverage(np.array([0.8, 0.2])), goal.least(np.array([0.8, 0.2]))
    (0.75, 0.5)
    """

    radii: tuple[float, ...]
    envelope: Array
    floor: float | Array = 0.915
    strictness: float = 5.0
    weights: Array | None = None
    experts: Mapping[str, Array] = field(default_factory=dict)

    def ratios(self, reached: Array) -> Array:
        """Reached over envelope, at the radii that some expert holds (1 where none does anywhere)."""
        some = self.envelope > 0
        return np.asarray(reached[some] / self.envelope[some]) if some.any() else np.ones(1)

    def coverage(self, reached: Array) -> float:
        """Mean of the ratios."""
        return float(self.ratios(reached).mean())

    def least(self, reached: Array) -> float:
        """The least ratio."""
        return float(self.ratios(reached).min())

    def shortfall(self, reached: Array) -> float:
        """By how much some ratio misses its floor at most; 0 where none does."""
        some = self.envelope > 0
        floor = self.floor if np.ndim(self.floor) == 0 or not some.any() else np.asarray(self.floor)[some]
        return max(0.0, float((floor - self.ratios(reached)).max())) if some.any() else 0.0

    def score(self, reached: Array) -> float:
        """The weighted mean of the ratios less `strictness` times the shortfall."""
        some = self.envelope > 0
        weights = None if self.weights is None or not self.weights[some].any() else self.weights[some]
        return float(np.average(self.ratios(reached), weights=weights)) - self.strictness * self.shortfall(reached)

    def best_expert(self) -> tuple[str, Array]:
        """The single expert of largest coverage, and what it certifies."""
        return max(self.experts.items(), key=lambda item: self.coverage(item[1]))


def goal_of(
    experts: Mapping[str, SimulatedVotes],
    labels: NDArray[np.int64],
    radii: Sequence[float],
    alpha: float,
    *,
    floor: float | Mapping[float, float] = 0.915,
    weights: Mapping[float, float] | None = None,
    never_below: Mapping[float, str] | None = None,
) -> Goal:
    """The experts' own certified accuracy, and the user's wishes (as in `Training`), as the goal."""
    grid = tuple(sorted({float(r) for r in radii}))
    each = {name: accuracy(*expert_radius(v, alpha), labels, grid) for name, v in experts.items()}
    envelope: Array = np.max(list(each.values()), axis=0)
    floors = np.array([floor.get(r, 0.915) if isinstance(floor, Mapping) else floor for r in grid], dtype=float)
    for radius, name in (never_below or {}).items():
        at = grid.index(float(radius))
        if envelope[at] > 0:
            floors[at] = max(floors[at], each[name][at] / envelope[at])
    counts = None if weights is None else np.array([weights.get(r, 1.0) for r in grid])
    return Goal(grid, envelope, floors, weights=counts, experts=each)


class Frontier:
    """Chains that no other beats in both coverage and least ratio, of all that were looked at."""

    def __init__(self, goal: Goal) -> None:
        self.goal, self._seen = goal, dict[tuple[float, float], Chain]()

    def add(self, chain: Chain, reached: Array) -> None:
        """Looks at one more chain; of equal ones the first stays."""
        self._seen.setdefault((self.goal.coverage(reached), self.goal.least(reached)), chain)

    def points(self, most: int = 8) -> list[dict[str, Any]]:
        """At most `most` of them, by falling coverage."""
        best, kept = -1.0, []
        for (coverage, least), chain in sorted(self._seen.items(), key=lambda item: (-item[0][0], -item[0][1])):
            if least > best:
                best = least
                kept.append({"coverage": coverage, "least": least, "chain": [list(stage) for stage in chain]})
        thinned = np.linspace(0, len(kept) - 1, min(most, len(kept))).round().astype(int)
        return [kept[i] for i in sorted(set(thinned.tolist()))]


def search_chain(
    voters: Mapping[str, SimulatedVotes],
    labels: NDArray[np.int64],
    goal: Goal,
    alpha: float,
    *,
    max_stages: int = 3,
    beam: int = 8,
    last: Sequence[str] | None = None,
    frontier: Frontier | None = None,
) -> tuple[Chain, float]:
    """The chain of best score, by beam search: a stage is put in front of, or between, those that stand.

    Args:
        voters: votes of everything that may be asked.
        labels: `(N,)` true classes.
        goal: what counts.
        max_stages: the longest chain.
        beam: chains kept per length.
        last: voters that may stand last; None: any.
        frontier: is shown every chain.

    Returns:
        The chain and its score; of equal scores the shorter chain.
    """

    def score(chain: Chain) -> float:
        reached = accuracy(*chain_radius(voters, chain, alpha), labels, goal.radii)
        if frontier is not None:
            frontier.add(chain, reached)
        return goal.score(reached)

    single: list[Chain] = [((name, None),) for name in (voters if last is None else last)]
    kept = [(score(chain), chain) for chain in single]
    best = max(kept, key=lambda item: item[0])
    for _ in range(max_stages - 1):
        longer: dict[Chain, float] = {}
        for _, chain in kept:
            for name in voters:
                for tau in TAUS:
                    places = [(*chain[:p], (name, tau), *chain[p:]) for p in range(len(chain))]
                    if last is None or name in last:
                        places.append((*chain[:-1], (chain[-1][0], tau), (name, None)))
                    for new in places:
                        if new not in longer and all(a[0] != b[0] for a, b in pairwise(new)):
                            longer[new] = score(new)
        # one chain per order of voters, so that the beam does not fill up with near copies
        by_order: dict[tuple[str, ...], tuple[float, Chain]] = {}
        for chain, value in longer.items():
            names = tuple(name for name, _ in chain)
            if names not in by_order or value > by_order[names][0]:
                by_order[names] = (value, chain)
        kept = sorted(by_order.values(), key=lambda item: -item[0])[:beam]
        if kept and kept[0][0] > best[0] + 1e-9:
            best = kept[0]
    return best[1], best[0]


def improve_thresholds(
    voters: Mapping[str, SimulatedVotes], labels: NDArray[np.int64], goal: Goal, alpha: float, chain: Chain
) -> tuple[Chain, float]:
    """`chain` with its thresholds moved, one at a time, as long as that raises the score; never below where it started."""

    def score(candidate: Chain) -> float:
        return goal.score(accuracy(*chain_radius(voters, candidate, alpha), labels, goal.radii))

    best, value = chain, score(chain)
    improved = True
    while improved:
        improved = False
        for place in range(len(best) - 1):
            for tau in TAUS:
                candidate = (*best[:place], (best[place][0], tau), *best[place + 1 :])
                if (reached := score(candidate)) > value + 1e-9:
                    best, value, improved = candidate, reached, True
    return best, value


def standing(goal: Goal, reached: Array) -> dict[str, Any]:
    """What a router reaches on the validation images, for the log: beside it what the best single expert does."""
    found = {
        "validation": reached.tolist(),
        "score": goal.score(reached),
        "coverage": goal.coverage(reached),
        "least": goal.least(reached),
        "shortfall": goal.shortfall(reached),
    }
    if goal.experts:
        name, alone = goal.best_expert()
        found["best_expert"] = {"name": name, "coverage": goal.coverage(alone), "least": goal.least(alone)}
    return found


def chosen_line(
    goal: Goal, voters: Mapping[str, SimulatedVotes], labels: NDArray[np.int64], alpha: float, chain: Chain, frontier: Frontier
) -> dict[str, Any]:
    """The log's last word on a chain."""
    reached = accuracy(*chain_radius(voters, chain, alpha), labels, goal.radii)
    frontier.add(chain, reached)
    return {
        "chain": [list(stage) for stage in chain],
        **standing(goal, reached),
        "floor": np.broadcast_to(goal.floor, len(goal.radii)).tolist(),
        "envelope": goal.envelope.tolist(),
        "radii": list(goal.radii),
        "images": len(labels),
        "frontier": frontier.points(),
    }
