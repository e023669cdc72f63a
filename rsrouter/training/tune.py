"""Tuning a cascade: which experts to ask, in which order, and how sure each must be; chosen on validation images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rsrouter.core.bounds import Array
from rsrouter.core.errors import InputError
from rsrouter.experts.pool import ExpertPool
from rsrouter.inputs import check_images, check_labels
from rsrouter.router.cascade import CascadeRouter
from rsrouter.sampling.execution import Execution
from rsrouter.training.labels import label_votes
from rsrouter.training.simulate import SimulatedVotes, accuracy, chain_radius, expert_radius

Chain = tuple[tuple[str, float | None], ...]

#: Noise of tuning votes: no certificate sees it.
TUNE = "tune"
#: Thresholds that are tried.
TAUS = (0.505, 0.53, 0.56, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.94, 0.97, 0.99)


@dataclass(frozen=True)
class Goal:
    """What a routed classifier should reach.

    Attributes:
        radii: the radii the user cares about.
        envelope: `(R,)` certified accuracy of the best single expert at each of them.
        floor, strictness: where some radius falls below `floor` times the envelope, the largest shortfall costs
            `strictness` times itself.
    """

    radii: tuple[float, ...]
    envelope: Array
    floor: float = 0.915
    strictness: float = 5.0

    def coverage(self, reached: Array) -> float:
        """Mean over radii of reached / envelope, over radii that some expert holds."""
        ratio = self._ratio(reached)
        return float(ratio.mean()) if ratio.size else 1.0

    def score(self, reached: Array) -> float:
        """Coverage less `strictness` times the largest shortfall below `floor`."""
        ratio = self._ratio(reached)
        return float(ratio.mean() - self.strictness * max(0.0, self.floor - float(ratio.min()))) if ratio.size else 1.0

    def _ratio(self, reached: Array) -> Array:
        some = self.envelope > 0
        return np.asarray(reached[some] / self.envelope[some])


def goal_of(experts: Mapping[str, SimulatedVotes], labels: NDArray[np.int64], radii: Sequence[float], alpha: float) -> Goal:
    """The experts' own certified accuracy as the goal."""
    grid = tuple(sorted({float(r) for r in radii}))
    each = [accuracy(*expert_radius(v, alpha), labels, grid) for v in experts.values()]
    return Goal(grid, np.max(each, axis=0))


def search_chain(
    voters: Mapping[str, SimulatedVotes],
    labels: NDArray[np.int64],
    goal: Goal,
    alpha: float,
    *,
    max_stages: int = 3,
    beam: int = 8,
    last: Sequence[str] | None = None,
) -> tuple[Chain, float]:
    """The chain of best score, by beam search: a stage is put in front of, or between, those that stand.

    Args:
        voters: votes of everything that may be asked.
        labels: `(N,)` true classes.
        goal: what counts.
        max_stages: the longest chain.
        beam: chains kept per length.
        last: voters that may stand last; None: any.

    Returns:
        The chain and its score; of equal scores the shorter chain.
    """

    def score(chain: Chain) -> float:
        return goal.score(accuracy(*chain_radius(voters, chain, alpha), labels, goal.radii))

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


def tune_cascade(
    pool: ExpertPool,
    images: Tensor,
    labels: Tensor,
    radii: Sequence[float],
    *,
    n: int = 400,
    plan_n: int = 10_000,
    n0: int = 100,
    alpha: float = 1e-3,
    max_stages: int = 3,
    seed: int = 0,
    votes: NDArray[np.int64] | None = None,
    device: str | None = None,
    execution: Execution | None = None,
    progress: Callable[[int], None] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> CascadeRouter:
    """Chooses order and thresholds of a cascade on validation images.

    Args:
        pool: the experts.
        images: `(N, C, H, W)` pixels in [0,1] that no expert was trained on.
        labels: `(N,)` class indices.
        radii: the radii the user cares about.
        n: votes per expert and image that are drawn here; shares are then scaled to `plan_n`.
        plan_n, n0: votes of the certification this is tuned for.
        alpha: of that certification.
        max_stages: the longest chain.
        seed: of the noise (purpose "tune": no certificate sees it).
        votes: `(N, K, classes + 1)` votes drawn before (`label_votes`), instead of drawing.
        device, execution: where and how the experts run.
        progress: called with the number of votes drawn since the last call.
        log: called with what was found.

    Raises:
        InputError: images, labels or votes that do not fit, or a pool of one expert.
    """
    x = check_images(images, pool.input_shape)
    target = check_labels(labels, len(x), pool.num_classes).numpy()
    if len(pool) < 2:
        raise InputError(
            "A cascade needs two experts", expected="a pool of two or more", received=str(len(pool)), remedy="use Smooth(expert)"
        )
    if votes is None:
        votes = label_votes(pool, x, n=n, seed=seed, device=device, execution=execution, purpose=TUNE, progress=progress)
    voters = simulate_pool(pool, votes, plan_n=plan_n, n0=n0, seed=seed)
    goal = goal_of(voters, target, radii, alpha)
    chain, score = search_chain(voters, target, goal, alpha, max_stages=max_stages)
    if len(chain) == 1:  # one expert is best everywhere: ask it, then nobody else can be asked
        others = [name for name in voters if name != chain[0][0]]
        chain = ((others[0], TAUS[-1]), chain[0])
    if log is not None:
        reached = accuracy(*chain_radius(voters, chain, alpha), target, goal.radii)
        log(
            {
                "kind": "cascade",
                "chain": [list(stage) for stage in chain],
                "score": score,
                "coverage": goal.coverage(reached),
                "accuracy": reached.tolist(),
                "envelope": goal.envelope.tolist(),
                "radii": list(goal.radii),
                "images": len(x),
            }
        )
    return CascadeRouter([tau for _, tau in chain if tau is not None], [name for name, _ in chain])


def simulate_pool(pool: ExpertPool, votes: NDArray[np.int64], *, plan_n: int, n0: int, seed: int) -> dict[str, SimulatedVotes]:
    """`SimulatedVotes` of every expert from few votes `(N, K, classes + 1)`; InputError for another shape."""
    if votes.ndim != 3 or votes.shape[1:] != (len(pool), pool.num_classes + 1):
        raise InputError(
            "Votes do not fit the pool",
            expected=f"(N, {len(pool)}, {pool.num_classes + 1})",
            received=str(votes.shape),
            remedy="pass what label_votes returned",
        )
    rng = np.random.default_rng(seed)
    return {e.name: SimulatedVotes.draw(votes[:, k, :-1], e.sigma, plan_n, n0, rng) for k, e in enumerate(pool)}
