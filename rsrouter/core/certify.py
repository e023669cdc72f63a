"""The statistics side of certification, without torch: which votes to draw next, and when to stop.

`CertifyPolicy` and the sampling engine only exchange `VoteRequest`s and count arrays (vLLM's split of
scheduler and executor), so it is tested with scripted votes and runs no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.bounds import AlphaSplit, Array
from rsrouter.core.certificates import entry_radii, group_entries, no_entries, recursion
from rsrouter.core.errors import PlanError
from rsrouter.core.estimates import StageBounds, check_sides, check_split, group_votes
from rsrouter.core.passes import pass_entries, pass_targets
from rsrouter.core.plans import Plan
from rsrouter.core.requests import ESTIMATE, PASS, SELECT, VoteRequest
from rsrouter.core.tree import Stage, Tree
from rsrouter.core.types import ABSTAIN, RULES, Certificate


class CertifyPolicy:
    """Selection, estimation and stopping for `num_images` images; see the module's text.

    Each image goes through: one forward pass of every network that does not vote, selection (descend the tree on `n0` votes per
    stage, which fixes the class and the references), then estimation rounds. In each round the networks that can still raise
    the certified cell are advanced to their next look. An image is finished when its certified radius and the radius it could
    still reach fall into one cell of the plan's grid.

    What enters a certificate: logits of forward passes, and estimation votes at completed looks only, under bounds that hold at
    all looks at once. What only steers: selection votes, the hoped-for bounds, the grid.

    Args:
        tree: stages of the routed classifier (their `reference` is ignored: selection votes set it).
        plan: how many votes, and the bounds.
        split: alpha of every stage.
        num_images: how many images take part.
        rule: `"tree"` may sample every stage; `"min"` only those on the selected path (Dual RS).
        sides: sidedness of plurality bounds.

    Raises:
        PlanError: an unknown rule or side, a split of another tree, stages of one network at different sigmas.
    """

    def __init__(
        self, tree: Tree, plan: Plan, split: AlphaSplit, num_images: int, *, rule: str = "tree", sides: str = "two"
    ) -> None:
        check_sides(sides)
        if rule not in RULES:
            raise PlanError("Unknown rule", expected=f"one of {RULES}", received=repr(rule), remedy="use rule='tree'")
        check_split(tree, split)
        self.tree, self.plan, self.split, self.rule, self.sides = tree, plan, split, rule, sides
        n = num_images
        self._networks, self._passing = tree.voting, tree.passing
        self._stages = tree.by_network
        self._column = {g: column for column, g in enumerate(self._networks)}
        width = {s: tree.stages[s].num_outcomes for s in tree.order}
        self._selected = {s: np.zeros((n, width[s]), np.int64) for s in tree.order}
        self._counts = {s: np.zeros((n, width[s]), np.int64) for s in tree.order}
        self._lower = {s: np.zeros((n, width[s])) for s in tree.order}
        self._upper = {s: np.ones((n, width[s])) for s in tree.order}
        # the look that gave each bound, and the votes of earlier looks that still give one: image -> look -> counts
        self._lower_at = {s: np.full((n, width[s]), -1) for s in tree.order}
        self._upper_at = {s: np.full((n, width[s]), -1) for s in tree.order}
        self._past: dict[str, dict[int, dict[int, NDArray[np.int64]]]] = {s: {} for s in tree.order}
        self._reference = {s: np.full(n, -1) for s in tree.order}
        self._on_path = {s: np.zeros(n, bool) for s in tree.order}
        # grouped entry radii, certified and hoped for (certificates.group_entries)
        self._now = {s: np.zeros((n, 1 + len(tree.stages[s].children))) for s in tree.order}
        self._hope = {s: np.zeros((n, 1 + len(tree.stages[s].children))) for s in tree.order}
        self._look = np.full((n, len(self._networks)), -1)
        self._drawn_select = np.zeros((n, len(self._networks)), np.int64)
        self._net_on_path = np.zeros((n, len(self._networks)), bool)
        # networks whose stages still wait for selection votes of their own before they estimate
        self._pending = np.zeros((n, len(self._networks)), bool)
        # deterministic stages: their logits, and which networks still have to run
        silent = [s for s in tree.order if not tree.stages[s].votes]
        self._logits = {s: np.full((n, width[s] - 1), np.nan) for s in silent}
        self._to_pass = np.ones((n, len(self._passing)), bool)
        self._path: list[list[tuple[str, int]]] = [[] for _ in range(n)]
        self._at: list[str | None] = [tree.root] * n
        self.c = np.full(n, ABSTAIN)
        self.radius = np.zeros(n)
        self.bound_by = np.full(n, tree.root, dtype=object)
        self.done = np.zeros(n, bool)

    def next_requests(self, images: Sequence[int]) -> list[VoteRequest]:
        """Requests that move each of `images` (positions, not yet done) one step forward."""
        requests: list[VoteRequest] = []
        estimating = []
        for i in images:
            name = self._at[i]
            if self._to_pass[i].any():
                waiting = (g for g, wanted in zip(self._passing, self._to_pass[i], strict=True) if wanted)
                requests.extend(VoteRequest(int(i), g, PASS, 0, 1) for g in waiting)
            elif name is not None:
                requests.append(VoteRequest(int(i), self.tree.stages[name].network, SELECT, 0, self.plan.n0))
            elif not self.done[i]:
                estimating.append(i)
        if estimating:
            rows = np.asarray(estimating)
            looks = self.plan.looks
            for position, column in zip(*np.nonzero(self._choose(rows)), strict=True):
                i, network = int(rows[position]), self._networks[column]
                if self._pending[i, column]:
                    requests.append(VoteRequest(i, network, SELECT, 0, self.plan.n0))
                    continue
                look = int(self._look[i, column])
                start = looks[look] if look >= 0 else 0
                requests.append(VoteRequest(i, network, ESTIMATE, start, looks[look + 1] - start))
        return requests

    def update(self, requests: Sequence[VoteRequest], counts: Sequence[Mapping[str, NDArray[Any]]]) -> None:
        """Takes the votes of `requests`: per request a mapping of every stage on its network to `(L,)` counts, or of a forward
        pass to `(k,)` logits.

        Raises:
            PlanError: votes that were not asked for (another start, a stream read twice, a finished image) or do not
                sum to their request; the state is then unchanged.
        """
        grouped = group_votes(requests, counts, self._stages)
        for (purpose, _), (asked, _) in grouped.items():
            for request in asked:
                self._check_open(request, purpose)
        selected: list[int] = []
        moved: list[int] = []
        for (purpose, network), (asked, votes) in grouped.items():
            rows = np.array([request.image for request in asked])
            if purpose == PASS:
                for name, matrix in votes.items():
                    self._logits[name][rows] = matrix
                self._to_pass[rows, self._passing.index(network)] = False
                selected.extend(int(i) for i in rows if not self._to_pass[i].any() and self._walk(i))
                continue
            column = self._column[network]
            if purpose == SELECT:
                for name, matrix in votes.items():
                    self._selected[name][rows] = matrix
                self._drawn_select[rows, column] = self.plan.n0
                late = rows[self._pending[rows, column]]
                if late.size:
                    self._pending[late, column] = False
                    self._refer(network, late)
                    for stage in self._stages[network]:
                        self._dream(stage, late)
                    moved.extend(late.tolist())
                selected.extend(int(i) for i in rows if self._at[i] is not None and self._walk(i))
            else:
                for name, matrix in votes.items():
                    self._counts[name][rows] += matrix
                self._look[rows, column] += 1
                self._tighten(network, rows)
                moved.extend(rows.tolist())
        if selected:
            self._start(np.array(selected))
        if moved:
            self._settle(np.unique(moved))

    def drawn(self, i: int) -> int:
        """Votes drawn for image `i`, selection included."""
        return int(sum(self.plan.looks[look] for look in self._look[i] if look >= 0) + self._drawn_select[i].sum())

    def certificate(self, i: int) -> Certificate:
        """The certificate of image `i`, once it is done."""
        if not self.done[i]:
            raise PlanError(
                "The image is still being certified",
                expected="a finished image",
                received=f"image {i}",
                remedy="draw the requested votes first",
            )
        certified = bool(self.radius[i] > 0.0 and self.c[i] > ABSTAIN)
        r_router, r_expert = self._min_rule(i)
        last = self._path[i][-1][0] if self._path[i] else self.tree.root
        column = {s: self._column[self.tree.stages[s].network] for s in self.tree.order if s not in self._logits}
        sampled = [s for s, at in column.items() if self._look[i, at] >= 0]
        chosen = [s for s, at in column.items() if self._drawn_select[i, at] > 0]
        return Certificate(
            predict=int(self.c[i]) if certified else ABSTAIN,
            radius=float(self.radius[i]) if certified else 0.0,
            expert=self.tree.stages[last].expert,
            n_drawn=self.drawn(i),
            counts={s: tuple(self._counts[s][i].tolist()) for s in sampled},
            bound_by=str(self.bound_by[i]),
            selection={s: tuple(self._selected[s][i].tolist()) for s in chosen},
            r_router=r_router,
            r_expert=r_expert,
            earlier={
                f"{s}@{self.plan.looks[look]}": tuple(votes.tolist())
                for s in sampled
                for look, votes in sorted(self._past[s].get(i, {}).items())
                if look < self._look[i, column[s]]
            },
            logits={s: tuple(logits[i].tolist()) for s, logits in self._logits.items()},
        )

    def _check_open(self, request: VoteRequest, purpose: str) -> None:
        """Refuses votes that are not the next ones of their stream: a bound holds for exactly that many."""
        i, column = request.image, self._column.get(request.network, -1)
        fits = 0 <= i < len(self.done) and not self.done[i]
        if fits and (purpose == PASS or column < 0):
            fits = purpose == PASS and column < 0 and bool(self._to_pass[i, self._passing.index(request.network)])
            fits &= (request.start, request.count) == (0, 1)
        elif fits and self._to_pass[i].any():
            fits = False
        elif fits and purpose == SELECT:
            name = self._at[i]
            open_here = self._pending[i, column] if name is None else self.tree.stages[name].network == request.network
            fits = bool(open_here) and request.start == 0 and request.count == self.plan.n0
        elif fits:
            look = int(self._look[i, column])
            start = self.plan.looks[look] if look >= 0 else 0
            fits = (
                purpose == ESTIMATE
                and self._at[i] is None
                and not self._pending[i, column]
                and look + 1 < len(self.plan.looks)
                and request.start == start
                and request.start + request.count == self.plan.looks[look + 1]
            )
        if not fits:
            raise PlanError(
                "Votes that no open request asked for",
                expected="answers to next_requests, each once",
                received=repr(request),
                remedy="hand each request's votes back exactly once, in order",
            )

    def _walk(self, i: int) -> bool:
        """Descends on selection votes as far as they go; True where that reached an answer."""
        while (name := self._at[i]) is not None:
            stage = self.tree.stages[name]
            if not stage.votes:
                index = int(pass_targets(stage, self._logits[name][i : i + 1])[0])
            elif not self._drawn_select[i, self._column[stage.network]]:
                return False
            else:
                index = winner(stage, self._selected[name][i])
                self._net_on_path[i, self._column[stage.network]] = True
            self._on_path[name][i] = True
            self._path[i].append((name, index))
            target = stage.leads_to[index]
            if isinstance(target, str):
                self._at[i] = target
            else:
                self._at[i] = None
                self.c[i] = target
        return True

    def _start(self, rows: NDArray[np.int64]) -> None:
        """Fixes the references of images whose selection reached an answer, and what they may hope for."""
        void = self.c[rows] <= ABSTAIN
        for i in rows[void]:
            self.done[i] = True
            self.bound_by[i] = self._path[i][-1][0]
        rows = rows[~void]
        if not rows.size:
            return
        for name in self.tree.order:
            stage = self.tree.stages[name]
            # an outcome that answers the class, where there is one
            same = stage.answers[None, : stage.num_outcomes] == self.c[rows][:, None]
            self._reference[name][rows] = np.where(same.any(1), same.argmax(1), -1)
        for i in rows:
            last = len(self._path[i]) - 1
            for position, (name, index) in enumerate(self._path[i]):
                # on the path the outcome that won the selection, unless a threshold stage deferred
                stage = self.tree.stages[name]
                if index < stage.num_outcomes and (stage.kind == "plurality" or position == last):
                    self._reference[name][i] = index
        for name, logits in self._logits.items():
            stage = self.tree.stages[name]
            counted = self._on_path[name][rows] | (self.rule != "min")
            entry = np.where(counted[:, None], pass_entries(stage, logits[rows]), 0.0)
            self._now[name][rows] = group_entries(stage, entry, self.c[rows])
        for column, network in enumerate(self._networks):
            for stage in self._stages[network]:
                off = rows[~self._on_path[stage.name][rows] & (self._reference[stage.name][rows] < 0)]
                if stage.kind == "plurality" and self.rule == "tree" and off.size:
                    self._pending[off, column] |= self._drawn_select[off, column] == 0
            self._refer(network, rows[~self._pending[rows, column]])
            for stage in self._stages[network]:
                self._now[stage.name][rows] = no_entries(stage, self.c[rows])
                self._dream(stage, rows)
        self._settle(rows)

    def _refer(self, network: str, rows: NDArray[np.int64]) -> None:
        """References of routing stages off the path, from selection votes of their own."""
        column = self._column[network]
        for stage in self._stages[network]:
            if stage.kind == "plurality":
                free = (self._reference[stage.name][rows] < 0) & ~self._on_path[stage.name][rows]
                voted = rows[free & (self._drawn_select[rows, column] > 0)]
                self._reference[stage.name][voted] = self._selected[stage.name][voted].argmax(1)

    def _tighten(self, network: str, rows: NDArray[np.int64]) -> None:
        """Bounds at the look just completed; all looks hold at once, so the best so far stands."""
        look = self._look[rows, self._column[network]]
        for stage in self._stages[network]:
            name = stage.name
            new = self.plan.bounds(
                stage,
                self._counts[name][rows],
                look,
                self._reference[name][rows],
                self.c[rows],
                alpha=self.split.stages[name],
                sides=self.sides,
                lower_share=self.split.lower_share,
            )
            self._remember(name, rows, look, new)
            self._lower[name][rows] = np.maximum(self._lower[name][rows], new.lower)
            self._upper[name][rows] = np.minimum(self._upper[name][rows], new.upper)
            if self.rule == "min":
                kept = rows[self._on_path[name][rows]]
            else:
                kept = rows
            if kept.size:
                entry = entry_radii(stage, self._lower[name][kept], self._upper[name][kept], self._reference[name][kept])
                self._now[name][kept] = group_entries(stage, entry, self.c[kept])
            self._dream(stage, rows)

    def _remember(self, name: str, rows: NDArray[np.int64], look: NDArray[np.int64], new: StageBounds) -> None:
        """Keeps the votes of every look that a bound stands on; without them nobody could recompute the radius."""
        # on a tie the later look, whose votes are stored anyway
        lower_at = np.where(new.lower >= self._lower[name][rows], look[:, None], self._lower_at[name][rows])
        upper_at = np.where(new.upper <= self._upper[name][rows], look[:, None], self._upper_at[name][rows])
        self._lower_at[name][rows], self._upper_at[name][rows] = lower_at, upper_at
        past = self._past[name]
        settled = len(self.plan.looks) - 1
        stale = (lower_at != look[:, None]).any(1) | (upper_at != look[:, None]).any(1)
        for position, i in enumerate(rows.tolist()):
            at = int(look[position])
            kept = past.pop(i, {})
            if stale[position]:
                used = {*lower_at[position].tolist(), *upper_at[position].tolist()}
                kept = {k: v for k, v in kept.items() if k in used}
            else:
                kept = {}
            if at < settled:
                kept[at] = self._counts[name][i].copy()
            if kept:
                past[i] = kept

    def _dream(self, stage: Stage, rows: NDArray[np.int64]) -> None:
        """Entry radii that a stage could still reach: decides what to draw, enters no certificate."""
        name, column = stage.name, self._column[stage.network]
        self._hope[name][rows] = self._now[name][rows]
        if self.rule == "min":
            rows = rows[self._on_path[name][rows]]
        rows = rows[self._look[rows, column] < len(self.plan.looks) - 1]
        if not rows.size:
            return
        reference, c = self._reference[name][rows], self.c[rows]
        # before its selection votes a routing stage may still be unanimous for any outcome
        unknown = self._pending[rows, column] & (reference < 0)
        reference = np.where(unknown, 0, reference)
        best = self.plan.hopes(
            stage,
            self._counts[name][rows],
            self._look[rows, column],
            reference,
            c,
            alpha=self.split.stages[name],
            sides=self.sides,
            lower_share=self.split.lower_share,
        )
        entry = entry_radii(
            stage, np.maximum(self._lower[name][rows], best.lower), np.minimum(self._upper[name][rows], best.upper), reference
        )
        entry = np.where(unknown[:, None], entry.max(1, keepdims=True), entry)
        self._hope[name][rows] = np.maximum(self._now[name][rows], group_entries(stage, entry, c))

    def _free(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`(rows, networks)`: which networks the rule may draw from and that have votes left."""
        free = self._look[rows] < len(self.plan.looks) - 1
        return free & self._net_on_path[rows] if self.rule == "min" else free

    def _ceiling(self, rows: NDArray[np.int64], hope: NDArray[np.bool_]) -> Array:
        """The cell of the radius with the networks marked in `hope (rows, networks)` at what they could reach."""
        grouped = {name: self._now[name][rows] for name in self._logits}
        for column, network in enumerate(self._networks):
            for stage in self._stages[network]:
                now, best = self._now[stage.name][rows], self._hope[stage.name][rows]
                grouped[stage.name] = np.where(hope[:, column, None], best, now)
        return self.plan.cell(recursion(self.tree, grouped)[0])

    def _choose(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`(rows, networks)`: which networks to advance to their next look; at least one per row."""
        free = self._free(rows)
        if len(self._networks) == 1:
            return free
        ceiling = self._ceiling(rows, free)
        columns = np.arange(len(self._networks))
        without = np.stack([self._ceiling(rows, free & (columns != g)) for g in columns], axis=1)
        needed = free & (without < ceiling[:, None])
        # where no network is needed by itself, any free one may do
        needed = np.where(needed.any(1, keepdims=True), needed, free)
        behind = np.where(needed, self._look[rows], np.iinfo(np.int64).max)
        needed &= behind == behind.min(axis=1, keepdims=True)
        on_path = needed & self._net_on_path[rows]
        worst = np.where(needed, without, np.inf).argmin(axis=1)
        single = np.zeros_like(needed)
        single[np.arange(len(rows)), worst] = True
        return np.where(on_path.any(1, keepdims=True), on_path, single)

    def _settle(self, rows: NDArray[np.int64]) -> None:
        """Updates radii and finishes the images whose cell can no longer change."""
        radius, by = recursion(self.tree, {name: self._now[name][rows] for name in self.tree.order})
        self.radius[rows], self.bound_by[rows] = radius, np.array(self.tree.order, dtype=object)[by]
        free = self._free(rows)
        self.done[rows] = ~free.any(1) | ~(self._ceiling(rows, free) > self.plan.cell(radius))

    def _min_rule(self, i: int) -> tuple[float, float]:
        """R_router and R_expert of image `i`: the two terms of Dual RS's min rule on the selected path."""
        if self.c[i] <= ABSTAIN:
            return 0.0, 0.0
        rows = np.array([i])
        r_router, r_expert = np.inf, 0.0
        for position, (name, index) in enumerate(self._path[i]):
            stage = self.tree.stages[name]
            if not stage.votes:
                nearest = float(np.delete(pass_entries(stage, self._logits[name][rows])[0], index).min())
            elif self._look[i, self._column[stage.network]] < 0:
                nearest = 0.0
            else:
                entry = entry_radii(stage, self._lower[name][rows], self._upper[name][rows], self._reference[name][rows])[0]
                nearest = float(np.delete(entry, index).min())
            if position < len(self._path[i]) - 1:
                r_router = min(r_router, nearest)
            else:
                r_expert = nearest
        return float(r_router), r_expert


def winner(stage: Stage, counts: NDArray[np.int64]) -> int:
    """Index into `leads_to` of the target that the votes `counts (L,)` choose; ties go to the lower index."""
    top = int(counts.argmax())
    defers = stage.tau is not None and not counts[top] >= stage.tau * counts.sum()
    return len(stage.leads_to) - 1 if defers else top


__all__ = ["ESTIMATE", "SELECT", "CertifyPolicy", "VoteRequest"]
