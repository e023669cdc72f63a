"""The certified threshold cascade: experts asked one after the other, nothing trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from rsrouter.experts.pool import ExpertPool
from rsrouter.router.base import Routed, Router
from rsrouter.router.chain import Voter, bind_chain, check_thresholds


class CascadeRouter(Router):
    """Each expert answers where one class reaches its threshold, and defers otherwise; the last one answers always.

    Multiscale (Jeong and Shin 2023) with the tree certificate: deferring towards an expert that gives the same
    answer costs nothing. Usable with nothing trained.

    An expert of small sigma can stand *before* one of large sigma at little cost in radius: where it is asked to be
    nearly sure (tau near 1), no wrong class reaches tau within sigma * (Phi^-1(tau) - Phi^-1(hi_wrong)), about
    sigma * 5 at 10,000 votes and tau = 0.95, and deferring to an expert that agrees is harmless.

    Args:
        thresholds: one tau in (1/2, 1) per expert but the last; for a deterministic expert the lead above 0, in logits,
            that its largest logit must have over every other one. Where the last expert has one too, it defers to nobody: nothing
            is certified there, and the pool's core answers, if it has one.
        experts: names in the order in which they are asked; None: largest sigma first. A name may come again
            later (not at once): the expert's votes are then drawn once and read twice.

    Raises:
        InputError: a threshold outside (1/2, 1); where it is bound to a pool: names or a number of thresholds that
            do not fit.
    """

    kind: ClassVar[str] = "cascade"

    def __init__(self, thresholds: Sequence[float], experts: Sequence[str] | None = None) -> None:
        self.thresholds = check_thresholds(thresholds, lead=True)
        self.experts = None if experts is None else tuple(experts)

    def order(self, pool: ExpertPool) -> tuple[str, ...]:
        """Names of the experts in the order in which they are asked."""
        return tuple(reversed(pool.names)) if self.experts is None else self.experts

    def bind(self, pool: ExpertPool) -> Routed:
        return bind_chain(pool, [Voter(name) for name in self.order(pool)], self.thresholds)

    def to_config(self) -> dict[str, Any]:
        experts = None if self.experts is None else list(self.experts)
        return {"kind": self.kind, "thresholds": list(self.thresholds), "experts": experts}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CascadeRouter:
        """The router `to_config` described."""
        return cls(config["thresholds"], config["experts"])
