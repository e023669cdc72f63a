"""Patience on the images of a table: votes saved and certificates lost, from the votes that it stores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsrouter.core.bounds import Array
from rsrouter.core.errors import ResultsError
from rsrouter.core.patience import LEVELS, PatienceCost, patience_costs
from rsrouter.core.plans import AdaptivePlan, FixedPlan, Plan
from rsrouter.core.posterior import posterior_shares
from rsrouter.core.tree import Tree
from rsrouter.results.about import TableMetadata
from rsrouter.results.table import Table
from rsrouter.results.verify import require_sound


def adaptive_plan(about: TableMetadata, radii: Sequence[float] = ()) -> AdaptivePlan:
    """The table's plan, on the grid of `radii` where those are given; a fixed plan's adaptive one needs them.

    Raises:
        ResultsError: a fixed plan, and no radii.
    """
    plan: Plan = about.plan
    if isinstance(plan, AdaptivePlan) and not radii:
        return plan
    if not radii:
        raise ResultsError(
            "The table was certified with a fixed plan, which has no grid",
            expected="radii, the grid of the adaptive plan to look at",
            received="none",
            remedy="name the radii that you report",
        )
    made = plan.with_radii(radii) if isinstance(plan, AdaptivePlan) else AdaptivePlan(plan.n_max, radii, plan.n0)
    return made.within(FixedPlan(plan.n0, plan.n_max).reach(about.tree.tree, about.split, about.sides))


def table_patience(
    table: Table,
    *,
    levels: Sequence[float] = LEVELS,
    radii: Sequence[float] = (),
    most: int = 500,
    seed: int = 0,
) -> tuple[PatienceCost, ...]:
    """`patience_costs` on the images of a table: its tree and plan, and vote probabilities drawn from their posterior given the
    votes that it stores. Where every label is known, what is lost is certified accuracy.

    Args:
        table: with votes, and metadata of `certify`.
        levels: of patience.
        radii: the grid; none: the plan's own.
        most: images that are looked at, spread evenly over the table.
        seed: of the simulation.

    Raises:
        ResultsError: the table does not say how it was made, has no rows, or a fixed plan and no radii are given.
        IntegrityError: its rows do not follow from their votes.
        PlanError: a level that cannot be.
    """
    about = table.described()
    if not len(table):
        raise ResultsError(
            f"Table {table.name!r} is empty", expected="a row or more", received="none", remedy="certify some images first"
        )
    part = require_sound(table.take(np.unique(np.linspace(0, len(table) - 1, min(most, len(table))).astype(int))))
    tree = about.tree.tree
    counts, logits = _votes(part, tree)
    rng = np.random.default_rng(seed)
    return patience_costs(
        tree,
        adaptive_plan(about, radii),
        about.split,
        {name: posterior_shares(votes, rng) for name, votes in counts.items()},
        levels=levels,
        rule=about.rule,
        sides=about.sides,
        labels=part.label if part.labelled else None,
        logits=logits,
        seed=seed,
    )


def _votes(table: Table, tree: Tree) -> tuple[dict[str, Array], dict[str, Array]]:
    """By stage all votes that each row stores (selection votes only where there is nothing else), and logits."""
    counts = {s: np.zeros((len(table), stage.num_outcomes)) for s, stage in tree.stages.items() if stage.votes}
    logits = {s: np.full((len(table), stage.num_outcomes - 1), np.nan) for s, stage in tree.stages.items() if not stage.votes}
    for i in range(len(table)):
        votes = table.counts(i)
        for name, rows in counts.items():
            rows[i] = votes["estimate"].get(name, votes["select"].get(name, 0))
        for name, rows in logits.items():
            rows[i] = [np.nan if z is None else z for z in votes["logits"][name]]
    return counts, logits


__all__ = ["adaptive_plan", "table_patience"]
