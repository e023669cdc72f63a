"""A certificate as a function of its stored votes: what is computed again for every row of a table.

Selection votes give the class, the path and the references; estimation votes at completed looks give the
bounds; the recursion of `rsrouter.core.certificates` gives the radius. It shares the bounds and the recursion
with `CertifyPolicy`, and nothing of the policy's bookkeeping. All images are computed at once: ten thousand rows of a table
take about a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.bounds import MOST_VOTES, AlphaSplit, Array
from rsrouter.core.certificates import entry_radii, fixed_reference, group_entries, no_entries, recursion
from rsrouter.core.errors import PlanError
from rsrouter.core.estimates import check_sides, check_split
from rsrouter.core.plans import Plan
from rsrouter.core.tree import Stage, Tree, stages_by_network
from rsrouter.core.types import ABSTAIN, RULES, Certificate

#: Votes of one image: purpose ("select", "estimate", "earlier") to stage to counts, as a results table stores them.
Votes = Mapping[str, Mapping[str, Sequence[int]]]

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

#: Relative room for another scipy: its quantiles err by about 1e-12.
ROOM = 1e-9

_EDITED = "the row was edited"


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


@dataclass
class _Sampled:
    """One stage's votes of all images: presence and counts, and earlier looks as a flat list."""

    chosen: Mask
    selection: Ints
    look: Ints
    counts: Ints
    past_row: Ints
    past_look: Ints
    past: Ints


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
    read: _Read
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
        )


class _Read:
    """Votes of N images as arrays, checked against tree and plan, with what the selection votes fix.

    Attributes:
        c: `(N,)` the class to certify, ABSTAIN where the selection answers nothing.
        index: by stage `(N,)` the target that its selection votes choose, -1 off the path.
        last: `(N,)` position in `tree.order` of the stage that answers.
        reference: by stage `(N,)` the outcome whose lower bound counts, -1 for none.
        faults: by image the first thing that cannot be.
    """

    def __init__(self, tree: Tree, plan: Plan, votes: Sequence[Votes]) -> None:
        self.tree, self.plan, self.count = tree, plan, len(votes)
        self.faults: dict[int, PlanError] = {}
        found = self._gather(votes)
        self.stages = {name: self._stage(tree.stages[name], *found[name]) for name in tree.order}
        self._check_networks()
        self._descend()
        self._refer()

    def earlier(self, name: str, i: int) -> list[tuple[int, Ints]]:
        """Looks of one image before its last one, ascending: their position in the plan and their cumulative votes."""
        stage = self.stages[name]
        first, end = np.searchsorted(stage.past_row, [i, i + 1])  # sorted by image, then by look
        return [(int(stage.past_look[k]), stage.past[k]) for k in range(first, end)]

    def sound(self) -> Mask:
        """`(N,)` images without a fault."""
        mask = np.ones(self.count, bool)
        mask[list(self.faults)] = False
        return mask

    def _fault(self, rows: Iterable[int], message: str, expected: str, received: Any, remedy: str = _EDITED) -> None:
        for position, i in enumerate(rows):
            if i not in self.faults:
                text = received[position] if isinstance(received, list | np.ndarray) else received
                self.faults[int(i)] = PlanError(message, expected=expected, received=str(text), remedy=remedy)

    def _gather(self, votes: Sequence[Votes]) -> dict[str, tuple[list[Any], list[Any], list[Any]]]:
        """By stage: `(image, counts)` of selection and estimation, `(image, counts, votes as text)` of earlier looks."""
        found: dict[str, tuple[list[Any], list[Any], list[Any]]] = {name: ([], [], []) for name in self.tree.order}
        for i, row in enumerate(votes):
            for place, purpose in enumerate(("select", "estimate", "earlier")):
                for key, counts in row.get(purpose, {}).items():
                    name, _, number = key.rpartition("@") if place == 2 else (key, "", "")
                    if name in found:
                        found[name][place].append((i, counts, number))
                    else:
                        expected = f"some of {sorted(self.tree.stages)}"
                        self._fault(
                            [i],
                            "Votes of stages that the tree does not have",
                            expected,
                            [key],
                            "the table belongs to another router",
                        )
        return found

    def _matrix(self, stage: Stage, entries: list[Any], sums: Sequence[int], what: str) -> tuple[Ints, Ints, list[str]]:
        """Images `(M,)`, counts `(M, L)` and texts of the entries that fit the stage and one of `sums`."""
        width = stage.num_outcomes
        try:
            counts = np.array([e[1] for e in entries], dtype=np.int64).reshape(len(entries), -1 if entries else width)
            fits = np.all((counts >= 0) & (counts <= MOST_VOTES), axis=1) if counts.shape[1] == width else None
        except (ValueError, OverflowError, TypeError):
            fits = None
        if fits is None:  # some entry is of another length, or holds what is no count
            fits = np.array([len(e[1]) == width and all(0 <= v <= MOST_VOTES for v in e[1]) for e in entries])
            counts = np.array([e[1] if ok else [0] * width for e, ok in zip(entries, fits, strict=True)], dtype=np.int64)
        rows = np.array([e[0] for e in entries], dtype=np.int64)
        self._fault(
            rows[~fits],
            f"Votes of stage {stage.name!r} do not fit it",
            f"{width} counts of at least 0",
            [str(list(e[1]))[:200] for e, ok in zip(entries, fits, strict=True) if not ok],
            "the table belongs to another router, or was edited",
        )
        total = counts.sum(1)
        summed = np.isin(total, sums)
        self._fault(
            rows[fits & ~summed],
            f"The {what} votes of stage {stage.name!r} do not sum to a look of the plan",
            f"one of {tuple(sums)}",
            total[fits & ~summed],
            "the table was drawn under another plan, or edited",
        )
        kept = np.flatnonzero(fits & summed)
        return rows[kept], counts[kept], [entries[k][2] for k in kept]

    def _stage(self, stage: Stage, select: list[Any], estimate: list[Any], earlier: list[Any]) -> _Sampled:
        looks = np.asarray(self.plan.looks)
        chosen, look = np.zeros(self.count, bool), np.full(self.count, -1)
        selection, counts = (np.zeros((self.count, stage.num_outcomes), np.int64) for _ in range(2))
        rows, matrix, _ = self._matrix(stage, select, (self.plan.n0,), "selection")
        chosen[rows], selection[rows] = True, matrix
        rows, matrix, _ = self._matrix(stage, estimate, self.plan.looks, "estimation")
        look[rows], counts[rows] = np.searchsorted(looks, matrix.sum(1)), matrix
        rows, past, numbers = self._matrix(stage, earlier, self.plan.looks, "earlier")
        order = np.lexsort((past.sum(1), rows))
        rows, past, numbers = rows[order], past[order], [numbers[k] for k in order]
        before = np.searchsorted(looks, past.sum(1))
        wrong = np.array([number != str(n) for number, n in zip(numbers, past.sum(1).tolist(), strict=True)], dtype=bool)
        wrong |= (before >= look[rows]) | np.any(past > counts[rows], axis=1)
        same = rows[1:] == rows[:-1]
        wrong[1:] |= same & ((before[1:] <= before[:-1]) | np.any(past[1:] < past[:-1], axis=1))
        self._fault(
            rows[wrong],
            f"An earlier look of stage {stage.name!r} is not part of its last one",
            "fewer votes, of every outcome at most as many",
            past[wrong],
        )
        return _Sampled(chosen, selection, look, counts, rows, before, past)

    def _check_networks(self) -> None:
        for network, stages in stages_by_network(self.tree).items():
            first = self.stages[stages[0].name]
            for stage in stages[1:]:
                other = self.stages[stage.name]
                for what, a, b in (("selection", first.chosen, other.chosen), ("estimation", first.look, other.look)):
                    self._fault(
                        np.flatnonzero(a != b),
                        f"Stages on network {network!r} have different numbers of {what} votes",
                        "one forward pass, one vote each",
                        f"others of {stage.name!r} than of {stages[0].name!r}",
                    )

    def _descend(self) -> None:
        """Class, path and answering stage: all from selection votes."""
        order = self.tree.order
        code = {name: -2 - k for k, name in enumerate(order)}
        at = np.full(self.count, code[self.tree.root])
        self.last = np.full(self.count, order.index(self.tree.root))
        self.index = {name: np.full(self.count, -1) for name in order}
        for name in reversed(order):  # parents before children
            stage, votes = self.tree.stages[name], self.stages[name]
            here = at == code[name]
            self._fault(
                np.flatnonzero(here & ~votes.chosen),
                f"The selection stops before stage {name!r}",
                f"selection votes of {name!r}",
                "none",
            )
            targets = np.array([code[t] if isinstance(t, str) else t for t in stage.leads_to], dtype=np.int64)
            top = votes.selection.argmax(1)
            if stage.tau is not None:
                most = votes.selection[np.arange(self.count), top]
                top = np.where(most >= stage.tau * votes.selection.sum(1), top, len(stage.leads_to) - 1)
            self.index[name][here] = top[here]
            at[here] = targets[top[here]]
            self.last[here] = order.index(name)
        self.c = np.maximum(at, ABSTAIN)
        some = np.any([votes.look >= 0 for votes in self.stages.values()], axis=0)
        self._fault(
            np.flatnonzero((self.c <= ABSTAIN) & some), "Estimation votes where the selection answers nothing", "none", "some"
        )

    def _refer(self) -> None:
        self.reference: dict[str, Ints] = {}
        for position, name in enumerate(self.tree.order):
            stage, votes, index = self.tree.stages[name], self.stages[name], self.index[name]
            reference = np.array(fixed_reference(_free(stage), self.c))
            # on the path the outcome that won the selection, unless a threshold stage deferred
            won = (index >= 0) & (index < stage.num_outcomes)
            if stage.kind == "threshold":
                won &= self.last == position
            reference = np.where(won, index, reference)
            if stage.kind == "plurality":
                reference = np.where((index < 0) & (reference < 0) & votes.chosen, votes.selection.argmax(1), reference)
            self.reference[name] = np.where(self.c > ABSTAIN, reference, -1)


def _free(stage: Stage) -> Stage:
    return stage if stage.reference is None else replace(stage, reference=None)


def recompute(
    tree: Tree, plan: Plan, split: AlphaSplit, votes: Sequence[Votes], *, rule: str = "tree", sides: str = "two"
) -> list[Certificate | PlanError]:
    """The certificates that stored votes support, one by one; `recompute_all` keeps them as arrays.

    Args:
        tree, plan, split, rule, sides: what the votes were drawn for.
        votes: per image its selection votes, its estimation votes, and those of earlier looks that a bound stands on.

    Returns:
        Per image its certificate, or a PlanError where such votes cannot come from this tree and plan (a sum that
        is no look of the plan, a stage that does not exist, a selection that stops half way).

    Raises:
        PlanError: an unknown rule or side, or a split of another tree.
    """
    found = recompute_all(tree, plan, split, votes, rule=rule, sides=sides)
    return [found.faults[i] if i in found.faults else found.certificate(i) for i in range(len(votes))]


def recompute_all(
    tree: Tree, plan: Plan, split: AlphaSplit, votes: Sequence[Votes], *, rule: str = "tree", sides: str = "two"
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
    read = _Read(tree, plan, votes)
    n, rows = read.count, np.arange(read.count)
    grouped: dict[str, Array] = {}
    r_router, r_expert = np.full(n, np.inf), np.zeros(n)
    for position, name in enumerate(tree.order):
        stage, stored, reference, index = tree.stages[name], read.stages[name], read.reference[name], read.index[name]
        lower, upper = _bounds(read, stage, split, sides)
        entry = entry_radii(stage, lower, upper, reference)
        sampled, on_path = stored.look >= 0, index >= 0
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
    networks = {stage.network: read.stages[name] for name, stage in tree.stages.items()}
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


def _bounds(read: _Read, stage: Stage, split: AlphaSplit, sides: str) -> tuple[Array, Array]:
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
        read._fault(
            spare, f"An earlier look of stage {stage.name!r} gives no bound", "only looks that a bound stands on", "another"
        )
    return lower, upper


def read_votes(tree: Tree, plan: Plan, votes: Votes) -> StoredVotes:
    """The votes of one image, checked against tree and plan.

    Raises:
        PlanError: votes that cannot come from them.
    """
    read = _Read(tree, plan, [votes])
    if read.faults:
        raise read.faults[0]
    row = StoredVotes(c=int(read.c[0]))
    at: int | str = tree.root
    while isinstance(at, str):
        row.path.append((at, int(read.index[at][0])))
        at = tree.stages[at].leads_to[row.path[-1][1]]
    for name, stage in read.stages.items():
        if stage.chosen[0]:
            row.selected[name] = stage.selection[0]
        if stage.look[0] >= 0:
            row.looks[name] = [*read.earlier(name, 0), (int(stage.look[0]), stage.counts[0])]
    if row.c > ABSTAIN:
        row.reference = {name: int(reference[0]) for name, reference in read.reference.items()}
    return row


__all__ = ["ROOM", "Recomputed", "StoredVotes", "Votes", "read_votes", "recompute", "recompute_all"]
