"""Which votes to draw next, and when to stop: the statistics side of certification, without torch.

`CertifyPolicy` and the sampling engine only exchange `VoteRequest`s and count arrays (vLLM's split of
scheduler and executor), so it is tested with scripted votes and runs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.bounds import AlphaSplit, Array
from rsrouter.core.certificates import entry_radii, tree_radius
from rsrouter.core.errors import PlanError
from rsrouter.core.plans import Plan, check_sides
from rsrouter.core.tree import Stage, Tree
from rsrouter.core.types import ABSTAIN, RULES, Certificate

SELECT, ESTIMATE = "select", "estimate"


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """Votes `start` to `start + count` of one network's stream on one image.

    Attributes:
        image: position of the image in the call.
        network: name of the network to run.
        purpose: which stream: select, estimate, predict, label, train, tune, audit.
        start: index of the first vote in the stream.
        count: how many votes.
    """

    image: int
    network: str
    purpose: str
    start: int
    count: int


def descend(tree: Tree, name: str, counts: NDArray[np.int64]) -> int:
    """Index into `leads_to` of the target that the votes `counts (L,)` choose; ties go to the lower index."""
    stage = tree.stages[name]
    top = int(counts.argmax())
    if stage.kind == "threshold" and not counts[top] >= stage.tau * counts.sum():  # type: ignore[operator]
        return len(stage.leads_to) - 1
    return top


class CertifyPolicy:
    """Selection, estimation and stopping for `num_images` images; see the module's text.

    Each image goes through: selection (descend the tree on `n0` votes per stage, which fixes the class and the
    references), then estimation rounds. In each round the networks that can still raise the certified cell
    are advanced to their next look. An image is finished when its certified radius and the radius it could
    still reach fall into one cell of the plan's grid.

    Args:
        tree: stages of the routed classifier.
        plan: how many votes, and the bounds.
        split: alpha of every stage.
        num_images: how many images take part.
        rule: `"tree"` may sample every stage; `"min"` only those on the selected path (Dual RS).
        sides: sidedness of plurality bounds.
    """

    def __init__(
        self, tree: Tree, plan: Plan, split: AlphaSplit, num_images: int, *, rule: str = "tree", sides: str = "two"
    ) -> None:
        check_sides(sides)
        if rule not in RULES:
            raise PlanError("Unknown rule", expected=f"one of {RULES}", received=repr(rule), remedy="use rule='tree'")
        missing = set(tree.stages) - set(split.stages)
        if missing or set(split.paths) != set(tree.paths):
            raise PlanError("The alpha split belongs to another tree", expected=f"paths {tree.paths}",
                            received=f"paths {split.paths}", remedy="AlphaSplit.even(alpha, tree.paths)")
        self.tree, self.plan, self.split, self.rule, self.sides = tree, plan, split, rule, sides
        n = num_images
        self._networks = tree.networks
        self._stages = {g: tuple(s for s in tree.order if tree.stages[s].network == g) for g in self._networks}
        for g, names in self._stages.items():
            if len({tree.stages[s].sigma for s in names}) != 1:
                raise PlanError(f"Stages on network {g!r} have different sigmas", expected="one sigma per network",
                                received=str({s: tree.stages[s].sigma for s in names}), remedy="give them networks of their own")
        width = {s: tree.stages[s].num_outcomes for s in tree.order}
        self._selected = {s: np.zeros((n, width[s]), np.int64) for s in tree.order}
        self._counts = {s: np.zeros((n, width[s]), np.int64) for s in tree.order}
        self._lower = {s: np.zeros((n, width[s])) for s in tree.order}
        self._upper = {s: np.ones((n, width[s])) for s in tree.order}
        self._reference = {s: np.full(n, -1) for s in tree.order}
        self._look = {g: np.full(n, -1) for g in self._networks}
        self._drawn_select = {g: np.zeros(n, np.int64) for g in self._networks}
        self._on_path = {s: np.zeros(n, bool) for s in tree.order}
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
            if name is not None:
                requests.append(VoteRequest(i, self.tree.stages[name].network, SELECT, 0, self.plan.n0))
            elif not self.done[i]:
                estimating.append(i)
        if estimating:
            rows = np.asarray(estimating)
            for column, network in zip(self._choose(rows).T, self._networks, strict=True):
                for i in rows[column]:
                    look = int(self._look[network][i])
                    start = self.plan.looks[look] if look >= 0 else 0
                    requests.append(VoteRequest(int(i), network, ESTIMATE, start, self.plan.looks[look + 1] - start))
        return requests

    def update(self, requests: Sequence[VoteRequest], counts: Sequence[dict[str, NDArray[np.int64]]]) -> None:
        """Takes the votes of `requests`: per request a mapping of every stage on its network to `(L,)` counts."""
        advanced: dict[str, list[int]] = {g: [] for g in self._networks}
        estimated: set[int] = set()
        for request, votes in zip(requests, counts, strict=True):
            i, network = request.image, request.network
            for name in self._stages[network]:
                drawn = np.asarray(votes[name], dtype=np.int64)
                if drawn.shape != (self.tree.stages[name].num_outcomes,) or drawn.sum() != request.count or (drawn < 0).any():
                    raise PlanError(f"Votes of stage {name!r} do not answer the request",
                                    expected=f"{self.tree.stages[name].num_outcomes} counts summing to {request.count}",
                                    received=str(drawn.tolist()), remedy="count every vote once, invalid ones included")
                if request.purpose == SELECT:
                    self._selected[name][i] = drawn
                else:
                    self._counts[name][i] += drawn
            if request.purpose == SELECT:
                self._drawn_select[network][i] = request.count
                self._walk(i)
            else:
                self._look[network][i] += 1
                advanced[network].append(i)
                estimated.add(i)
        for network, members in advanced.items():
            if members:
                self._tighten(network, np.asarray(members))
        if estimated:
            self._settle(np.asarray(sorted(estimated)))

    def drawn(self, i: int) -> int:
        """Votes drawn for image `i`, selection included."""
        estimate = sum(self.plan.looks[look[i]] for look in self._look.values() if look[i] >= 0)
        return int(estimate + sum(int(drawn[i]) for drawn in self._drawn_select.values()))

    def certificate(self, i: int) -> Certificate:
        """The certificate of image `i`, once it is done."""
        if not self.done[i]:
            raise PlanError("The image is still being certified", expected="a finished image", received=f"image {i}",
                            remedy="draw the requested votes first")
        certified = bool(self.radius[i] > 0.0 and self.c[i] > ABSTAIN)
        r_router, r_expert = self._min_rule(i)
        last = self._path[i][-1][0] if self._path[i] else self.tree.root
        sampled = [s for s in self.tree.order if self._look[self.tree.stages[s].network][i] >= 0]
        chosen = [s for s in self.tree.order if self._drawn_select[self.tree.stages[s].network][i] > 0]
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
        )

    def _walk(self, i: int) -> None:
        """Descends on selection votes as far as they go; fixes class and references at an answer."""
        while (name := self._at[i]) is not None:
            stage = self.tree.stages[name]
            if not self._drawn_select[stage.network][i]:
                return
            index = descend(self.tree, name, self._selected[name][i])
            self._on_path[name][i] = True
            self._path[i].append((name, index))
            target = stage.leads_to[index]
            if isinstance(target, str):
                self._at[i] = target
            else:
                self._at[i] = None
                self.c[i] = target
        if self.c[i] <= ABSTAIN:
            self.done[i] = True
            self.bound_by[i] = self._path[i][-1][0]
            return
        leaving = dict(self._path[i][:-1])
        for name in self.tree.order:
            stage = self.tree.stages[name]
            if name in leaving and stage.kind == "plurality":
                self._reference[name][i] = leaving[name]
            else:
                same = np.flatnonzero(stage.answers[: stage.num_outcomes] == self.c[i])
                self._reference[name][i] = int(same[0]) if same.size else -1

    def _arguments(self, name: str, rows: NDArray[np.int64]) -> tuple[Stage, NDArray[np.int64], NDArray[np.int64]]:
        return self.tree.stages[name], self._reference[name][rows], self.c[rows]

    def _tighten(self, network: str, rows: NDArray[np.int64]) -> None:
        """Bounds at the look just completed; all looks hold at once, so the best so far stands."""
        for name in self._stages[network]:
            stage, reference, c = self._arguments(name, rows)
            new = self.plan.bounds(stage, self._counts[name][rows], self._look[network][rows], reference, c,
                                   alpha=self.split.stages[name], sides=self.sides, lower_share=self.split.lower_share)
            self._lower[name][rows] = np.maximum(self._lower[name][rows], new.lower)
            self._upper[name][rows] = np.minimum(self._upper[name][rows], new.upper)

    def _allowed(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`(rows, networks)`: which networks the rule may draw from and that have votes left."""
        last = len(self.plan.looks) - 1
        columns = []
        for network in self._networks:
            free = self._look[network][rows] < last
            if self.rule == "min":
                free &= np.any([self._on_path[s][rows] for s in self._stages[network]], axis=0)
            columns.append(free)
        return np.stack(columns, axis=1)

    def _radius(self, rows: NDArray[np.int64], hope: NDArray[np.bool_] | None = None) -> tuple[Array, NDArray[np.object_]]:
        """Certified radius of `rows`, with the networks marked in `hope (rows, networks)` at what they could reach."""
        lower, upper, sampled, stages = {}, {}, {}, []
        for g, network in enumerate(self._networks):
            look = self._look[network][rows]
            hoping = np.zeros(len(rows), bool) if hope is None else hope[:, g]
            for name in self._stages[network]:
                stage, reference, c = self._arguments(name, rows)
                low, high = self._lower[name][rows], self._upper[name][rows]
                if hoping.any():
                    best = self.plan.hopes(stage, self._counts[name][rows], look, reference, c,
                                           alpha=self.split.stages[name], sides=self.sides, lower_share=self.split.lower_share)
                    low = np.where(hoping[:, None], np.maximum(low, best.lower), low)
                    high = np.where(hoping[:, None], np.minimum(high, best.upper), high)
                lower[name], upper[name] = low, high
                allowed = True if self.rule == "tree" else self._on_path[name][rows]
                sampled[name] = ((look >= 0) | hoping) & allowed
                stages.append(Stage(name, stage.sigma, stage.kind, stage.tau, stage.leads_to, reference, network, stage.expert))
        return tree_radius(Tree({s.name: s for s in stages}, self.tree.root), None, lower, upper, self.c[rows], sampled=sampled)

    def _choose(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """`(rows, networks)`: which networks to advance to their next look; at least one per row."""
        free = self._allowed(rows)
        ceiling = self.plan.cell(self._radius(rows, free)[0])
        without = np.stack(
            [self.plan.cell(self._radius(rows, free & (np.arange(free.shape[1]) != g))[0]) for g in range(free.shape[1])], axis=1
        )
        needed = free & (without < ceiling[:, None])
        # where no network is needed by itself, any free one may do
        needed = np.where(needed.any(1, keepdims=True), needed, free)
        look = np.stack([self._look[g][rows] for g in self._networks], axis=1)
        behind = np.where(needed, look, np.iinfo(np.int64).max)
        needed &= look == behind.min(axis=1, keepdims=True)
        path = np.stack([np.any([self._on_path[s][rows] for s in self._stages[g]], axis=0) for g in self._networks], axis=1)
        on_path = needed & path
        worst = np.where(needed, without, np.inf).argmin(axis=1)
        single = np.zeros_like(needed)
        single[np.arange(len(rows)), worst] = True
        return np.where(on_path.any(1, keepdims=True), on_path, single)

    def _settle(self, rows: NDArray[np.int64]) -> None:
        """Updates radii and finishes the images whose cell can no longer change."""
        radius, by = self._radius(rows)
        self.radius[rows], self.bound_by[rows] = radius, by
        free = self._allowed(rows)
        ceiling, _ = self._radius(rows, free)
        self.done[rows] = ~free.any(1) | ~(self.plan.cell(ceiling) > self.plan.cell(radius))

    def _min_rule(self, i: int) -> tuple[float, float]:
        """R_router and R_expert of image `i`: the two terms of Dual RS's min rule on the selected path."""
        if self.c[i] <= ABSTAIN:
            return 0.0, 0.0
        rows = np.array([i])
        r_router, r_expert = np.inf, 0.0
        for position, (name, index) in enumerate(self._path[i]):
            stage, reference, _ = self._arguments(name, rows)
            if self._look[stage.network][i] < 0:
                entry = np.zeros(len(stage.leads_to))
            else:
                entry = entry_radii(stage, self._lower[name][rows], self._upper[name][rows], reference)[0]
            others = np.delete(entry, index)
            if position < len(self._path[i]) - 1:
                r_router = min(r_router, float(others.min()))
            else:
                r_expert = float(others.min())
        return float(r_router), r_expert


__all__ = ["ESTIMATE", "SELECT", "CertifyPolicy", "VoteRequest", "descend"]
