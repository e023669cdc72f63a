"""Plans: how many votes, when to stop, and the bound that is valid for exactly that rule, in one object."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.bounds import MOST_VOTES, AlphaSplit, Array, LinearSpending, check_whole
from rsrouter.core.certificates import entry_radii, group_entries, recursion
from rsrouter.core.errors import PlanError
from rsrouter.core.estimates import FAMILIES, Bound, Counts, StageBounds, check_rows, check_sides, hoped_counts, stage_bounds
from rsrouter.core.tree import Stage, Tree

#: By how alpha is spent: the ratio of consecutive looks and the part of alpha that the last look keeps, unless told otherwise.
DEFAULTS = {"linear": (1.25, 0.75), "even": (2.0, 0.9)}


class Plan(ABC):
    """A sequence of looks at cumulative votes, and the bounds valid at all of them simultaneously.

    Theorem (union bound over looks): the bound at look i uses Clopper-Pearson at `alpha * shares[i]` with
    `sum(shares) <= 1`, so with probability at least `1 - alpha` the bounds of *all* looks hold at once. Where `bounders`
    hold at all looks by themselves (`LinearSpending`, or a confidence sequence, `bound="mixture"`), each share is 1.
    Hence any rule may choose the look at which to stop, and the best bound over completed looks is valid.
    """

    kind: ClassVar[str]
    n0: int
    beta: float
    #: Family of bounds, a key of `estimates.FAMILIES`.
    bound: str

    @property
    @abstractmethod
    def looks(self) -> tuple[int, ...]:
        """Cumulative numbers of estimation votes, ascending; the last is the most a stage may draw."""

    @property
    @abstractmethod
    def shares(self) -> tuple[float, ...]:
        """The part of a stage's alpha that each look spends: sums to 1, or is 1 each where `bounders` hold at all looks."""

    @property
    @abstractmethod
    def radii(self) -> tuple[float, ...] | None:
        """Radii the user cares about, or None where every increase of the radius counts."""

    @property
    def bounders(self) -> tuple[Bound, Bound]:
        """Lower and upper bound of a proportion after `k` of `n` votes, at a level; n is one of `looks`."""
        return FAMILIES[self.bound]

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
        self,
        stage: Stage,
        counts: Counts,
        look: NDArray[np.int64],
        reference: NDArray[np.int64],
        c: NDArray[np.int64],
        *,
        alpha: float,
        sides: str = "two",
        lower_share: float = 0.9,
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
        if np.any(look < 0):
            raise PlanError(
                "Bounds need a completed look",
                expected="look >= 0",
                received=str(look.min()),
                remedy="draw the first look's votes",
            )
        check_rows(stage, counts, n)
        level = alpha * np.asarray(self.shares)[look]
        return stage_bounds(stage, counts, n, reference, c, level, sides=sides, lower_share=lower_share, bounders=self.bounders)

    def hopes(
        self,
        stage: Stage,
        counts: Counts,
        look: NDArray[np.int64],
        reference: NDArray[np.int64],
        c: NDArray[np.int64],
        *,
        alpha: float,
        sides: str = "two",
        lower_share: float = 0.9,
    ) -> StageBounds:
        """Bounds this stage may still reach by the last look; they steer what is drawn and enter no certificate.

        The counts at `n_max` are taken at their prediction limits of level `beta` given the votes so far, high for
        the reference and low for rivals (`estimates.hoped_counts`). `look` is -1 where nothing was drawn.
        """
        check_sides(sides)
        drawn = np.where(look >= 0, np.asarray(self.looks, dtype=np.int64)[look], 0)
        future = hoped_counts(stage, counts, drawn, self.n_max, reference, c, self.beta)
        level = np.full(look.shape, alpha * self.shares[-1])
        total = np.full(look.shape, self.n_max)
        return stage_bounds(
            stage, future, total, reference, c, level, sides=sides, lower_share=lower_share, bounders=self.bounders
        )

    def reach(self, tree: Tree, split: AlphaSplit, sides: str = "two") -> float:
        """The largest radius that unanimous votes of this plan could certify with this tree and split."""
        best = 0.0
        for path in tree.chains:
            for depth in range(len(path)):
                best = max(best, unanimous_radius(self, tree, path[: depth + 1], split, sides))
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
            need = votes_for(self, tree, split, sides, beyond[-1])
            remedy = "use a larger sigma" if need is None else f"draw n_max = {need} votes or more"
            kept = [f"{r:g}" for r in self.radii if r <= reach]
            fits = f"or keep the radii that fit: {','.join(kept)}" if 0 < len(kept) <= 20 else "or drop the radius"
            raise PlanError(
                f"No vote of this plan can certify radius {beyond[0]:g}",
                expected=f"radii up to {reach:.4f} at n_max = {self.n_max}",
                received=f"radii {', '.join(f'{r:g}' for r in beyond)}",
                remedy=f"{remedy}, {fits}",
            )

    @abstractmethod
    def with_votes(self, n_max: int) -> Plan:
        """The same plan with another number of votes, its radii not checked."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description; `plan_from_dict` reads it back."""


@dataclass(frozen=True)
class FixedPlan(Plan):
    """Cohen's CERTIFY: `n0` selection votes, then exactly `n` estimation votes, one Clopper-Pearson bound.

    The reference that published tables use (Cohen et al. 2019, algorithm CERTIFY). A stage is drawn whole or
    not at all.

    Args:
        n0: selection votes per stage.
        n: estimation votes of every stage that is sampled.

    Raises:
        PlanError: a number that is not whole, or below 1.
    """

    n0: int = 100
    n: int = 100_000
    kind: ClassVar[str] = "fixed"
    beta: ClassVar[float] = 0.01  # type: ignore[misc]
    bound: ClassVar[str] = "clopper-pearson"  # type: ignore[misc]

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

    Looks at geometric checkpoints on cumulative votes. Clopper-Pearson bounds share alpha among the looks, most of it kept
    for the last one, in proportion to the votes and from the first look on that could reject a proportion
    (`LinearSpending`), or in equal parts; a confidence sequence may use the whole alpha at each of them. All bounds hold
    simultaneously, so stopping may depend on anything, other stages included. Prediction limits at level `beta` decide
    when more votes are hopeless; they cost power, never soundness (compare Horvath et al. 2022, Voracek 2024). On published
    tables of 10,000 images at n_max = 100,000 and a grid of 0.25 the defaults draw 10 to 15% of the votes at sigma 0.25 to 1.0
    and lose at most 0.05 points of certified accuracy at any of these radii (`examples/replay_adaptive.py`).

    Args:
        n_max: the most estimation votes per stage.
        radii: radii the user cares about, ascending after sorting; "not abstaining" always counts as well.
        n0: selection votes per stage.
        beta: level of the prediction limits; `rsrouter.core.patience` tells what more of it saves in votes and costs in radii.
        growth: ratio of consecutive looks. Linear: from a tenth of `n_max` on, and 2 or more before; None: 1.25. Even: None: 2.
        first: no look before this many votes.
        last_share: the least part of alpha kept for the last look (Clopper-Pearson only); None: 0.75 linear, 0.9 even.
        bound: `"clopper-pearson"` or `"mixture"` (`sequence_lower`, `sequence_upper`).
        spending: how the rest of alpha is spent before: `"linear"` (Clopper-Pearson's default), or `"even"`, in equal parts.

    Raises:
        PlanError: an argument out of its range.
    """

    n_max_: int
    grid: tuple[float, ...]
    n0: int
    beta: float
    growth: float
    first: int
    last_share: float
    bound: str
    spending: str
    kind: ClassVar[str] = "adaptive"

    def __init__(
        self,
        n_max: int,
        radii: Sequence[float],
        n0: int = 100,
        beta: float = 0.01,
        *,
        growth: float | None = None,
        first: int = 100,
        last_share: float | None = None,
        bound: str = "clopper-pearson",
        spending: str | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "n_max_", check_whole("n_max", n_max, 1))
        put(self, "n0", check_whole("n0", n0, 1))
        put(self, "first", check_whole("first", first, 1))
        try:
            grid = np.unique(np.asarray(list(radii), dtype=np.float64))
        except (TypeError, ValueError):
            grid = np.empty(0)
        if grid.size == 0 or not np.all(np.isfinite(grid) & (grid >= 0)):
            raise PlanError(
                "An adaptive plan needs the radii you care about",
                expected="finite radii >= 0, at least one",
                received=repr(radii),
                remedy="0, 0.25, 0.5, ... as in the tables you compare with",
            )
        put(self, "grid", tuple(float(r) for r in grid if r > 0.0))
        if bound not in FAMILIES:
            raise PlanError(
                "Unknown family of bounds",
                expected=f"one of {sorted(FAMILIES)}",
                received=repr(bound),
                remedy="leave out bound to take Clopper-Pearson",
            )
        put(self, "bound", bound)
        if spending is None:
            spending = "linear" if bound == "clopper-pearson" else "even"
        if spending not in (["linear", "even"] if bound == "clopper-pearson" else ["even"]):
            raise PlanError(
                "Unknown way to spend alpha",
                expected="'linear' or 'even', and only 'even' with a confidence sequence, which spends all of it at every look",
                received=repr(spending),
                remedy="leave out spending",
            )
        put(self, "spending", spending)
        growth = DEFAULTS[spending][0] if growth is None else growth
        last_share = DEFAULTS[spending][1] if last_share is None else last_share
        for name, value, low, high in (("beta", beta, 0, 1), ("last_share", last_share, 0, 1), ("growth", growth, 1.01, np.inf)):
            if isinstance(value, bool) or not isinstance(value, Real) or not low < value < high:
                raise PlanError(
                    f"{name} is out of range",
                    expected=f"{low} < {name} < {high}",
                    received=repr(value),
                    remedy=f"leave out {name} to take the default",
                )
            put(self, name, float(value))

    @property
    def radii(self) -> tuple[float, ...]:
        return self.grid

    @cached_property
    def looks(self) -> tuple[int, ...]:
        # small looks cost little whatever their number, so they are few
        sparse = self.n_max_ / 10 if self.spending == "linear" else 0.0
        looks = [self.n_max_]
        while True:
            ratio = self.growth if looks[-1] > sparse else max(self.growth, 2.0)
            earlier = int(np.ceil(looks[-1] / ratio))
            if earlier < self.first or earlier >= looks[-1]:
                return tuple(reversed(looks))
            looks.append(earlier)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        count = len(self.looks)
        if count == 1 or self.bound == "mixture" or self.spending == "linear":
            return (1.0,) * count
        return (*([(1.0 - self.last_share) / (count - 1)] * (count - 1)), self.last_share)

    @cached_property
    def bounders(self) -> tuple[Bound, Bound]:
        if self.spending == "even":
            return FAMILIES[self.bound]
        spending = LinearSpending(self.looks, self.last_share)
        return spending.lower, spending.upper

    def _with(self, **others: Any) -> AdaptivePlan:
        return AdaptivePlan(**{name: value for name, value in {**self.to_dict(), **others}.items() if name != "kind"})

    def with_votes(self, n_max: int) -> AdaptivePlan:
        return self._with(n_max=n_max)

    def with_beta(self, beta: float) -> AdaptivePlan:
        """The same plan with another patience: it steers what is drawn, and enters no bound."""
        return self._with(beta=beta)

    def with_radii(self, radii: Sequence[float]) -> AdaptivePlan:
        """The same plan on another grid."""
        return self._with(radii=list(radii))

    def within(self, reach: float) -> AdaptivePlan:
        """The same plan without the radii beyond `reach` (for an expert that cannot certify all of them)."""
        return self._with(radii=[r for r in self.grid if r <= reach] or [0.0])

    def to_dict(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in ("n0", "beta", "growth", "first", "last_share", "bound", "spending")}
        return {"kind": self.kind, "n_max": self.n_max_, "radii": list(self.grid) or [0.0], **named}


def plan_from_dict(data: dict[str, Any]) -> Plan:
    """The plan that `to_dict` described.

    Raises:
        PlanError: unknown kind, or arguments that do not fit it.
    """
    fields = dict(data)
    kinds: dict[str, type[FixedPlan] | type[AdaptivePlan]] = {"fixed": FixedPlan, "adaptive": AdaptivePlan}
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise PlanError(
            "Unknown plan",
            expected=f"kind one of {sorted(kinds)}",
            received=repr(kind),
            remedy="see rsrouter.FixedPlan and rsrouter.AdaptivePlan",
        )
    try:
        return kinds[kind](**fields)
    except TypeError as error:
        raise PlanError(
            "A stored plan does not fit its kind",
            expected=f"the fields of {kind!r}",
            received=str(sorted(fields)),
            remedy="was it written by a newer version?",
        ) from error


def unanimous_radius(plan: Plan, tree: Tree, path: tuple[str, ...], split: AlphaSplit, sides: str) -> float:
    """Radius when every stage on `path` is unanimous for the next one, and all other votes are for one class."""
    c = np.zeros(1, dtype=np.int64)
    for name in tree.order:
        stage = tree.stages[name]
        answered = np.flatnonzero(stage.answers[: stage.num_outcomes] >= 0)
        if answered.size:
            c = np.array([int(stage.answers[answered[0]])])
    grouped: dict[str, Array] = {}
    last = np.array([len(plan.looks) - 1])
    how: dict[str, Any] = {"sides": sides, "lower_share": split.lower_share}
    for name in tree.order:
        stage = tree.stages[name]
        if not stage.votes:
            # logits may be as far apart as one likes: only the outcome that is followed is near
            following = path[path.index(name) + 1] if name in path[:-1] else int(c[0])
            entry = np.array([[0.0 if target == following else np.inf for target in stage.leads_to]])
            grouped[name] = group_entries(stage, entry, c)
            continue
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
        bounds = plan.hopes(stage, counts, last, reference, c, alpha=split.stages[name], **how)
        grouped[name] = group_entries(stage, entry_radii(stage, bounds.lower, bounds.upper, reference), c)
    return float(recursion(tree, grouped)[0][0])


def votes_for(plan: Plan, tree: Tree, split: AlphaSplit, sides: str, radius: float) -> int | None:
    """About the smallest `n_max` (within 0.1%) with which `plan` reaches `radius`; None beyond `MOST_VOTES`."""

    def short(votes: int) -> bool:
        return plan.with_votes(votes).reach(tree, split, sides) < radius

    need = plan.n_max
    while short(need):
        need *= 2
        if need > MOST_VOTES:
            return None
    low = need // 2
    while need - low > max(1, need // 1000):
        middle = (low + need) // 2
        low, need = (middle, need) if short(middle) else (low, middle)
    return need
