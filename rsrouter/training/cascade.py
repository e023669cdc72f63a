"""Cascades of plain experts: order and thresholds chosen on validation images."""

from __future__ import annotations

import numpy as np

from rsrouter.core.errors import InputError
from rsrouter.experts.pool import ExpertPool
from rsrouter.process import usual_settings
from rsrouter.router.base import Router
from rsrouter.router.cascade import CascadeRouter
from rsrouter.training.chains import (
    TAUS,
    Chain,
    Frontier,
    accuracy,
    chain_radius,
    chosen_line,
    goal_of,
    improve_thresholds,
    search_chain,
)
from rsrouter.training.doubts import doubts
from rsrouter.training.record import TUNE, Training
from rsrouter.training.simulated import simulate_pool

#: Votes per expert and validation image that a cascade is tuned on.
TUNE_VOTES = 400


def check_two(pool: ExpertPool) -> None:
    """InputError for a pool of one expert."""
    if len(pool) < 2:
        raise InputError(
            "A router needs two experts", expected="a pool of two or more", received=str(len(pool)), remedy="use Smooth(expert)"
        )


def parent_chain(old: Router, old_pool: ExpertPool, pool: ExpertPool) -> Chain | None:
    """A cascade's experts and thresholds without the experts that are gone; None where fewer than two are left."""
    if not isinstance(old, CascadeRouter):
        return None
    names = old.order(old_pool)
    kept: list[tuple[str, float | None]] = []
    for name, tau in zip(names, (*old.thresholds, None), strict=True):
        if name in pool.names and (not kept or kept[-1][0] != name):
            kept.append((name, tau))
    if len(kept) < 2:
        return None
    return (*((n, TAUS[-1] if t is None else t) for n, t in kept[:-1]), (kept[-1][0], None))


@usual_settings()
def tune_cascade(training: Training, *, n: int | None = None, max_stages: int = 3) -> CascadeRouter:
    """Chooses order and thresholds of a cascade on the validation images; a parent's chain is searched further if that is better.

    Args:
        training: pool, validation images, radii, plan and wishes.
        n: votes per expert and image that are drawn (purpose "tune": no certificate sees their noise); shares are then scaled to
            the plan's. None: 400.
        max_stages: the longest chain.

    Raises:
        InputError: no validation images, or a pool of one expert.
    """
    training = training.checked()
    pool, (images, classes) = training.pool, training.held_out
    labels = classes.numpy()
    check_two(pool)
    votes = training.expert_votes(images, TUNE_VOTES if n is None else n, TUNE)
    voters = simulate_pool(pool, votes, plan_n=training.plan_n, rng=np.random.default_rng(training.seed))
    goal = goal_of(voters, labels, training.radii, training.alpha, **training.wishes)
    training.doubt(doubts(goal, voters, labels, pool.num_classes))
    frontier = Frontier(goal)
    chain, score = search_chain(voters, labels, goal, training.alpha, max_stages=max_stages, frontier=frontier)
    if len(chain) == 1:  # one expert is best everywhere: ask it, then nobody else can be asked
        others = [name for name in voters if name != chain[0][0]]
        chain = ((others[0], TAUS[-1]), chain[0])
        score = goal.score(accuracy(*chain_radius(voters, chain, training.alpha), labels, goal.radii))
    parent = training.parent
    start = None if parent is None else parent_chain(parent.router, parent.pool, pool)
    if start is not None:
        further, reached = improve_thresholds(voters, labels, goal, training.alpha, start)
        training.say({"kind": "cascade", "chain": [list(stage) for stage in further], "score": reached, "start": "parent"})
        chain = further if reached > score else chain
    training.say({"kind": "cascade", **chosen_line(goal, voters, labels, training.alpha, chain, frontier)})
    return CascadeRouter([tau for _, tau in chain if tau is not None], [name for name, _ in chain])
