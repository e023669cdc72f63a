"""The certified threshold cascade: experts asked from large sigma to small, nothing trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from rsrouter.core.errors import InputError
from rsrouter.core.tree import cascade_tree
from rsrouter.experts.base import ExpertPool
from rsrouter.router.base import Routed, Router, stage_of, vote_model


class CascadeRouter(Router):
    """Each expert answers where one class reaches its threshold, and defers otherwise; the last one answers always.

    Multiscale (Jeong and Shin 2023) with the tree certificate: deferring towards an expert that gives the same
    answer costs nothing. Usable with nothing trained.

    Args:
        thresholds: one tau in (1/2, 1) per expert but the last.
        experts: names in the order in which they are asked; None: largest sigma first.
    """

    kind: ClassVar[str] = "cascade"

    def __init__(self, thresholds: Sequence[float], experts: Sequence[str] | None = None) -> None:
        values = tuple(float(t) for t in thresholds)
        if not all(0.5 < t < 1.0 for t in values):
            raise InputError("A cascade's thresholds are out of range", expected="each in (1/2, 1)", received=str(values),
                             remedy="0.55 is a reasonable start; tune on validation images")
        self.thresholds = values
        self.experts = None if experts is None else tuple(experts)

    def order(self, pool: ExpertPool) -> tuple[str, ...]:
        """Names of the experts in the order in which they are asked."""
        names = tuple(reversed(pool.names)) if self.experts is None else self.experts
        unknown = [n for n in names if n not in pool.names]
        if unknown or len(set(names)) != len(names):
            raise InputError("The cascade's experts do not fit the pool", expected=f"different names out of {list(pool.names)}",
                             received=str(list(names)), remedy="pass experts= in the order in which they are asked")
        if len(names) != len(self.thresholds) + 1:
            raise InputError("A cascade needs a threshold for each expert but the last", expected=f"{len(names) - 1} thresholds",
                             received=f"{len(self.thresholds)}", remedy="give one tau per expert that may defer")
        return names

    def bind(self, pool: ExpertPool) -> Routed:
        names = self.order(pool)
        return Routed(cascade_tree([stage_of(pool[n]) for n in names], self.thresholds), tuple(vote_model(pool[n]) for n in names))

    def to_config(self) -> dict[str, Any]:
        return {"kind": self.kind, "thresholds": list(self.thresholds), "experts": None if self.experts is None else list(self.experts)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CascadeRouter:
        """The router `to_config` described."""
        return cls(config["thresholds"], config["experts"])
