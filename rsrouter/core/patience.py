"""Patience: what an adaptive plan saves in votes, and costs in certified radii, when it gives up earlier.

An adaptive plan stops an image once the radius that it could still reach, at a prediction limit of level beta, falls into the
cell that is certified already (`AdaptivePlan.beta`, `rsrouter.core.estimates.hoped_counts`). beta is the probability given up, at
each look, of failing to reach what the fixed plan would certify. It steers what is drawn and enters no bound, so every beta is
sound (compare Horvath et al. 2022, who reject at a level beta as well).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from rsrouter.core.bounds import AlphaSplit, Array
from rsrouter.core.certify import CertifyPolicy
from rsrouter.core.errors import PlanError
from rsrouter.core.plans import AdaptivePlan, FixedPlan, Plan
from rsrouter.core.requests import PASS, SELECT, VoteRequest
from rsrouter.core.tree import Stage, Tree

#: The dial: from the most patient level to giving up as soon as it is as likely as not.
PATIENT, IMPATIENT = 0.01, 0.5
#: Levels that are shown side by side.
LEVELS = (0.01, 0.05, 0.1, 0.2, 0.5)


def check_patience(beta: object) -> float:
    """A level of patience as a number.

    Raises:
        PlanError: anything but a number from .01 to .5.

    >>> check_patience(0.1)
    0.1
    """
    if isinstance(beta, bool) or not isinstance(beta, Real) or not PATIENT <= float(beta) <= IMPATIENT:
        raise PlanError(
            "The patience is out of range",
            expected=f"a probability from {PATIENT:g} (patient) to {IMPATIENT:g}",
            received=repr(beta),
            remedy=f"leave it out to take {PATIENT:g}",
        )
    return float(beta)


def with_patience(plan: Plan, beta: float) -> AdaptivePlan:
    """The adaptive plan at another level of patience.

    Raises:
        PlanError: a fixed plan, which never gives up; a level out of range.

    >>> with_patience(AdaptivePlan(1000, [0.5]), 0.2).beta
    0.2
    """
    if not isinstance(plan, AdaptivePlan):
        raise PlanError(
            "Only an adaptive plan has a patience",
            expected="an adaptive plan",
            received=f"a {plan.kind} plan, which draws all its votes",
            remedy="use an adaptive plan, or leave the patience out",
        )
    return plan.with_beta(check_patience(beta))


@dataclass(frozen=True)
class PatienceCost:
    """What one level of patience costs on some images, beside the fixed plan with as many votes.

    Attributes:
        beta: the level.
        votes: mean votes of an image, selection included.
        share: of the votes of the fixed plan.
        floor: of the same, Wald's floor (`wald_floor`); None for a tree of more than one stage.
        lost: share of the images that only the fixed plan certifies, at the radius of the grid where that is most; with labels in
            certified accuracy.
        at: that radius.
        kept: mean certified radius over the fixed plan's; NaN where that certifies nothing.
    """

    beta: float
    votes: float
    share: float
    floor: float | None
    lost: float
    at: float
    kept: float


class Streams:
    """Votes of every image drawn once, cumulative at the looks of a plan, so that all levels and the fixed plan read the same."""

    def __init__(
        self, tree: Tree, plan: AdaptivePlan, shares: Mapping[str, Array], logits: Mapping[str, Array], seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        self.tree, self.logits, self.n0 = tree, logits, plan.n0
        self.select = {s: rng.multinomial(plan.n0, p) for s, p in shares.items()}
        self.upto: dict[str, dict[int, NDArray[np.int64]]] = {}
        for s, p in shares.items():
            drawn, total = 0, np.zeros(p.shape, np.int64)
            self.upto[s] = {0: total}
            for look in plan.looks:
                total = total + rng.multinomial(look - drawn, p)
                self.upto[s][look], drawn = total, look

    def answer(self, request: VoteRequest) -> dict[str, NDArray[Any]]:
        """What `CertifyPolicy.update` takes for one request."""
        stages = [stage.name for stage in self.tree.by_network[request.network]]
        i = request.image
        if request.purpose == PASS:
            return {s: self.logits[s][i] for s in stages}
        if request.purpose == SELECT:
            return {s: self.select[s][i] for s in stages}
        return {s: self.upto[s][request.start + request.count][i] - self.upto[s][request.start][i] for s in stages}


def run(streams: Streams, plan: Plan, split: AlphaSplit, count: int, rule: str, sides: str) -> CertifyPolicy:
    """The real policy on `count` images, whose votes are read from `streams`."""
    policy = CertifyPolicy(streams.tree, plan, split, count, rule=rule, sides=sides)
    while not policy.done.all():
        requests = policy.next_requests(np.flatnonzero(~policy.done).tolist())
        policy.update(requests, [streams.answer(r) for r in requests])
    return policy


def patience_costs(
    tree: Tree,
    plan: AdaptivePlan,
    split: AlphaSplit,
    shares: Mapping[str, ArrayLike],
    *,
    levels: Sequence[float] = LEVELS,
    rule: str = "tree",
    sides: str = "two",
    labels: ArrayLike | None = None,
    logits: Mapping[str, ArrayLike] | None = None,
    seed: int = 0,
) -> tuple[PatienceCost, ...]:
    """Expected votes and loss of an adaptive plan at several levels of patience, given each image's vote probabilities.

    By simulation: the real `CertifyPolicy` decides on multinomial votes. All levels, and the fixed plan, read the same votes, as
    they do in the engine, so that differences between them vary little.

    Args:
        tree, plan, split, rule, sides: what is certified; the plan's own `beta` takes no part.
        shares: by voting stage `(N, L)` probabilities of the outcomes, invalid votes last.
        levels: of patience.
        labels: `(N,)` classes; the loss is then in certified accuracy.
        logits: by deterministic stage `(N, L - 1)`.
        seed: of the simulation.

    Raises:
        PlanError: a level out of range, shares that are not probabilities, or do not fit the tree.

    >>> tree = Tree.of([Stage("vote", 0.5, leads_to=(0, 1))])
    >>> split = AlphaSplit.even(0.001, tree.paths)
    >>> plan = AdaptivePlan(10_000, [0.0, 0.25, 0.5, 0.75])
    >>> shares = np.linspace(0.5, 1.0, 50)
    >>> of = {"vote": np.stack([shares, 1.0 - shares], 1)}
    >>> patient, impatient = patience_costs(tree, plan, split, of, levels=(0.01, 0.5), sides="one")
    >>> impatient.votes < patient.votes, impatient.lost >= patient.lost
    (True, True)
    """
    levels = [check_patience(beta) for beta in levels]
    chances = {name: _chances(stage, shares, len(tree.stages)) for name, stage in tree.stages.items() if stage.votes}
    passed = {name: np.asarray(values, dtype=np.float64) for name, values in (logits or {}).items()}
    sizes = {len(p) for p in (*chances.values(), *passed.values())}
    silent = {name for name, stage in tree.stages.items() if not stage.votes}
    if len(sizes) != 1 or 0 in sizes or set(passed) != silent or (labels is not None and np.shape(labels) != (*sizes,)):
        raise PlanError(
            "Vote probabilities do not fit the tree",
            expected=f"as many images for every stage of {sorted(tree.stages)}, at least one",
            received=f"{sorted(sizes)} images, logits of {sorted(passed)}",
            remedy="give shares of every voting stage, logits of every other, and a label for each image or none",
        )
    (count,) = sizes
    streams = Streams(tree, plan, chances, passed, seed)
    fixed = run(streams, FixedPlan(plan.n0, plan.n_max), split, count, rule, sides)
    right = np.ones(count, bool) if labels is None else fixed.c == np.asarray(labels)
    grid = np.array([0.0, *plan.radii])
    floor = _floor(tree, plan, split, chances, sides)

    def votes(policy: CertifyPolicy) -> float:
        return float(np.mean([policy.drawn(i) for i in range(count)]))

    def certified(policy: CertifyPolicy) -> Array:
        held = (policy.radius[:, None] >= grid) & (policy.radius[:, None] > 0) & right[:, None]
        return np.asarray(held.mean(0))

    full, best = votes(fixed), certified(fixed)
    found = []
    for beta in levels:
        policy = run(streams, plan.with_beta(beta), split, count, rule, sides)
        lost, drawn = best - certified(policy), votes(policy)
        worst = int(lost.argmax())
        total = float(fixed.radius.sum())
        kept = float(policy.radius.sum()) / total if total > 0 else float("nan")
        least = None if floor is None else floor(beta) / full
        found.append(PatienceCost(beta, drawn, drawn / full, least, float(lost[worst]), float(grid[worst]), kept))
    return tuple(found)


def _chances(stage: Stage, shares: Mapping[str, ArrayLike], stages: int) -> Array:
    try:
        p = np.asarray(shares[stage.name], dtype=np.float64)
    except KeyError as error:
        raise PlanError(
            f"Stage {stage.name!r} has no vote probabilities",
            expected=f"shares of all {stages} stages that vote",
            received=str(sorted(shares)),
            remedy="give each stage (N, L) probabilities",
        ) from error
    fits = p.ndim == 2 and p.shape[1] == stage.num_outcomes
    if not fits or not np.all((p >= 0) & (p <= 1)) or not np.allclose(p.sum(1), 1.0, atol=1e-9):
        raise PlanError(
            f"The values for stage {stage.name!r} are not vote probabilities",
            expected=f"(N, {stage.num_outcomes}) numbers from 0 to 1, rows summing to 1",
            received=str(p.shape) if not fits else "other sums, or numbers out of range",
            remedy="give the probability of every outcome under noise, invalid votes last",
        )
    return np.asarray(p / p.sum(1, keepdims=True))


def _floor(
    tree: Tree, plan: AdaptivePlan, split: AlphaSplit, chances: Mapping[str, Array], sides: str
) -> Callable[[float], float] | None:
    """Mean of Wald's floor by beta, selection votes included; None where it is not one vote, bounded on one side."""
    stage = next(iter(tree.stages.values()))
    if len(tree.stages) != 1 or not stage.votes or stage.kind != "plurality" or sides != "one":
        return None
    edges = ndtr(np.array([0.0, *plan.radii]) / stage.sigma)
    top, alpha = chances[stage.name].max(1), split.stages[stage.name]
    return lambda beta: plan.n0 + float(wald_floor(top, edges, plan.n_max, alpha, beta).mean())


def wald_floor(share: ArrayLike, edges: ArrayLike, n: int, alpha: float, beta: float) -> Array:
    """The fewest mean votes that settle each image's cell, and n at most (Wald 1945).

    What any sequential test needs on average to tell a share from the cell's lower edge with error alpha, or from its upper edge
    with error beta, whichever are more. A plan may stay below it: near an edge it stops once the votes that are left cannot reach
    the cell.

    Args:
        share: `(N,)` vote share of the top class.
        edges: vote shares of the grid's radii, ascending.
        n: the most votes.
        alpha, beta: errors of accepting, and of giving up.

    >>> wald_floor([0.5, 0.999], [0.5, 0.9], 1000, 0.001, 0.01).round().tolist()
    [1000.0, 68.0]
    """
    p = np.clip(np.asarray(share, dtype=np.float64), 1e-12, 1 - 1e-12)
    cuts = np.asarray(edges, dtype=np.float64)

    def needed(edge: Array, miss: float, other: float) -> Array:
        with np.errstate(divide="ignore"):
            apart = p * np.log(p / edge) + (1 - p) * np.log((1 - p) / (1 - edge))
            wald = (1 - other) * np.log((1 - other) / miss) + other * np.log(other / (1 - miss))
            return np.asarray(wald / np.maximum(apart, 0.0))

    cell = np.searchsorted(cuts, np.asarray(share), side="right")
    last = len(cuts) - 1
    below = np.where(cell > 0, needed(cuts[np.maximum(cell - 1, 0)], alpha, beta), 0.0)
    above = np.where(cell <= last, needed(cuts[np.minimum(cell, last)], beta, alpha), 0.0)
    return np.minimum(np.maximum(below, above), n)


@cache
def uniform_shares(count: int = 400) -> Array:
    """`(count, 2)` vote probabilities of a top class that is uniform on [1/2, 1], and of the rest: images of which nothing is
    known, as in `mean_radius_ratio`.

    >>> uniform_shares(3).tolist()
    [[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]
    """
    top = np.linspace(0.5, 1.0, count)
    return np.stack([top, 1.0 - top], axis=1)


def patience_of(
    sigma: float, n: int, alpha: float = 1e-3, *, radii: Sequence[float] = (), levels: Sequence[float] = LEVELS, seed: int = 0
) -> tuple[PatienceCost, ...]:
    """`patience_costs` of one expert whose vote shares are uniform on [1/2, 1], bounded on one side (Cohen et al. 2019).

    Args:
        sigma: noise level in [0,1]-pixel units.
        n: the most votes.
        alpha: failure probability.
        radii: the grid; none: multiples of sigma / 2. Those beyond reach are left out.

    Raises:
        PlanError: an argument that cannot be.

    >>> patient, hasty = patience_of(0.5, 10_000, levels=(0.01, 0.5))
    >>> round(patient.share, 1), round(hasty.share, 1)
    (0.3, 0.1)
    """
    tree = Tree.of([Stage("vote", sigma, leads_to=(0, 1))])
    split = AlphaSplit.even(alpha, tree.paths)
    reach = FixedPlan(100, n).reach(tree, split, "one")
    plan = AdaptivePlan(n, tuple(radii) or tuple(np.arange(0.0, max(reach, sigma), sigma / 2.0))).within(reach)
    return patience_costs(tree, plan, split, {"vote": uniform_shares()}, levels=levels, sides="one", seed=seed)


__all__ = [
    "LEVELS",
    "PatienceCost",
    "check_patience",
    "patience_costs",
    "patience_of",
    "uniform_shares",
    "wald_floor",
    "with_patience",
]
