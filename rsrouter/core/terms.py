"""The terms of a certificate: one record, passed whole from the caller to the table and back to the audit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsrouter.core.bounds import check_alpha
from rsrouter.core.errors import PlanError
from rsrouter.core.estimates import check_sides
from rsrouter.core.plans import Plan, plan_from_dict
from rsrouter.core.types import RULES

#: Seeds are whole numbers below this.
SEEDS = 2**63


@dataclass(frozen=True)
class Terms:
    """What `certify` takes besides images, what a table's JSON stores, and what an audit reads back.

    >>> from rsrouter.core import AdaptivePlan, Terms
    >>> terms = Terms(AdaptivePlan(10_000, [0.0, 0.25, 0.5]), alpha=0.001)
    >>> Terms.from_dict(terms.to_dict()) == terms
    True

    Attributes:
        plan: how many votes, when to stop, and the bound that is valid for that rule.
        alpha: failure probability of each certificate.
        rule: `"tree"` draws from every stage that can still raise the radius; `"min"` only from the router and the expert
            it picks, R = min(R_router, R_expert) (Dual RS, arXiv 2512.01782, section 3). The same for a single expert.
        sides: `"one"` bounds every rival by `1 - p_a_lower` (Cohen et al. 2019); `"two"` also by its own votes; None: one
            for a single expert and two for a routed classifier.
        seed: keys the noise; None derives it from the classifier's digest (`Routed.default_seed`).

    Raises:
        PlanError: a plan, alpha, rule, side or seed that cannot be.
    """

    plan: Plan
    alpha: float = 1e-3
    rule: str = "tree"
    sides: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.plan, Plan):
            raise PlanError(
                "Certifying needs a plan",
                expected="rsrouter.FixedPlan or rsrouter.AdaptivePlan",
                received=repr(self.plan),
                remedy="Terms(rsrouter.FixedPlan(n0=100, n=100_000))",
            )
        object.__setattr__(self, "alpha", float(check_alpha(self.alpha)))
        if self.rule not in RULES:
            raise PlanError("Unknown rule", expected=f"one of {RULES}", received=repr(self.rule), remedy="use rule='tree'")
        if self.sides is not None:
            check_sides(self.sides)
        if self.seed is not None:
            whole = isinstance(self.seed, int | np.integer) and not isinstance(self.seed, bool)
            if not whole or not 0 <= self.seed < SEEDS:
                raise PlanError(
                    "The seed is not usable",
                    expected=f"a whole number from 0 to {SEEDS - 1}, or None",
                    received=repr(self.seed),
                    remedy="leave it out: it is then derived from the classifier",
                )
            object.__setattr__(self, "seed", int(self.seed))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description; `from_dict` reads it back."""
        return {"plan": self.plan.to_dict(), "alpha": self.alpha, "rule": self.rule, "sides": self.sides, "seed": self.seed}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Terms:
        """The terms that `to_dict` described.

        Raises:
            PlanError: a field that is missing, unknown or out of range.
        """
        fields = {"plan", "alpha", "rule", "sides", "seed"}
        if not isinstance(content, Mapping) or set(content) != fields or not isinstance(content["plan"], Mapping):
            raise PlanError(
                "Stored terms cannot be read",
                expected=f"an object with {sorted(fields)}",
                received=str(sorted(content)) if isinstance(content, Mapping) else type(content).__name__,
                remedy="certify again with this version of rsrouter",
            )
        return cls(**{**content, "plan": plan_from_dict(dict(content["plan"]))})


__all__ = ["SEEDS", "Terms"]
