"""A certificate as a function of its stored votes: what an audit computes again for every row of a table.

Selection votes give the class, the path and the references; estimation votes at completed looks give the
bounds; the recursion of `rsrouter.core.certificates` gives the radius. It shares the bounds and the recursion
with `CertifyPolicy`, and nothing of the policy's bookkeeping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.bounds import AlphaSplit, Array
from rsrouter.core.certificates import entry_radii, group_entries, no_entries, recursion
from rsrouter.core.errors import PlanError
from rsrouter.core.estimates import check_sides
from rsrouter.core.plans import Plan
from rsrouter.core.requests import check_split, descend, stages_by_network
from rsrouter.core.tree import Stage, Tree
from rsrouter.core.types import ABSTAIN, RULES, Certificate

#: Votes of one image: purpose ("select", "estimate", "earlier") to stage to counts, as a results table stores them.
Votes = Mapping[str, Mapping[str, Sequence[int]]]


@dataclass
class StoredVotes:
    """Votes of one image, checked, with what the selection votes fix.

    Attributes:
        c: the class to certify, ABSTAIN where the selection answers nothing.
        path: (stage, index of its target) from the root to the answer.
        selected: selection votes by stage.
        looks: by stage its completed looks, as (index of the look, cumulative counts), the last one at the end.
        reference: by stage the outcome whose lower bound counts, -1 for none.
    """

    c: int = ABSTAIN
    path: list[tuple[str, int]] = field(default_factory=list)
    selected: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    looks: dict[str, list[tuple[int, NDArray[np.int64]]]] = field(default_factory=dict)
    reference: dict[str, int] = field(default_factory=dict)


def recompute(
    tree: Tree, plan: Plan, split: AlphaSplit, votes: Sequence[Votes], *, rule: str = "tree", sides: str = "two"
) -> list[Certificate | PlanError]:
    """The certificates that stored votes support.

    Args:
        tree, plan, split, rule, sides: what the votes were drawn for.
        votes: per image its selection votes, its estimation votes, and those of earlier looks that a bound stands on.

    Returns:
        Per image its certificate, or a PlanError where such votes cannot come from this tree and plan (a sum that
        is no look of the plan, a stage that does not exist, a selection that stops half way).

    Raises:
        PlanError: an unknown rule or side, or a split of another tree.
    """
    check_sides(sides)
    if rule not in RULES:
        raise PlanError("Unknown rule", expected=f"one of {RULES}", received=repr(rule), remedy="use rule='tree'")
    check_split(tree, split)
    rows: list[StoredVotes | PlanError] = []
    for one in votes:
        try:
            rows.append(read_votes(tree, plan, one))
        except PlanError as error:
            rows.append(error)
    sound = [row for row in rows if isinstance(row, StoredVotes)]
    certificates = iter(_certify(tree, plan, split, sound, rule, sides))
    return [row if isinstance(row, PlanError) else next(certificates) for row in rows]


def _certify(tree: Tree, plan: Plan, split: AlphaSplit, rows: list[StoredVotes], rule: str, sides: str) -> list[Certificate]:
    classes = np.array([row.c for row in rows], dtype=np.int64)
    grouped: dict[str, Array] = {}
    nearest: dict[str, Array] = {}
    for name in tree.order:
        stage = tree.stages[name]
        lower, upper = np.zeros((len(rows), stage.num_outcomes)), np.ones((len(rows), stage.num_outcomes))
        reference = np.array([row.reference.get(name, -1) for row in rows], dtype=np.int64)
        flat = [(i, look, counts) for i, row in enumerate(rows) for look, counts in row.looks.get(name, [])]
        if flat:
            at = np.array([i for i, _, _ in flat])
            bounds = plan.bounds(
                stage,
                np.stack([counts for _, _, counts in flat]),
                np.array([look for _, look, _ in flat]),
                reference[at],
                classes[at],
                alpha=split.stages[name],
                sides=sides,
                lower_share=split.lower_share,
            )
            # the bounds of all looks hold at once
            np.maximum.at(lower, at, bounds.lower)
            np.minimum.at(upper, at, bounds.upper)
        entry = entry_radii(stage, lower, upper, reference)
        sampled = np.array([name in row.looks for row in rows], dtype=bool)
        on_path = np.array([any(name == s for s, _ in row.path) for row in rows], dtype=bool)
        counted = sampled & on_path if rule == "min" else sampled
        grouped[name] = np.where(counted[:, None], group_entries(stage, entry, classes), no_entries(stage, classes))
        nearest[name] = np.where(sampled[:, None], entry, 0.0)
    radius, by = recursion(tree, grouped)
    return [
        _certificate(tree, plan, row, float(radius[i]), tree.order[by[i]], {s: e[i] for s, e in nearest.items()})
        for i, row in enumerate(rows)
    ]


def _certificate(
    tree: Tree, plan: Plan, row: StoredVotes, radius: float, bound_by: str, entry: Mapping[str, Array]
) -> Certificate:
    certified = radius > 0.0 and row.c > ABSTAIN
    r_router, r_expert = (np.inf, 0.0) if row.c > ABSTAIN else (0.0, 0.0)
    for position, (name, index) in enumerate(row.path if row.c > ABSTAIN else []):
        least = float(np.delete(entry[name], index).min())
        if position < len(row.path) - 1:
            r_router = min(r_router, least)
        else:
            r_expert = least
    networks = {tree.stages[s].network: looks[-1][0] for s, looks in row.looks.items()}
    drawn = sum(plan.looks[look] for look in networks.values())
    drawn += plan.n0 * len({tree.stages[s].network for s in row.selected})
    last = row.path[-1][0]
    return Certificate(
        predict=row.c if certified else ABSTAIN,
        radius=radius if certified else 0.0,
        expert=tree.stages[last].expert,
        n_drawn=drawn,
        counts={s: tuple(looks[-1][1].tolist()) for s, looks in row.looks.items()},
        bound_by=bound_by if row.c > ABSTAIN else last,
        selection={s: tuple(v.tolist()) for s, v in row.selected.items()},
        r_router=float(r_router),
        r_expert=r_expert,
        earlier={f"{s}@{plan.looks[k]}": tuple(v.tolist()) for s, looks in row.looks.items() for k, v in looks[:-1]},
    )


def _counts(stage: Stage, votes: Sequence[int]) -> NDArray[np.int64]:
    counts = np.asarray(votes, dtype=np.int64)
    if counts.shape != (stage.num_outcomes,) or np.any(counts < 0):
        raise PlanError(
            f"Votes of stage {stage.name!r} do not fit it",
            expected=f"{stage.num_outcomes} counts of at least 0",
            received=str(list(votes)),
            remedy="the table belongs to another router, or was edited",
        )
    return counts


def read_votes(tree: Tree, plan: Plan, votes: Votes) -> StoredVotes:
    """The votes of one image, checked against tree and plan.

    Raises:
        PlanError: votes that cannot come from them.
    """
    row = StoredVotes()
    place = {n: k for k, n in enumerate(plan.looks)}
    select, estimate, earlier = (votes.get(purpose, {}) for purpose in ("select", "estimate", "earlier"))
    unknown = sorted(({*select, *estimate} | {key.rpartition("@")[0] for key in earlier}) - set(tree.stages))
    if unknown:
        raise PlanError(
            "Votes of stages that the tree does not have",
            expected=f"some of {sorted(tree.stages)}",
            received=str(unknown),
            remedy="the table belongs to another router",
        )
    for name, counts in select.items():
        row.selected[name] = _sum_to(_counts(tree.stages[name], counts), (plan.n0,), name, "selection")
    for name, counts in estimate.items():
        last = _sum_to(_counts(tree.stages[name], counts), plan.looks, name, "estimation")
        row.looks[name] = [(place[int(last.sum())], last)]
    for key, counts in earlier.items():
        name = key.rpartition("@")[0]
        before = _sum_to(_counts(tree.stages[name], counts), plan.looks, name, "earlier")
        final = row.looks.get(name, [(-1, before)])[-1]
        if not (place[int(before.sum())] < final[0] and np.all(before <= final[1])):
            raise PlanError(
                f"An earlier look of stage {name!r} is not part of its last one",
                expected="fewer votes, of every outcome at most as many",
                received=str(before.tolist()),
                remedy="the row was edited",
            )
        row.looks[name].insert(-1, (place[int(before.sum())], before))
    for network, stages in stages_by_network(tree).items():
        for what, sums in (
            ("selection", {s.name: s.name in row.selected for s in stages}),
            ("estimation", {s.name: row.looks[s.name][-1][0] if s.name in row.looks else -1 for s in stages}),
        ):
            if len(set(sums.values())) > 1:
                raise PlanError(
                    f"Stages on network {network!r} have different numbers of {what} votes",
                    expected="one forward pass, one vote each",
                    received=str(sums),
                    remedy="the row was edited",
                )
    _descend(tree, row)
    if row.c <= ABSTAIN and row.looks:
        raise PlanError(
            "Estimation votes where the selection answers nothing",
            expected="none",
            received=str(sorted(row.looks)),
            remedy="the row was edited",
        )
    return row


def _sum_to(counts: NDArray[np.int64], sums: Sequence[int], name: str, what: str) -> NDArray[np.int64]:
    if int(counts.sum()) not in sums:
        raise PlanError(
            f"The {what} votes of stage {name!r} do not sum to a look of the plan",
            expected=f"one of {tuple(sums)}",
            received=str(int(counts.sum())),
            remedy="the table was drawn under another plan, or edited",
        )
    return counts


def _descend(tree: Tree, row: StoredVotes) -> None:
    """Class, path and references: all from selection votes."""
    at: int | str = tree.root
    while isinstance(at, str):
        if at not in row.selected:
            raise PlanError(
                f"The selection stops before stage {at!r}",
                expected=f"selection votes of {at!r}",
                received=str(sorted(row.selected)),
                remedy="the row was edited",
            )
        index = descend(tree, at, row.selected[at])
        row.path.append((at, index))
        at = tree.stages[at].leads_to[index]
    row.c = at
    if row.c <= ABSTAIN:
        return
    on_path = dict(row.path)
    for name, stage in tree.stages.items():
        same = np.flatnonzero(stage.answers[: stage.num_outcomes] == row.c)
        reference = int(same[0]) if same.size else -1
        if name in on_path:
            index = on_path[name]
            # the outcome that won the selection, unless a threshold stage deferred
            if index < stage.num_outcomes and (stage.kind == "plurality" or name == row.path[-1][0]):
                reference = index
        elif reference < 0 and stage.kind == "plurality" and name in row.selected:
            reference = int(row.selected[name].argmax())
        row.reference[name] = reference


__all__ = ["StoredVotes", "Votes", "read_votes", "recompute"]
