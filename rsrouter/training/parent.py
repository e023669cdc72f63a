"""Going on from a published router: its parameters where the shapes allow, after experts came or went too."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.describe import build_module, describe_module
from rsrouter.experts.pool import ExpertPool
from rsrouter.router.base import Router
from rsrouter.router.cascade import CascadeRouter
from rsrouter.router.flat import FlatRouter
from rsrouter.training.simulate import SimulatedVotes, accuracy, chain_radius
from rsrouter.training.tune import TAUS, Chain, Goal


def adapt_flat(old: FlatRouter, old_pool: ExpertPool, pool: ExpertPool, seed: int) -> FlatRouter | None:
    """`old` over the experts of `pool`: every tensor is kept, the last layer's rows follow the experts by name.

    New experts get rows of a fresh initialisation. None where that cannot be done: the trunk is gone, or the module's last layer
    cannot be told.
    """
    before, after = old.order(old_pool), tuple(pool.names)
    if old.trunk is not None and old.trunk not in pool.names:
        return None
    if set(before) == set(after):
        return FlatRouter(copy.deepcopy(old.module), sigma=old.sigma, experts=before, trunk=old.trunk)
    try:
        description = _widened(describe_module(old.module), len(before), len(after))
    except CheckpointError:
        return None
    if description is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_module(description)
    state, rows = old.module.state_dict(), [(after.index(n), before.index(n)) for n in after if n in before]
    new = {}
    for name, fresh in module.state_dict().items():
        kept = state.get(name)
        new[name] = fresh if kept is None else _moved(kept, fresh, rows, len(before), len(after))
    module.load_state_dict(new)
    return FlatRouter(module, sigma=old.sigma, experts=after, trunk=old.trunk)


def _moved(kept: Tensor, fresh: Tensor, rows: Sequence[tuple[int, int]], before: int, after: int) -> Tensor:
    """`kept` where it has the shape, its experts' rows where only their number differs, else `fresh`."""
    if kept.shape == fresh.shape:
        return kept.clone()
    if kept.shape[:1] == (before,) and fresh.shape[:1] == (after,) and kept.shape[1:] == fresh.shape[1:]:
        out = fresh.clone()
        for new, old in rows:
            out[new] = kept[old]
        return out
    return fresh


def _widened(description: dict[str, Any], before: int, after: int) -> dict[str, Any] | None:
    """The description with `after` outputs instead of `before`; None where its last layer is not plain."""
    if "architecture" in description:
        kwargs = dict(description["kwargs"])
        if kwargs.get("num_classes") != before or "description" in kwargs:
            return None
        return {**description, "kwargs": {**kwargs, "num_classes": after}}
    if description.get("layer") == "Sequential" and description["children"]:
        *rest, last = description["children"]
        changed = _widened(last, before, after)
        return None if changed is None else {**description, "children": [*rest, changed]}
    if description.get("layer") == "Linear" and description["kwargs"].get("out_features") == before:
        return {**description, "kwargs": {**description["kwargs"], "out_features": after}}
    return None


def parent_heads(old: Router) -> dict[str, nn.Module]:
    """Trained heads that a new training may start from, by name."""
    return {} if isinstance(old, FlatRouter) else dict(old.modules.items())


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


def descend(
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
