"""Plans: how many votes, when to stop, and the bound that is valid for exactly that rule, in one object."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.bounds import Array, AlphaSplit, binom_lower, binom_upper
from rsrouter.core.certificates import tree_radius
from rsrouter.core.errors import PlanError
from rsrouter.core.tree import Stage, Tree
from rsrouter.core.types import SIDES

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class StageBounds:
    """`(N, L)` lower and upper bounds on one stage's outcome probabilities."""

    lower: Array
    upper: Array


class Plan(ABC):
    """A sequence of looks at cumulative votes, and the bounds valid at all of them simultaneously.

    Theorem (union bound over looks): the bound at look i uses Clopper-Pearson at `alpha * shares[i]` with
    `sum(shares) <= 1`, so with probability at least `1 - alpha` the bounds of *all* looks hold at once.
    Hence any rule may choose the look at which to stop, and the best bound over completed looks is valid.
    """

    kind: ClassVar[str]
    n0: int
    beta: float

    @property
    @abstractmethod
    def looks(self) -> tuple[int, ...]:
        """Cumulative numbers of estimation votes, ascending; the last is the most a stage may draw."""

    @property
    @abstractmethod
    def shares(self) -> tuple[float, ...]:
        """The part of a stage's alpha that each look spends; sums to at most 1."""

    @property
    @abstractmethod
    def radii(self) -> tuple[float, ...] | None:
        """Radii the user cares about, or None where every increase of the radius counts."""

    @property
    def n_max(self) -> int:
        """The most estimation votes a stage may draw."""
        return self.looks[-1]

    def cell(self, radius: Array) -> Array:
        """Which cell of the user's grid a radius falls into; larger is better, 0 is "abstain"."""
        if self.radii is None:
            return np.asarray(radius, dtype=np.float64)
        edges = np.asarray(self.radii)
        return np.where(radius > 0.0, 1.0 + np.searchsorted(edges, radius, side="right"), 0.0)

    def bounds(
        self, stage: Stage, counts: Counts, look: NDArray[np.int64], reference: NDArray[np.int64], c: NDArray[np.int64],
        *, alpha: float, sides: str = "two", lower_share: float = 0.9,
    ) -> StageBounds:
        """Bounds on a stage's outcome probabilities at completed looks.

        Args:
            stage: the smoothed vote.
            counts: `(N, L)` cumulative estimation votes; every row sums to its look.
            look: `(N,)` index into `looks` of each row.
            reference: `(N,)` the outcome whose lower bound counts, -1 for none.
            c: `(N,)` the class to certify.
            alpha: the stage's failure probability.
            sides: `"one"` bounds every rival by `1 - lower`; `"two"` also from its own votes.
            lower_share: the part of a two-sided plurality stage's alpha that the lower bound gets.

        Returns:
            Bounds of shape `(N, L)`. Only the reference's lower bound is informative. Outcomes that answer
            another class share the upper bound of the one with most votes: Clopper-Pearson is monotone in
            the count, so it holds for each of them.
        """
        check_sides(sides)
        n = np.asarray(self.looks, dtype=np.int64)[look]
        _check_rows(stage, counts, n)
        level = alpha * np.asarray(self.shares)[look]
        return _bounds(stage, counts, n, reference, c, level, sides, lower_share)

    def hopes(
        self, stage: Stage, counts: Counts, look: NDArray[np.int64], reference: NDArray[np.int64], c: NDArray[np.int64],
        *, alpha: float, sides: str = "two", lower_share: float = 0.9,
    ) -> StageBounds:
        """Bounds this stage could still reach by the last look, at confidence `1 - beta`: costs power only.

        The remaining votes are taken to fall as well as the upper (for the reference) or lower (for rivals)
        confidence bound at level `beta` on their probability allows. `look` is -1 where nothing was drawn.
        """
        total = np.full(look.shape, self.n_max)
        drawn = np.where(look >= 0, np.asarray(self.looks, dtype=np.int64)[look], 0)
        left = total - drawn
        rows = np.arange(len(look))
        some = np.maximum(drawn, 1)
        seen = np.where(drawn[:, None] > 0, counts, 0)
        chosen = np.maximum(reference, 0)
        top = seen[rows, chosen]
        best = np.where(drawn > 0, binom_upper(np.minimum(top, some), some, self.beta), 1.0)
        worst = np.where(drawn[:, None] > 0, binom_lower(np.minimum(seen, some[:, None]), some[:, None], self.beta), 0.0)
        future = seen + np.floor(left[:, None] * worst).astype(np.int64)
        future[rows, chosen] = top + np.ceil(left * best).astype(np.int64)
        future = np.minimum(future, total[:, None])
        level = np.full(look.shape, alpha * self.shares[-1])
        return _bounds(stage, future, total, reference, c, level, sides, lower_share)

    def reach(self, tree: Tree, split: AlphaSplit, sides: str = "two") -> float:
        """The largest radius that unanimous votes of this plan could certify with this tree and split."""
        best = 0.0
        for path in tree.paths:
            for depth in range(len(path)):
                best = max(best, _reach_path(self, tree, path[: depth + 1], split, sides))
        return best

    def check(self, tree: Tree, split: AlphaSplit, sides: str = "two") -> None:
        """Refuses a radius that no path of the tree can reach, with the number of votes that would do.

        Raises:
            PlanError: some radius in `radii` exceeds `reach`.
        """
        if self.radii is None:
            return
        reach = self.reach(tree, split, sides)
        beyond = [r for r in self.radii if not r <= reach]
        if beyond:
            need = self.n_max
            while need < 10**12 and self.with_votes(need).reach(tree, split, sides) < beyond[-1]:
                need *= 2
            low = max(need // 2, 1)
            while need - low > max(1, need // 1000) and need < 10**12:
                middle = (low + need) // 2
                if self.with_votes(middle).reach(tree, split, sides) < beyond[-1]:
                    low = middle
                else:
                    need = middle
            remedy = (f"draw n_max = {need} votes or more" if need < 10**12 else "use a larger sigma")
            raise PlanError(
                f"No vote of this plan can certify radius {beyond[0]:g}", expected=f"radii up to {reach:.4f} at n_max = {self.n_max}",
                received=f"radii {', '.join(f'{r:g}' for r in beyond)}", remedy=f"{remedy}, or drop the radius",
            )

    @abstractmethod
    def with_votes(self, n_max: int) -> Plan:
        """The same plan with another number of votes, its radii not checked."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description; `plan_from_dict` reads it back."""


def check_sides(sides: str) -> None:
    """Raises PlanError unless `sides` is `"one"` or `"two"`."""
    if sides not in SIDES:
        raise PlanError("Unknown sidedness", expected="'one' or 'two'", received=repr(sides), remedy="choose before sampling")


def _check_rows(stage: Stage, counts: Counts, n: NDArray[np.int64]) -> None:
    if counts.ndim != 2 or counts.shape[1] != stage.num_outcomes or counts.shape[0] != n.shape[0]:
        raise PlanError(f"Counts of stage {stage.name!r} have the wrong shape", expected=f"({n.shape[0]}, {stage.num_outcomes})",
                        received=str(counts.shape), remedy="one column per vote outcome, invalid votes included")
    if np.any(counts < 0) or np.any(counts.sum(1) != n):
        raise PlanError(f"Counts of stage {stage.name!r} do not sum to their look", expected=f"rows summing to {n[:3].tolist()}...",
                        received=f"{counts.sum(1)[:3].tolist()}...", remedy="count every vote, invalid ones included")


def _bounds(
    stage: Stage, counts: Counts, n: NDArray[np.int64], reference: NDArray[np.int64], c: NDArray[np.int64],
    level: Array, sides: str, lower_share: float,
) -> StageBounds:
    rows = np.arange(len(n))
    plurality = stage.kind == "plurality"
    two_sided = sides == "two" or not plurality
    lower_level = level * lower_share if plurality and two_sided else level
    upper_level = level * (1.0 - lower_share) if plurality else level
    chosen = np.maximum(reference, 0)
    low = np.where(reference >= 0, binom_lower(np.minimum(counts[rows, chosen], n), n, lower_level), 0.0)
    lower = np.zeros(counts.shape)
    lower[rows, chosen] = low
    upper = np.ones(counts.shape)
    if two_sided:
        answers = stage.answers[: stage.num_outcomes]
        rival = (answers[None, :] != c[:, None]) & (answers[None, :] != -2)
        if plurality:
            rival[rows, chosen] &= reference < 0
        most = np.where(rival, counts, 0).max(1)
        shared = binom_upper(np.minimum(most, n), n, upper_level)
        upper = np.where(rival, shared[:, None], upper)
        for column in np.flatnonzero(answers == -2):
            upper[:, column] = binom_upper(np.minimum(counts[:, column], n), n, upper_level)
    others = np.where(reference[:, None] >= 0, 1.0 - low[:, None], 1.0)
    if plurality:
        upper = np.minimum(upper, others)
    return StageBounds(lower, upper)


def _reach_path(plan: Plan, tree: Tree, path: tuple[str, ...], split: AlphaSplit, sides: str) -> float:
    """Radius when every stage on `path` is unanimous for the next one and everything else agrees on a class."""
    c = np.zeros(1, dtype=np.int64)
    stages, lower, upper = [], {}, {}
    for name in tree.order:
        stage = tree.stages[name]
        reference = np.full(1, -1)
        answered = np.flatnonzero(stage.answers[: stage.num_outcomes] >= 0)
        if answered.size:
            c = np.array([int(stage.answers[answered[0]])])
    for name in tree.order:
        stage = tree.stages[name]
        same = np.flatnonzero(stage.answers[: stage.num_outcomes] == c[0])
        reference = np.array([int(same[0]) if same.size else -1])
        if name in path[:-1]:
            following = path[path.index(name) + 1]
            leads = [i for i, t in enumerate(stage.leads_to[: stage.num_outcomes]) if t == following]
            if leads:
                reference = np.array([leads[0]])
            elif stage.kind == "threshold":
                reference = np.array([-1])
        counts = np.zeros((1, stage.num_outcomes), dtype=np.int64)
        if reference[0] >= 0:
            counts[0, reference[0]] = plan.n_max
        bounds = plan.hopes(stage, counts, np.array([len(plan.looks) - 1]), reference, c, alpha=split.stages[name],
                            sides=sides, lower_share=split.lower_share)
        stages.append(Stage(name, stage.sigma, stage.kind, stage.tau, stage.leads_to, reference, stage.network, stage.expert))
        lower[name], upper[name] = bounds.lower, bounds.upper
    radius, _ = tree_radius(stages, tree.root, lower, upper, c)
    return float(radius[0])


def check_whole(name: str, value: object, least: int) -> int:
    """An int of at least `least`; refuses bool, fractions and anything else with a PlanError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise PlanError(f"{name} must be a whole number of at least {least}", expected=f"{name} >= {least}",
                        received=repr(value), remedy="n0 = 100 and n = 100,000 are the field's defaults")
    return int(value)


@dataclass(frozen=True)
class FixedPlan(Plan):
    """Cohen's CERTIFY: `n0` selection votes, then exactly `n` estimation votes, one Clopper-Pearson bound.

    The reference that published tables use (Cohen et al. 2019, algorithm CERTIFY). A stage is drawn whole or
    not at all.
    """

    n0: int = 100
    n: int = 100_000
    kind: ClassVar[str] = "fixed"
    beta: ClassVar[float] = 0.01  # type: ignore[misc]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n0", check_whole("n0", self.n0, 1))
        object.__setattr__(self, "n", check_whole("n", self.n, 1))

    @property
    def looks(self) -> tuple[int, ...]:
        return (self.n,)

    @property
    def shares(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def radii(self) -> None:
        return None

    def with_votes(self, n_max: int) -> FixedPlan:
        return FixedPlan(self.n0, n_max)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "n0": self.n0, "n": self.n}


@dataclass(frozen=True)
class AdaptivePlan(Plan):
    """Stops as soon as the certified radius and what it could still become share a cell of the user's grid.

    Looks at geometric checkpoints on cumulative votes, Clopper-Pearson at look k with `alpha_k`,
    `sum alpha_k = alpha`, most of it kept for the last look. All bounds hold simultaneously, so stopping may
    depend on anything, other stages included. The upper confidence radius at level `beta` decides when more
    votes are hopeless; it costs power, never soundness (compare Horvath et al. 2022, Voracek 2024).

    Args:
        n_max: the most estimation votes per stage.
        radii: radii the user cares about, ascending after sorting; "not abstaining" always counts as well.
        n0: selection votes per stage.
        beta: level of the upper confidence radius.
        growth: ratio of consecutive looks.
        first: no look before this many votes.
        last_share: the part of alpha kept for the last look.
    """

    n_max_: int
    grid: tuple[float, ...]
    n0: int
    beta: float
    growth: float
    first: int
    last_share: float
    kind: ClassVar[str] = "adaptive"

    def __init__(
        self, n_max: int, radii: Sequence[float], n0: int = 100, beta: float = 0.01, *, growth: float = 2.0,
        first: int = 100, last_share: float = 0.9,
    ) -> None:
        put = object.__setattr__
        put(self, "n_max_", check_whole("n_max", n_max, 1))
        put(self, "n0", check_whole("n0", n0, 1))
        put(self, "first", check_whole("first", first, 1))
        grid = np.unique(np.asarray(list(radii), dtype=np.float64))
        if grid.size == 0 or not np.all(np.isfinite(grid) & (grid >= 0)):
            raise PlanError("An adaptive plan needs the radii you care about", expected="finite radii >= 0, at least one",
                            received=repr(radii), remedy="0, 0.25, 0.5, ... as in the tables you compare with")
        put(self, "grid", tuple(float(r) for r in grid if r > 0.0))
        for name, value, low, high in (("beta", beta, 0, 1), ("last_share", last_share, 0, 1), ("growth", growth, 1, np.inf)):
            if not low < value < high:
                raise PlanError(f"{name} is out of range", expected=f"{low} < {name} < {high}", received=repr(value),
                                remedy=f"leave out {name} to take the default")
            put(self, name, float(value))

    @property
    def radii(self) -> tuple[float, ...]:
        return self.grid

    @property
    def looks(self) -> tuple[int, ...]:
        looks = [self.n_max_]
        while (earlier := int(np.ceil(looks[-1] / self.growth))) >= self.first and earlier < looks[-1]:
            looks.append(earlier)
        return tuple(reversed(looks))

    @property
    def shares(self) -> tuple[float, ...]:
        count = len(self.looks)
        if count == 1:
            return (1.0,)
        return (*([(1.0 - self.last_share) / (count - 1)] * (count - 1)), self.last_share)

    def with_votes(self, n_max: int) -> AdaptivePlan:
        return AdaptivePlan(n_max, self.grid or (0.0,), self.n0, self.beta, growth=self.growth, first=self.first,
                            last_share=self.last_share)

    def within(self, reach: float) -> AdaptivePlan:
        """The same plan without the radii beyond `reach` (for an expert that cannot certify all of them)."""
        kept = [r for r in self.grid if r <= reach]
        return AdaptivePlan(self.n_max_, kept or [0.0], self.n0, self.beta, growth=self.growth, first=self.first,
                            last_share=self.last_share)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "n_max": self.n_max_, "radii": list(self.grid), "n0": self.n0, "beta": self.beta,
                "growth": self.growth, "first": self.first, "last_share": self.last_share}


def plan_from_dict(data: dict[str, Any]) -> Plan:
    """The plan that `to_dict` described.

    Raises:
        PlanError: unknown kind, or arguments that do not fit it.
    """
    fields = dict(data)
    kinds: dict[str, type[FixedPlan] | type[AdaptivePlan]] = {"fixed": FixedPlan, "adaptive": AdaptivePlan}
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise PlanError("Unknown plan", expected=f"kind one of {sorted(kinds)}", received=repr(kind), remedy="see rsrouter.FixedPlan")
    try:
        return kinds[kind](**fields)
    except TypeError as error:
        raise PlanError("A stored plan does not fit its kind", expected=f"the fields of {kind!r}", received=str(sorted(fields)),
                        remedy="was it written by a newer version?") from error
