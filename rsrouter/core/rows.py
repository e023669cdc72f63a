"""Stored votes of many images as arrays, checked against a tree and a plan, with what the selection votes fix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.bounds import MOST_VOTES, Array
from rsrouter.core.certificates import fixed_reference
from rsrouter.core.errors import PlanError
from rsrouter.core.passes import pass_targets
from rsrouter.core.plans import Plan
from rsrouter.core.tree import Stage, Tree
from rsrouter.core.types import ABSTAIN

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]

#: Votes of one image: purpose ("select", "estimate", "earlier") to stage to counts, and "logits" to deterministic stage to
#: numbers (None: not finite), as a results table stores them.
Votes = Mapping[str, Mapping[str, Sequence[Any]]]

_EDITED = "the row was edited"
_WORDS = {"select": "selection", "estimate": "estimation", "earlier": "earlier"}


@dataclass
class VoteColumns:
    """Votes of N images by purpose and key, the keys as a results table writes them.

    Attributes:
        count: N.
        counts: by purpose, then key, blocks of images `(M,)` and their counts `(M, L)`: one block for each L.
        others: by purpose, then key, image and values that are not whole numbers of 64 bits.

    >>> columns = VoteColumns.of([{"select": {"a": [9, 1]}}, {"select": {"a": [8, 2]}, "logits": {"b": [0.5, None]}}])
    >>> columns.counts["select"]["a"][0][1].tolist(), columns.others
    ([[9, 1], [8, 2]], {'logits': {'b': [(1, [0.5, None])]}})
    """

    count: int
    counts: dict[str, dict[str, list[tuple[Ints, Ints]]]] = field(default_factory=dict)
    others: dict[str, dict[str, list[tuple[int, Any]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, votes: Sequence[Votes]) -> VoteColumns:
        """The columns of votes that are given image by image."""
        made = cls(len(votes))
        whole: dict[tuple[str, str, int], tuple[list[int], list[Sequence[int]]]] = {}
        for i, row in enumerate(votes):
            for purpose, stages in row.items():
                for key, values in stages.items():
                    if purpose != "logits" and all(isinstance(v, int | np.integer) and -(2**63) <= v < 2**63 for v in values):
                        images, counts = whole.setdefault((purpose, key, len(values)), ([], []))
                        images.append(i)
                        counts.append(values)
                    else:
                        made.others.setdefault(purpose, {}).setdefault(key, []).append((i, values))
        for (purpose, key, width), (images, counts) in whole.items():
            made.add(purpose, key, np.array(images, np.int64), np.array(counts, np.int64).reshape(-1, width))
        return made

    def add(self, purpose: str, key: str, images: Ints, counts: Ints) -> None:
        """Adds the counts `(M, L)` of some images `(M,)`."""
        self.counts.setdefault(purpose, {}).setdefault(key, []).append((images, counts))

    def keys(self, purpose: str) -> list[str]:
        """The keys under which anything is stored for this purpose, each once."""
        return list({**self.counts.get(purpose, {}), **self.others.get(purpose, {})})

    def images(self, purpose: str, key: str) -> Ints:
        """The images that have something stored there, `(M,)` in no particular order."""
        found = [images for images, _ in self.blocks(purpose, key)]
        found.append(np.array([i for i, _ in self.rest(purpose, key)], np.int64))
        return np.concatenate(found)

    def blocks(self, purpose: str, key: str) -> list[tuple[Ints, Ints]]:
        """The blocks of counts stored there."""
        return self.counts.get(purpose, {}).get(key, [])

    def rest(self, purpose: str, key: str) -> list[tuple[int, Any]]:
        """What is stored there and is not whole numbers, with its image."""
        return self.others.get(purpose, {}).get(key, [])

    def each(self, purpose: str, key: str) -> Iterator[tuple[int, Any]]:
        """Everything stored there, image by image."""
        for images, counts in self.blocks(purpose, key):
            yield from zip(images.tolist(), counts.tolist(), strict=True)
        yield from self.rest(purpose, key)


@dataclass
class StoredVotes:
    """Votes of one image, checked, with what the selection votes fix.

    Attributes:
        c: the class to certify, ABSTAIN where the selection answers nothing.
        path: (stage, index of its target) from the root to the answer.
        selected: selection votes by stage.
        looks: by stage its completed looks, as (index of the look, cumulative counts), the last one at the end.
        reference: by stage the outcome whose lower bound counts, -1 for none.
        logits: by deterministic stage, NaN for what is not finite.
    """

    c: int = ABSTAIN
    path: list[tuple[str, int]] = field(default_factory=list)
    selected: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    looks: dict[str, list[tuple[int, NDArray[np.int64]]]] = field(default_factory=dict)
    reference: dict[str, int] = field(default_factory=dict)
    logits: dict[str, Array] = field(default_factory=dict)


@dataclass
class StageVotes:
    """One stage's votes of all images: presence and counts, and earlier looks as a flat list."""

    chosen: Mask
    selection: Ints
    look: Ints
    counts: Ints
    past_row: Ints
    past_look: Ints
    past: Ints


class StoredRows:
    """Votes of N images as arrays, checked against tree and plan, with what the selection votes fix.

    Attributes:
        c: `(N,)` the class to certify, ABSTAIN where the selection answers nothing.
        index: by stage `(N,)` the target that its selection votes choose, -1 off the path.
        last: `(N,)` position in `tree.order` of the stage that answers.
        reference: by stage `(N,)` the outcome whose lower bound counts, -1 for none.
        faults: by image the first thing that cannot be.
    """

    def __init__(self, tree: Tree, plan: Plan, votes: Sequence[Votes] | VoteColumns) -> None:
        columns = votes if isinstance(votes, VoteColumns) else VoteColumns.of(votes)
        self.tree, self.plan, self.count = tree, plan, columns.count
        self.faults: dict[int, PlanError] = {}
        self._refuse_unknown(columns)
        self.stages = {name: self._stage(tree.stages[name], columns) for name in tree.order}
        self.logits = {name: self._pass(tree.stages[name], columns) for name in tree.order if not tree.stages[name].votes}
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

    def fault(self, rows: Iterable[int], message: str, expected: str, received: Any, remedy: str = _EDITED) -> None:
        for position, i in enumerate(rows):
            if i not in self.faults:
                text = received[position] if isinstance(received, list | np.ndarray) else received
                self.faults[int(i)] = PlanError(message, expected=expected, received=str(text), remedy=remedy)

    def _refuse_unknown(self, columns: VoteColumns) -> None:
        voting = sorted(name for name, stage in self.tree.stages.items() if stage.votes)
        silent = sorted(set(self.tree.stages) - set(voting))
        for purpose, names in (("logits", silent), *((p, voting) for p in ("select", "estimate", "earlier"))):
            for key in columns.keys(purpose):
                if (key.rpartition("@")[0] if purpose == "earlier" else key) not in names:
                    self.fault(
                        columns.images(purpose, key),
                        f"{'Logits' if purpose == 'logits' else 'Votes'} of stages that the tree does not have",
                        f"some of {names}",
                        [key] * self.count,
                        "the table belongs to another router",
                    )

    def _pass(self, stage: Stage, columns: VoteColumns) -> Array:
        """Logits `(N, k)` of one deterministic stage, which every row must have; NaN where they are not finite."""
        width = stage.num_outcomes - 1
        logits = np.full((self.count, width), np.nan)
        given = dict(columns.rest("logits", stage.name))
        for i in range(self.count):
            row = given.get(i)
            if row is None or len(row) != width or not all(v is None or type(v) in (int, float) for v in row):
                self.fault([i], f"Logits of stage {stage.name!r} do not fit it", f"{width} numbers", [str(row)[:200]])
            else:
                logits[i] = [np.nan if v is None else v for v in row]
        return logits

    def _matrix(self, stage: Stage, columns: VoteColumns, purpose: str, key: str, sums: Sequence[int]) -> tuple[Ints, Ints]:
        """Images `(M,)` and counts `(M, L)` of what is stored under one key and fits the stage and one of `sums`."""
        kept = [(np.zeros(0, np.int64), np.zeros((0, stage.num_outcomes), np.int64))]

        def refuse(rows: Iterable[int], received: list[Any]) -> None:
            self.fault(
                rows,
                f"Votes of stage {stage.name!r} do not fit it",
                f"{stage.num_outcomes} counts of at least 0",
                [str(counts)[:200] for counts in received],
                "the table belongs to another router, or was edited",
            )

        rest = columns.rest(purpose, key)
        refuse([i for i, _ in rest], [values for _, values in rest])
        for rows, counts in columns.blocks(purpose, key):
            fits = np.all((counts >= 0) & (counts <= MOST_VOTES), axis=1) & (counts.shape[1] == stage.num_outcomes)
            refuse(rows[~fits], counts[~fits].tolist())
            rows, counts = rows[fits], counts[fits]
            total = counts.sum(1)
            summed = np.isin(total, sums)
            self.fault(
                rows[~summed],
                f"The {_WORDS[purpose]} votes of stage {stage.name!r} do not sum to a look of the plan",
                f"one of {tuple(sums)}",
                total[~summed],
                "the table was drawn under another plan, or edited",
            )
            if len(rows):
                kept.append((rows[summed], counts[summed]))
        return np.concatenate([rows for rows, _ in kept]), np.concatenate([counts for _, counts in kept])

    def _stage(self, stage: Stage, columns: VoteColumns) -> StageVotes:
        looks = np.asarray(self.plan.looks)
        chosen, look = np.zeros(self.count, bool), np.full(self.count, -1)
        selection, counts = (np.zeros((self.count, stage.num_outcomes), np.int64) for _ in range(2))
        none = np.zeros(0, np.int64)
        past = [(none, np.zeros((0, stage.num_outcomes), np.int64), np.zeros(0, bool))]
        if stage.votes:
            rows, matrix = self._matrix(stage, columns, "select", stage.name, (self.plan.n0,))
            chosen[rows], selection[rows] = True, matrix
            rows, matrix = self._matrix(stage, columns, "estimate", stage.name, self.plan.looks)
            look[rows], counts[rows] = np.searchsorted(looks, matrix.sum(1)), matrix
            for key in columns.keys("earlier"):
                name, _, number = key.rpartition("@")
                if name == stage.name:
                    rows, matrix = self._matrix(stage, columns, "earlier", key, self.plan.looks)
                    past.append((rows, matrix, np.array([number != str(n) for n in matrix.sum(1).tolist()], bool)))
        rows, matrix, wrong = (np.concatenate(parts) for parts in zip(*past, strict=True))
        order = np.lexsort((matrix.sum(1), rows))
        rows, matrix, wrong = rows[order], matrix[order], wrong[order]
        before = np.searchsorted(looks, matrix.sum(1))
        wrong |= (before >= look[rows]) | np.any(matrix > counts[rows], axis=1)
        same = rows[1:] == rows[:-1]
        wrong[1:] |= same & ((before[1:] <= before[:-1]) | np.any(matrix[1:] < matrix[:-1], axis=1))
        self.fault(
            rows[wrong],
            f"An earlier look of stage {stage.name!r} is not part of its last one",
            "fewer votes, of every outcome at most as many",
            matrix[wrong],
        )
        return StageVotes(chosen, selection, look, counts, rows, before, matrix)

    def _check_networks(self) -> None:
        for network, stages in self.tree.by_network.items():
            first = self.stages[stages[0].name]
            for stage in stages[1:]:
                other = self.stages[stage.name]
                for what, a, b in (("selection", first.chosen, other.chosen), ("estimation", first.look, other.look)):
                    self.fault(
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
            missing = here & ~votes.chosen & stage.votes
            self.fault(
                np.flatnonzero(missing),
                f"The selection stops before stage {name!r}",
                f"selection votes of {name!r}",
                "none",
            )
            targets = np.array([code[t] if isinstance(t, str) else t for t in stage.leads_to], dtype=np.int64)
            top = votes.selection.argmax(1) if stage.votes else pass_targets(stage, self.logits[name])
            if stage.tau is not None and stage.votes:
                most = votes.selection[np.arange(self.count), top]
                top = np.where(most >= stage.tau * votes.selection.sum(1), top, len(stage.leads_to) - 1)
            self.index[name][here] = top[here]
            at[here] = targets[top[here]]
            self.last[here] = order.index(name)
        self.c = np.maximum(at, ABSTAIN)
        some = np.any([votes.look >= 0 for votes in self.stages.values()], axis=0)
        self.fault(
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


def read_votes(tree: Tree, plan: Plan, votes: Votes) -> StoredVotes:
    """The votes of one image, checked against tree and plan.

    Raises:
        PlanError: votes that cannot come from them.
    """
    read = StoredRows(tree, plan, [votes])
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
    row.logits = {name: logits[0] for name, logits in read.logits.items()}
    if row.c > ABSTAIN:
        row.reference = {name: int(reference[0]) for name, reference in read.reference.items()}
    return row


__all__ = ["Ints", "StageVotes", "StoredRows", "StoredVotes", "VoteColumns", "Votes", "read_votes"]
