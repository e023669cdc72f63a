"""A certificate as a function of its stored votes: what is computed again for every row of a table.

Selection votes give the class, the path and the references; estimation votes at completed looks give the
bounds, and the logits of deterministic stages their entry radii; the recursion of `rsrouter.core.certificates` gives the radius.
It shares the bounds and the recursion with `CertifyPolicy`, and nothing of the policy's bookkeeping. All images are computed at
once: ten thousand rows of a table take about a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.bounds import AlphaSplit, Array, binom_upper
from rsrouter.core.certificates import entry_radii, group_entries, no_entries, recursion
from rsrouter.core.errors import PlanError
from rsrouter.core.estimates import check_sides, check_split
from rsrouter.core.passes import pass_entries
from rsrouter.core.plans import Plan
from rsrouter.core.rows import Ints, StoredRows, StoredVotes, VoteColumns, Votes, read_votes
from rsrouter.core.tree import Stage, Tree
from rsrouter.core.types import ABSTAIN, RULES, Certificate

#: Relative room for another scipy: its quantiles err by about 1e-12.
ROOM = 1e-9


@dataclass
class Recomputed:
    """What stored votes support, of N images; where `faults` has an image, its other entries mean nothing.

    Attributes:
        predict, n_drawn: int64 `(N,)`.
        radius, r_router, r_expert: float64 `(N,)`.
        bound_by, expert: `(N,)` names; `expert` None without one.
        answered_by: `(N,)` name of the stage whose selection votes named the class.
        fixed_votes: int64 `(N,)` what a fixed plan would have drawn on the same networks, selection as drawn.
        faults: by image the PlanError that says why such votes cannot come from this tree and plan.
    """

    predict: Ints
    radius: Array
    r_router: Array
    r_expert: Array
    n_drawn: Ints
    bound_by: NDArray[np.object_]
    expert: NDArray[np.object_]
    answered_by: NDArray[np.object_]
    fixed_votes: Ints
    faults: dict[int, PlanError]
    read: StoredRows
    grouped: dict[str, Array]

    def may_be_bound_by(self, i: int, name: str) -> bool:
        """Whether rounding alone could have made stage `name` the one that limits the radius of image `i`."""
        tree = self.read.tree
        if name == self.bound_by[i] or name not in tree.stages or self.read.c[i] <= ABSTAIN:
            return bool(name == self.bound_by[i])
        entries = {s: entry[i : i + 1] * (1.0 - ROOM if s == name else 1.0) for s, entry in self.grouped.items()}
        return bool(tree.order[recursion(tree, entries)[1][0]] == name)

    def certificate(self, i: int) -> Certificate:
        """The certificate of image `i`; its PlanError is raised where it has none."""
        if i in self.faults:
            raise self.faults[i]
        looks, order = self.read.plan.looks, self.read.tree.order
        stages = {s: self.read.stages[s] for s in order}
        return Certificate(
            predict=int(self.predict[i]),
            radius=float(self.radius[i]),
            expert=self.expert[i],
            n_drawn=int(self.n_drawn[i]),
            counts={s: tuple(v.counts[i].tolist()) for s, v in stages.items() if v.look[i] >= 0},
            bound_by=str(self.bound_by[i]),
            selection={s: tuple(v.selection[i].tolist()) for s, v in stages.items() if v.chosen[i]},
            r_router=float(self.r_router[i]),
            r_expert=float(self.r_expert[i]),
            earlier={f"{s}@{looks[k]}": tuple(c.tolist()) for s in order for k, c in self.read.earlier(s, i)},
            logits={s: tuple(logits[i].tolist()) for s, logits in self.read.logits.items()},
        )


@dataclass(frozen=True)
class Moved:
    """A transfer to networks that vote a little differently (THEORY.md, section 7).

    Attributes:
        split: alpha of each stage's bound on disagreement.
        votes: paired draws for each stage and image.
    """

    split: AlphaSplit
    votes: int


def recompute(
    tree: Tree,
    plan: Plan,
    split: AlphaSplit,
    votes: Sequence[Votes],
    *,
    rule: str = "tree",
    sides: str = "two",
    moved: Moved | None = None,
) -> list[Certificate | PlanError]:
    """The certificates that stored votes support, one by one; `recompute_all` keeps them as arrays.

    Args:
        tree, plan, split, rule, sides: what the votes were drawn for.
        votes: per image its selection votes, its estimation votes, and those of earlier looks that a bound stands on.
        moved: the certificates are those of a transfer, and the votes name disagreements ("moved").

    Returns:
        Per image its certificate, or a PlanError where such votes cannot come from this tree and plan (a sum that
        is not a look of the plan, a stage that does not exist, a selection that stops half way).

    Raises:
        PlanError: an unknown rule or side, or a split of another tree.
    """
    found = recompute_all(tree, plan, split, votes, rule=rule, sides=sides, moved=moved)
    return [found.faults[i] if i in found.faults else found.certificate(i) for i in range(len(votes))]


def recompute_all(
    tree: Tree,
    plan: Plan,
    split: AlphaSplit,
    votes: Sequence[Votes] | VoteColumns,
    *,
    rule: str = "tree",
    sides: str = "two",
    moved: Moved | None = None,
) -> Recomputed:
    """What stored votes support, of all images at once; arguments and errors as `recompute`.

    >>> from rsrouter.core import AlphaSplit, FixedPlan, Tree, expert_stage
    >>> tree = Tree.of([expert_stage("sigma_0.5", 0.5, 2)])
    >>> votes = [{"select": {"sigma_0.5": [10, 0, 0]}, "estimate": {"sigma_0.5": [99, 1, 0]}}]
    >>> found = recompute_all(tree, FixedPlan(10, 100), AlphaSplit.even(0.001, tree.paths), votes)
    >>> found.predict.tolist(), found.radius.round(3).tolist()
    ([0], [0.671])
    """
    check_sides(sides)
    if rule not in RULES:
        raise PlanError("Unknown rule", expected=f"one of {RULES}", received=repr(rule), remedy="use rule='tree'")
    check_split(tree, split)
    columns = votes if isinstance(votes, VoteColumns) else VoteColumns.of(votes)
    read = StoredRows(tree, plan, columns)
    apart = _disagreements(read, columns, moved)
    n, rows = read.count, np.arange(read.count)
    grouped: dict[str, Array] = {}
    r_router, r_expert = np.full(n, np.inf), np.zeros(n)
    for position, name in enumerate(tree.order):
        stage, stored, reference, index = tree.stages[name], read.stages[name], read.reference[name], read.index[name]
        entry = _entries(read, stage, split, sides, reference, apart.get(name))
        sampled, on_path = (stored.look >= 0) | (not stage.votes), index >= 0
        counted = sampled & on_path if rule == "min" else sampled
        grouped[name] = np.where(counted[:, None], group_entries(stage, entry, read.c), no_entries(stage, read.c))
        # Dual RS's two terms: how far the selected path, and its answer, surely stay the same
        nearest = np.where(sampled[:, None], entry, 0.0)
        nearest[rows[on_path], index[on_path]] = np.inf
        least = nearest.min(1)
        answers = on_path & (read.last == position)
        r_expert = np.where(answers, least, r_expert)
        r_router = np.where(on_path & ~answers, np.minimum(r_router, least), r_router)
    radius, by = recursion(tree, grouped)
    answered = read.c > ABSTAIN
    certified = answered & (radius > 0.0)
    networks = {stage.network: read.stages[name] for name, stage in tree.stages.items() if stage.votes}
    looks = np.array([*plan.looks, 0])
    drawn = sum((looks[s.look] + plan.n0 * s.chosen for s in networks.values()), np.zeros(n, np.int64))
    fixed = sum((plan.n_max * (s.look >= 0) + plan.n0 * s.chosen for s in networks.values()), np.zeros(n, np.int64))
    names = np.array(tree.order, dtype=object)
    experts = np.array([tree.stages[name].expert for name in tree.order], dtype=object)
    return Recomputed(
        predict=np.where(certified, read.c, ABSTAIN),
        radius=np.where(certified, radius, 0.0),
        r_router=np.where(answered, r_router, 0.0),
        r_expert=np.where(answered, r_expert, 0.0),
        n_drawn=np.asarray(drawn),
        bound_by=names[np.where(answered, by, read.last)],
        expert=experts[read.last],
        answered_by=names[read.last],
        fixed_votes=np.asarray(fixed),
        faults=read.faults,
        read=read,
        grouped=grouped,
    )


def _disagreements(read: StoredRows, columns: VoteColumns, moved: Moved | None) -> dict[str, Array]:
    """By voting stage `(N,)` upper bounds of the share of copies on which two networks disagree; 1 where none were drawn."""
    if moved is None:
        for key in columns.keys("moved"):
            for i, pair in columns.each("moved", key):
                read.fault([i], "Disagreements in a table that was not transferred", "none", [str({key: pair})[:200]])
        return {}
    check_split(read.tree, moved.split)
    found: dict[str, Array] = {}
    for name, stage in read.tree.stages.items():
        if not stage.votes:
            continue
        counts = np.full(read.count, moved.votes)
        for i, given in columns.each("moved", name):
            if not (len(given) == 2 and all(type(v) is int for v in given) and 0 <= given[0] <= given[1] == moved.votes):
                told = f"at most {moved.votes} of {moved.votes}"
                read.fault([i], f"Disagreements of stage {name!r} do not fit the transfer", told, [str(given)[:200]])
            else:
                counts[i] = given[0]
        found[name] = binom_upper(counts, np.full(read.count, moved.votes), moved.split.stages[name])
    return found


def moved_bounds(lower: Array, upper: Array, apart: Array) -> tuple[Array, Array]:
    """Bounds `(N, L)` for the other network: every probability may have moved by `apart (N,)`."""
    down = np.nextafter(lower - apart[:, None], -np.inf)
    above = np.nextafter(upper + apart[:, None], np.inf)
    return np.clip(down, 0.0, 1.0), np.clip(above, 0.0, 1.0)


def _entries(read: StoredRows, stage: Stage, split: AlphaSplit, sides: str, reference: Ints, apart: Array | None) -> Array:
    """Entry radii `(N, len(stage.leads_to))`: of a deterministic stage by its logits, else by its votes."""
    if not stage.votes:
        return pass_entries(stage, read.logits[stage.name])
    lower, upper = _bounds(read, stage, split, sides)
    if apart is not None:
        lower, upper = moved_bounds(lower, upper, apart)
    return entry_radii(stage, lower, upper, reference)


def _bounds(read: StoredRows, stage: Stage, split: AlphaSplit, sides: str) -> tuple[Array, Array]:
    """The best bounds over the stored looks of one stage, `(N, L)` each: those of all looks hold at once."""
    stored, sound = read.stages[stage.name], read.sound()
    lower, upper = np.zeros(stored.counts.shape), np.ones(stored.counts.shape)

    def at(rows: Ints, look: Ints, counts: Ints) -> tuple[Array, Array]:
        found = read.plan.bounds(
            stage,
            counts,
            look,
            read.reference[stage.name][rows],
            read.c[rows],
            alpha=split.stages[stage.name],
            sides=sides,
            lower_share=split.lower_share,
        )
        return found.lower, found.upper

    rows = np.flatnonzero(sound & (stored.look >= 0))
    if rows.size:
        lower[rows], upper[rows] = at(rows, stored.look[rows], stored.counts[rows])
    keep = np.flatnonzero(sound[stored.past_row])
    if keep.size:
        past = stored.past_row[keep]
        low, high = at(past, stored.past_look[keep], stored.past[keep])
        np.maximum.at(lower, past, low)
        np.minimum.at(upper, past, high)
        needed = (low > 0) & (low >= lower[past] * (1.0 - ROOM)) | (high < 1) & (high <= upper[past] * (1.0 + ROOM))
        spare = past[~needed.any(1)]
        read.fault(
            spare, f"An earlier look of stage {stage.name!r} gives no bound", "only looks that a bound stands on", "another"
        )
    return lower, upper


__all__ = ["ROOM", "Moved", "Recomputed", "StoredVotes", "VoteColumns", "Votes", "read_votes", "recompute", "recompute_all"]
