"""Certificates near the boundary, at alpha = 0.1, through the public API: no design fails more often than alpha."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from rsrouter import AdaptivePlan, FixedPlan, PlanError, Terms
from rsrouter.core import Plan
from tests.helpers.designs import DESIGNS, random_design

ALPHA = 0.1
GRID = (0.1, 0.2, 0.3, 0.34, 0.35, 0.36, 0.5)
PLANS: dict[str, Plan] = {
    "fixed": FixedPlan(30, 150),
    "linear": AdaptivePlan(400, GRID, n0=30, first=15),
    "many looks": AdaptivePlan(300, [0.0], n0=30, first=10, last_share=0.2, growth=1.15),
    "even": AdaptivePlan(400, GRID, n0=30, first=15, spending="even", last_share=0.3),
    "mixture": AdaptivePlan(250, GRID, n0=30, first=15, bound="mixture"),
}
#: A test fails by chance with this probability, all of its designs together.
LEVEL = 1e-4


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def excess(violations: int, count: int) -> float:
    """p-value of "fails more often than alpha"."""
    return float(binom.sf(violations - 1, count, ALPHA))


@pytest.mark.parametrize("design", ["flat", "shared network"])
def test_a_few_certificates(design: str) -> None:
    """The harness itself, in a second; the slow tests below have the power."""
    made = DESIGNS[design]()
    certificates = made.certify(Terms(PLANS["linear"], ALPHA, seed=5), 60)
    assert sum(c.predict >= 0 and c.radius > 0.1 for c in certificates) > 20
    assert excess(made.violations(certificates), 60) > LEVEL
    assert made.true_radius(0) == pytest.approx(0.35, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("rule", ["tree", "min"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design(design: str, plan: str, rule: str, sides: str) -> None:
    made, count = DESIGNS[design](), 1000
    certificates = made.certify(Terms(PLANS[plan], ALPHA, rule, sides, seed=11), count)
    tests = len(DESIGNS) * len(PLANS) * 4
    assert excess(made.violations(certificates), count) > LEVEL / tests
    if "tie" not in design:
        assert np.mean([c.predict >= 0 for c in certificates]) > 0.5  # a test of nothing would pass as well


@pytest.mark.slow
def test_random_topologies() -> None:
    rng, worst, done = np.random.default_rng(2), [], 0
    while done < 150:
        made, change = random_design(rng)
        plan = PLANS[str(rng.choice(list(PLANS)))]
        if isinstance(plan, AdaptivePlan):
            radii = [change * f for f in (0.5, 0.8, 0.97, 1.0, 1.03)]
            plan = AdaptivePlan(
                plan.n_max, radii, 30, first=plan.first, growth=plan.growth, last_share=plan.last_share, bound=plan.bound,
                spending=plan.spending,
            )  # fmt: skip
        rule, sides = str(rng.choice(["tree", "min"])), str(rng.choice(["one", "two"]))
        try:
            certificates = made.certify(Terms(plan, ALPHA, rule, sides, int(rng.integers(2**60))), 200)
        except PlanError as error:
            if "can certify radius" not in str(error):
                raise
            continue
        worst.append(excess(made.violations(certificates), 200))
        done += 1
    assert min(worst) > LEVEL / done
