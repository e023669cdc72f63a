"""A routed classifier as a tree of stages (structure only; the certificates are in `certificates` and `passes`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, isfinite, nextafter, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsrouter.core.errors import PlanError
from rsrouter.core.types import ABSTAIN

#: Where an outcome leads: a class index (an answer; ABSTAIN answers nothing) or the name of the next stage.
Target = int | str

#: Stands in `Stage.answers` for an outcome that leads to another stage.
STAGE_TARGET = -2

#: A tree with more chains of stages is refused: each of them is checked against alpha.
MOST_PATHS = 10_000


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclass(frozen=True)
class Stage:
    """One smoothed vote: a base model under isotropic Gaussian noise, a decision, and where outcomes lead.

    With `lipschitz` it is *deterministic*: one forward pass without noise, sigma 0, and no alpha (`rsrouter.core.passes`).

    Args:
        name: unique in its tree; the stage's alpha belongs to this name.
        sigma: standard deviation of the noise, in [0,1]-pixel units; 0 for a deterministic stage.
        kind: `"plurality"` (the likeliest outcome wins, or the largest logit) or `"threshold"` (an outcome wins where its
            probability reaches `tau`, or where its logit leads every other one by `tau`; otherwise the stage defers).
        tau: threshold in (1/2, 1), for a deterministic stage above 0; only for threshold stages.
        leads_to: one target per vote outcome, in vote order. A threshold stage has one more target at the
            end: where it leads when it defers.
        reference: the outcome whose lower bound is used (an index, or one per image), fixed by selection
            votes alone. None: an outcome that answers the certified class, where the stage has one.
        network: stages with the same network share one forward pass and one stream of votes; by default
            each stage has its own.
        expert: name of the expert whose classes the stage answers, if it is one.
        lipschitz: L2 Lipschitz constant of the k logits, in logits for each unit of [0,1]-pixel distance, or a symmetric
            `(k, k)` table of constants of their differences. The last outcome of such a stage is the invalid one.
        rounding: by how much each computed logit may differ from that of the function which has this constant.
    """

    name: str
    sigma: float
    kind: str = "plurality"
    tau: float | None = None
    leads_to: tuple[Target, ...] = ()
    reference: int | NDArray[np.int64] | None = None
    network: str = ""
    expert: str | None = None
    lipschitz: float | tuple[tuple[float, ...], ...] | None = None
    rounding: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "leads_to", tuple(self.leads_to))
        if not self.network:
            object.__setattr__(self, "network", self.name)
        number = isinstance(self.sigma, int | float) and not isinstance(self.sigma, bool)
        if self.lipschitz is not None or self.rounding != 0.0:
            self._check_deterministic()
        elif not (number and isfinite(self.sigma) and self.sigma > 0):
            raise PlanError(
                f"Stage {self.name!r} has no usable sigma",
                expected="a finite number above 0",
                received=repr(self.sigma),
                remedy="give the standard deviation in [0,1]-pixel units",
            )
        bad = [t for t in self.leads_to if not isinstance(t, str) and not (_is_whole(t) and t >= ABSTAIN)]
        if bad:
            raise PlanError(
                f"Stage {self.name!r} has targets that are neither a class nor a stage",
                expected="class indices >= 0, ABSTAIN (-1) or stage names",
                received=str(bad),
                remedy="list an int or a name per outcome",
            )
        if self.kind not in ("plurality", "threshold"):
            raise PlanError(
                f"Stage {self.name!r} has an unknown kind",
                expected="'plurality' or 'threshold'",
                received=repr(self.kind),
                remedy="use one of the two",
            )
        low, high = (0.5, 1.0) if self.lipschitz is None else (0.0, inf)
        if self.kind == "threshold" and not (self.tau is not None and low < self.tau < high):
            raise PlanError(
                f"Threshold stage {self.name!r} needs tau",
                expected="1/2 < tau < 1, a share of the votes" if self.lipschitz is None else "tau > 0, a lead in logits",
                received=repr(self.tau),
                remedy="below that two outcomes could win at once",
            )
        if self.kind == "plurality" and self.tau is not None:
            raise PlanError(
                f"Plurality stage {self.name!r} takes no tau",
                expected="tau=None",
                received=repr(self.tau),
                remedy="use kind='threshold'",
            )
        if len(self.leads_to) < (3 if self.kind == "threshold" else 2):
            raise PlanError(
                f"Stage {self.name!r} needs a target per outcome",
                expected="two outcomes or more",
                received=f"{len(self.leads_to)} targets",
                remedy="list each outcome's class or stage (and where a threshold stage defers to)",
            )

    def _check_deterministic(self) -> None:
        k = self.num_outcomes - 1
        table = np.asarray(self.lipschitz if self.lipschitz is not None else np.nan, dtype=np.float64)
        apart = ~np.eye(k, dtype=bool) if table.ndim else np.ones((), bool)
        shaped = table.shape in ((), (k, k))
        if not (shaped and np.all(np.isfinite(table) & (table > 0) | ~apart) and np.all(table == table.T)):
            raise PlanError(
                f"Stage {self.name!r} has no usable Lipschitz constant",
                expected=f"a finite number above 0, or a symmetric ({k}, {k}) table of them",
                received=str(self.lipschitz)[:200],
                remedy="give the constant of the logits, or of each difference of two of them",
            )
        if self.sigma != 0 or not (isfinite(self.rounding) and self.rounding >= 0):
            raise PlanError(
                f"Stage {self.name!r} has a Lipschitz constant, and noise or an unusable rounding",
                expected="sigma 0 and a finite rounding of at least 0",
                received=f"sigma {self.sigma!r}, rounding {self.rounding!r}",
                remedy="a deterministic stage is one forward pass without noise",
            )
        if self.answers[self.num_outcomes - 1] != ABSTAIN:
            raise PlanError(
                f"The last outcome of deterministic stage {self.name!r} must be the invalid one",
                expected=f"target {ABSTAIN} for logits that are not finite",
                received=str(self.leads_to[self.num_outcomes - 1]),
                remedy="append ABSTAIN to the targets of the logits",
            )

    @cached_property
    def votes(self) -> bool:
        """Whether the stage casts votes under noise; otherwise it is one forward pass."""
        return self.lipschitz is None

    @cached_property
    def pairs(self) -> NDArray[np.float64]:
        """`(k, k)` Lipschitz constants of the differences of two logits of a deterministic stage, 1 on the diagonal."""
        k = self.num_outcomes - 1
        table = np.asarray(self.lipschitz, dtype=np.float64)
        constants = np.full((k, k), nextafter(sqrt(2.0) * float(table), inf)) if not table.ndim else table.copy()
        constants[np.arange(k), np.arange(k)] = 1.0
        return constants

    @cached_property
    def num_outcomes(self) -> int:
        """How many different votes the base model can cast (a threshold's deferral is not a vote)."""
        return len(self.leads_to) - (self.kind == "threshold")

    @cached_property
    def children(self) -> tuple[str, ...]:
        """Names of the stages this one can lead to, each once, in outcome order."""
        return tuple(dict.fromkeys(t for t in self.leads_to if isinstance(t, str)))

    @cached_property
    def answers(self) -> NDArray[np.int64]:
        """Per target: the class it answers, ABSTAIN, or STAGE_TARGET where it leads to another stage."""
        return np.array([STAGE_TARGET if isinstance(t, str) else int(t) for t in self.leads_to], dtype=np.int64)


@dataclass(frozen=True)
class Tree:
    """Stages and a root; every path from the root ends in an answer.

    Raises:
        PlanError: a name twice, an unknown target or root, a cycle, or an unreachable stage.
    """

    stages: Mapping[str, Stage]
    root: str

    @classmethod
    def of(cls, stages: Sequence[Stage], root: str | None = None) -> Tree:
        """A tree of `stages`, rooted at `root` (default: the first)."""
        names = [stage.name for stage in stages]
        if not names or len(set(names)) != len(names):
            raise PlanError(
                "A tree needs stages with different names",
                expected="unique names",
                received=str(names),
                remedy="rename the stages",
            )
        return cls({stage.name: stage for stage in stages}, names[0] if root is None else root)

    def __post_init__(self) -> None:
        misnamed = [key for key, stage in self.stages.items() if key != stage.name]
        if misnamed:
            raise PlanError(
                "A stage's key differs from its name",
                expected="the stage's name as key",
                received=str(misnamed),
                remedy="use Tree.of(stages)",
            )
        if self.root not in self.stages:
            raise PlanError(
                "The root is not a stage",
                expected=f"one of {sorted(self.stages)}",
                received=repr(self.root),
                remedy="name the stage that sees the input first",
            )
        unreachable = set(self.stages) - set(self.order)
        if unreachable:
            raise PlanError(
                "Some stages cannot be reached",
                expected="every stage below the root",
                received=str(sorted(unreachable)),
                remedy="drop them or let an outcome lead there",
            )

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Stage names, children before parents."""
        done: dict[str, bool] = {}

        def visit(name: str) -> None:
            if name not in self.stages:
                raise PlanError(
                    "An outcome leads to an unknown stage",
                    expected=f"one of {sorted(self.stages)}",
                    received=repr(name),
                    remedy="add the stage or lead elsewhere",
                )
            if name in done:
                if not done[name]:
                    raise PlanError(
                        "The stages form a cycle",
                        expected="a tree (or a graph without cycles)",
                        received=f"a way from {name!r} back to itself",
                        remedy="a stage may only lead to later stages",
                    )
                return
            done[name] = False
            for child in self.stages[name].children:
                visit(child)
            done[name] = True
            ordered.append(name)

        ordered: list[str] = []
        visit(self.root)
        return tuple(ordered)

    @cached_property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """The voting stages of every chain, which alpha is divided over; one empty path where no stage votes."""
        return tuple(dict.fromkeys(tuple(name for name in chain if self.stages[name].votes) for chain in self.chains))

    @cached_property
    def chains(self) -> tuple[tuple[str, ...], ...]:
        """Every maximal chain of stages from the root down (the longest that an input can walk).

        Raises:
            PlanError: more than `MOST_PATHS`; where every stage can lead to every later one, their number doubles with each.
        """
        ways: dict[str, int] = {}
        for name in self.order:
            ways[name] = sum(ways[child] for child in self.stages[name].children) or 1
        if ways[self.root] > MOST_PATHS:
            raise PlanError(
                "The stages have too many paths to divide alpha over",
                expected=f"at most {MOST_PATHS:,} chains from the root to a leaf",
                received=f"{ways[self.root]:,} over {len(self.stages)} stages",
                remedy="let fewer outcomes lead to stages that others lead to as well",
            )

        below: dict[str, list[tuple[str, ...]]] = {}
        for name in self.order:
            below[name] = [(name, *rest) for child in self.stages[name].children for rest in below[child]] or [(name,)]
        return tuple(dict.fromkeys(below[self.root]))

    @cached_property
    def networks(self) -> tuple[str, ...]:
        """Networks of the stages, each once, the root's first."""
        return tuple(dict.fromkeys(self.stages[name].network for name in reversed(self.order)))

    @cached_property
    def by_network(self) -> dict[str, tuple[Stage, ...]]:
        """The stages that each network's votes serve.

        Raises:
            PlanError: stages of one network at different sigmas.
        """
        stages = {g: tuple(self.stages[s] for s in self.order if self.stages[s].network == g) for g in self.networks}
        for network, members in stages.items():
            if len({stage.sigma for stage in members}) != 1:
                raise PlanError(
                    f"Stages on network {network!r} have different sigmas",
                    expected="one sigma per network",
                    received=str({stage.name: stage.sigma for stage in members}),
                    remedy="give them networks of their own",
                )
        return stages

    @cached_property
    def voting(self) -> tuple[str, ...]:
        """Networks that draw votes, each once."""
        return tuple(dict.fromkeys(self.stages[name].network for name in reversed(self.order) if self.stages[name].votes))

    @cached_property
    def passing(self) -> tuple[str, ...]:
        """Networks of deterministic stages, each once: one forward pass for an image."""
        return tuple(network for network in self.networks if network not in self.voting)

    @property
    def classes(self) -> tuple[int, ...]:
        """Every class some outcome answers."""
        found = {int(a) for stage in self.stages.values() for a in stage.answers if a >= 0}
        return tuple(sorted(found))


#: The number of an invalid vote's target: it answers nothing.
INVALID_TARGET: Target = ABSTAIN


def expert_stage(
    name: str,
    sigma: float,
    num_classes: int,
    *,
    network: str = "",
    expert: str | None = None,
    lipschitz: float | tuple[tuple[float, ...], ...] | None = None,
    rounding: float = 0.0,
) -> Stage:
    """A plurality stage over `num_classes` classes and one invalid outcome."""
    targets = (*range(num_classes), INVALID_TARGET)
    return Stage(name, sigma, "plurality", None, targets, None, network, expert or name, lipschitz, rounding)


def flat_tree(router: str, router_sigma: float, experts: Sequence[Stage | None], *, network: str = "", **constants: Any) -> Tree:
    """Dual RS: a router whose outcome k leads to expert k (arXiv 2512.01782); an outcome None answers nothing (ABSTAIN)."""
    targets: tuple[Target, ...] = (*(ABSTAIN if e is None else e.name for e in experts), INVALID_TARGET)
    stages = [e for e in experts if e is not None]
    return Tree.of([Stage(router, router_sigma, "plurality", None, targets, None, network, **constants), *stages])


def cascade_tree(experts: Sequence[Stage], thresholds: Sequence[float]) -> Tree:
    """Threshold stages in a row, then a plurality stage (Multiscale; Jeong and Shin 2023).

    Args:
        experts: plurality stages in the order in which they are asked.
        thresholds: one tau per expert but the last; where the last has one too, it defers to nobody (ABSTAIN).
    """
    if len(thresholds) not in (len(experts) - 1, len(experts)):
        raise PlanError(
            "A cascade needs a threshold for each expert but the last",
            expected=f"{len(experts) - 1} thresholds, or {len(experts)} where the last expert may defer to nobody",
            received=f"{len(thresholds)}",
            remedy="give one tau in (1/2, 1) per expert that may defer",
        )
    onward: list[Target] = [*(e.name for e in experts[1:]), ABSTAIN]
    stages = [
        replace(e, kind="threshold", tau=float(tau), leads_to=(*e.leads_to, target), reference=None)
        for e, target, tau in zip(experts, onward, thresholds, strict=False)
    ]
    return Tree.of([*stages, *experts[len(thresholds) :]])
