"""The largest radius that a plan can certify at all: what unanimous votes give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rsrouter.core.bounds import MOST_VOTES, AlphaSplit, Array
from rsrouter.core.certificates import entry_radii, group_entries, recursion
from rsrouter.core.tree import Tree

if TYPE_CHECKING:
    from rsrouter.core.plans import Plan


def unanimous_radius(plan: Plan, tree: Tree, path: tuple[str, ...], split: AlphaSplit, sides: str) -> float:
    """Radius when every stage on `path` is unanimous for the next one, and all other votes are for one class."""
    c = np.zeros(1, dtype=np.int64)
    for name in tree.order:
        stage = tree.stages[name]
        answered = np.flatnonzero(stage.answers[: stage.num_outcomes] >= 0)
        if answered.size:
            c = np.array([int(stage.answers[answered[0]])])
    grouped: dict[str, Array] = {}
    for name in tree.order:
        stage = tree.stages[name]
        same = np.flatnonzero(stage.answers[: stage.num_outcomes] == c[0])
        reference = np.array([int(same[0]) if same.size else -1])
        if name in path[:-1]:
            following = path[path.index(name) + 1]
            leads = [i for i, t in enumerate(stage.leads_to[: stage.num_outcomes]) if t == following]
            reference = np.array([leads[0] if leads else -1])
        elif not same.size and stage.kind == "plurality":
            reference = np.array([0])
        counts = np.zeros((1, stage.num_outcomes), dtype=np.int64)
        if reference[0] >= 0:
            counts[0, reference[0]] = plan.n_max
        bounds = plan.hopes(
            stage,
            counts,
            np.array([len(plan.looks) - 1]),
            reference,
            c,
            alpha=split.stages[name],
            sides=sides,
            lower_share=split.lower_share,
        )
        grouped[name] = group_entries(stage, entry_radii(stage, bounds.lower, bounds.upper, reference), c)
    return float(recursion(tree, grouped)[0][0])


def votes_for(plan: Plan, tree: Tree, split: AlphaSplit, sides: str, radius: float) -> int | None:
    """About the smallest `n_max` (within 0.1%) with which `plan` reaches `radius`; None beyond `MOST_VOTES`."""
    need = plan.n_max
    while plan.with_votes(need).reach(tree, split, sides) < radius:
        need *= 2
        if need > MOST_VOTES:
            return None
    low = need // 2
    while need - low > max(1, need // 1000):
        middle = (low + need) // 2
        if plan.with_votes(middle).reach(tree, split, sides) < radius:
            low = middle
        else:
            need = middle
    return need
