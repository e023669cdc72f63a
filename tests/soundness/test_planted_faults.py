"""The harness sees planted faults: each is put into the package for one test, and fails more often than alpha in two designs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from rsrouter import AdaptivePlan, FixedPlan, Terms
from rsrouter.core import AlphaSplit, Plan, bounds, certify, plans
from rsrouter.router import base
from rsrouter.sampling import engine
from tests.helpers.designs import CHANGE, DESIGNS
from tests.soundness.test_near_boundary import ALPHA, PLANS

pytestmark = pytest.mark.slow
COUNT = 1500
#: A fault counts as seen where an honest package would fail the same test with probability below this.
SEEN = 1e-6


def p_value(design: str, plan: Plan, rule: str = "tree", sides: str = "one", count: int = COUNT) -> float:
    torch.set_num_threads(1)
    made, plan = DESIGNS[design](), plan.with_votes(plan.n_max)  # a plan keeps its bounds: a new one meets the fault
    violations = made.violations(made.certify(Terms(plan, ALPHA, rule, sides, seed=77), count))
    return float(binom.sf(violations - 1, count, ALPHA))


def selection_reused(patch: pytest.MonkeyPatch) -> None:
    """The votes that choose the class are the votes that bound it."""
    key = engine.stream_key
    patch.setattr(
        engine, "stream_key", lambda purpose, *rest: key("same" if purpose in ("select", "estimate") else purpose, *rest)
    )


def alpha_unsplit(patch: pytest.MonkeyPatch) -> None:
    """Every stage spends the whole alpha."""

    class Whole:
        def __init__(self, alpha: float, paths: Any) -> None:
            self.total, self.paths, self.lower_share = alpha, paths, 0.9
            self.stages = {name: alpha for path in paths for name in path}

    class Careless(AlphaSplit):
        even = staticmethod(Whole)

    patch.setattr(base, "AlphaSplit", Careless)
    patch.setattr(certify, "check_split", lambda tree, split: None)


def alpha_at_every_look(patch: pytest.MonkeyPatch) -> None:
    """Even spending that spends everything at each look."""
    patch.setattr(plans.AdaptivePlan, "shares", property(lambda plan: (1.0,) * len(plan.looks)))


def due_at_every_look(patch: pytest.MonkeyPatch) -> None:
    """Linear spending that forgets what earlier looks have spent."""

    def lower(self: Any, k: Any, n: Any, alpha: Any) -> Any:
        look, level, edge, _ = self._at(k, n, alpha)
        return np.maximum(edge, bounds.binom_lower(k, n, level * self.spent[look]))

    patch.setattr(bounds.LinearSpending, "lower", lower)


def radii_too_long(patch: pytest.MonkeyPatch) -> None:
    """Entry radii of plurality stages, a third too long."""
    honest = certify.entry_radii
    patch.setattr(
        certify, "entry_radii", lambda stage, *given: honest(stage, *given) * (4 / 3 if stage.kind == "plurality" else 1.0)
    )


def deferral_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Threshold stages are taken to never defer."""
    honest = certify.entry_radii

    def entry(stage: Any, *given: Any) -> Any:
        found = np.array(honest(stage, *given))
        if stage.kind == "threshold":
            found[:, -1] = np.inf
        return found

    patch.setattr(certify, "entry_radii", entry)


def unsampled_is_certain(patch: pytest.MonkeyPatch) -> None:
    """A stage that was not sampled counts as one that never leaves its class."""
    honest = certify.no_entries
    patch.setattr(certify, "no_entries", lambda stage, c: honest(stage, c) + np.inf)


def class_from_estimates(patch: pytest.MonkeyPatch) -> None:
    """Class and reference follow the estimation votes."""
    honest = certify.CertifyPolicy._tighten

    def tighten(self: Any, network: str, rows: Any) -> None:
        for stage in self._stages[network]:
            top = self._counts[stage.name][rows].argmax(1)
            self._reference[stage.name][rows] = top
            if stage.answers[0] >= 0:
                self.c[rows] = stage.answers[top]
        honest(self, network, rows)

    patch.setattr(certify.CertifyPolicy, "_tighten", tighten)


MANY = AdaptivePlan(800, [0.3], n0=30, first=10, growth=1.3, spending="even")
LINEAR = AdaptivePlan(1600, [CHANGE], n0=30, beta=1e-9, first=10, growth=1.05, last_share=0.02)
EQUAL = FixedPlan(1000, 1000)
#: As many votes to select as to bound at the first look: selection votes that are used again lean most.
ONE_LOOK = AdaptivePlan(600, [0.05], n0=600, first=600)
FAULTS: dict[Any, list[tuple[str, Plan, str, str]]] = {
    selection_reused: [
        ("tied", EQUAL, "tree", "one"),
        ("folded tie", EQUAL, "tree", "two"),
        ("tied", ONE_LOOK, "tree", "one"),
        ("folded tie", ONE_LOOK, "tree", "one"),
    ],
    alpha_unsplit: [
        ("flat", FixedPlan(100, 400), "tree", "two"),
        ("cascade", PLANS["fixed"], "tree", "one"),
        ("ladder of 4", PLANS["fixed"], "tree", "two"),
    ],
    alpha_at_every_look: [("tied", MANY, "tree", "one"), ("folded tie", MANY, "tree", "one")],
    due_at_every_look: [("expert", LINEAR, "tree", "one"), ("sharp expert", LINEAR, "tree", "one")],
    radii_too_long: [("flat", PLANS["linear"], "tree", "one"), ("nested", PLANS["linear"], "tree", "one")],
    deferral_forgotten: [("cascade", PLANS["linear"], "tree", "one"), ("shared network", PLANS["linear"], "tree", "one")],
    unsampled_is_certain: [("flat", PLANS["linear"], "min", "one"), ("nested", PLANS["linear"], "min", "one")],
    class_from_estimates: [("tied", EQUAL, "tree", "one"), ("folded tie", EQUAL, "tree", "one")],
}


CASES = [(fault, *case) for fault, cases in FAULTS.items() for case in cases]


@pytest.mark.parametrize(("fault", "design", "plan", "rule", "sides"), CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES])
def test_seen(monkeypatch: pytest.MonkeyPatch, fault: Any, design: str, plan: Plan, rule: str, sides: str) -> None:
    assert p_value(design, plan, rule, sides) > 1e-3  # the honest package passes
    with monkeypatch.context() as patch:
        fault(patch)
        assert p_value(design, plan, rule, sides) < SEEN
