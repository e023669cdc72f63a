"""Plans: exact crossing probability of the looks, grids, refusals, round trips."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rsrouter.core import (
    AdaptivePlan,
    AlphaSplit,
    FixedPlan,
    PlanError,
    Stage,
    Tree,
    binom_lower,
    cascade_tree,
    expert_stage,
    flat_tree,
    plan_from_dict,
)
from rsrouter.core.estimates import FAMILIES

ONE = Tree.of([Stage("e", 0.5, leads_to=(0, 1))])


def crossing(plan: AdaptivePlan, proportions, alpha: float) -> list[float]:
    """P(the lower bound exceeds p at some look) per p, exactly: the count's law, stopped at the first crossing."""
    lower_of, _ = FAMILIES[plan.bound]
    lower = [lower_of(np.arange(look + 1), look, alpha * share) for look, share in zip(plan.looks, plan.shares, strict=True)]
    found = []
    for p in proportions:
        law, drawn, crossed = np.ones(1), 0, 0.0
        for look, bound in zip(plan.looks, lower, strict=True):
            law = np.convolve(law, stats.binom.pmf(np.arange(look - drawn + 1), look - drawn, p))
            drawn = look
            crossed += law[bound > p].sum()
            law = np.where(bound > p, 0.0, law)
        found.append(float(crossed))
    return found


@pytest.mark.parametrize(
    "plan",
    [
        AdaptivePlan(1600, [0.5]),
        AdaptivePlan(900, [0.5], growth=1.3, first=20, last_share=0.5),
        AdaptivePlan(1600, [0.5], bound="mixture"),
        AdaptivePlan(50, [0.5]),
    ],
    ids=["default", "many looks", "mixture", "one look"],
)
def test_looks_cross_at_most_alpha(plan: AdaptivePlan):
    alpha = 0.05
    assert plan.bound == "mixture" or sum(plan.shares) == pytest.approx(1.0)
    assert plan.looks[-1] == plan.n_max
    assert np.all(np.diff(plan.looks) > 0)
    # the worst proportions lie just below a value that some look's bound takes
    lower_of, _ = FAMILIES[plan.bound]
    counts = np.arange(plan.n_max // 2, plan.n_max + 1, plan.n_max // 10)
    worst = np.nextafter(lower_of(counts, plan.n_max, alpha * plan.shares[-1]), 0)
    crossed = crossing(plan, [*worst, 0.5, 0.7, 0.9, 0.99], alpha)
    assert max(crossed) <= alpha
    assert max(crossed) > 0.1 * alpha


@pytest.mark.slow
def test_looks_cross_at_most_alpha_at_5000():
    alpha = 1e-3
    for plan in (AdaptivePlan(5000, [0.5]), AdaptivePlan(5000, [0.5], growth=1.2, last_share=0.5)):
        last = binom_lower(np.arange(2500, 5001, 50), 5000, alpha * plan.shares[-1])
        crossed = max(crossing(plan, np.nextafter(last, 0), alpha))
        print(f"\n{len(plan.looks)} looks up to 5,000: crossing probability at most {crossed / alpha:.4f} alpha")
        assert crossed <= alpha


def test_planted_mistake_full_alpha_at_every_look_crosses_too_often():
    class Peeked(AdaptivePlan):
        @property
        def shares(self):
            return (1.0,) * len(self.looks)

    assert crossing(Peeked(1600, [0.5]), [0.8], 0.05)[0] > 0.05 * 1.5


def test_unreachable_radii_are_refused_with_the_votes_that_would_do():
    split = AlphaSplit.even(1e-3, ONE.paths)
    with pytest.raises(PlanError, match="n_max = ") as caught:
        AdaptivePlan(1000, [0.5, 1.5], last_share=0.9).check(ONE, split, "one")
    assert "keep the radii that fit: 0.5" in caught.value.remedy
    assert "1.5" not in caught.value.remedy.split("fit:")[1]
    need = int(caught.value.remedy.split("n_max = ")[1].split()[0])
    AdaptivePlan(need, [0.5, 1.5], last_share=0.9).check(ONE, split, "one")
    with pytest.raises(PlanError):
        AdaptivePlan(int(need * 0.99), [0.5, 1.5], last_share=0.9).check(ONE, split, "one")
    with pytest.raises(PlanError, match="or drop the radius"):
        AdaptivePlan(1000, [1.5]).check(ONE, split, "one")
    FixedPlan(100, 10).check(ONE, split)
    AdaptivePlan(1000, [0.5, 1.5]).within(1.2).check(ONE, split, "one")


def test_reach_is_what_unanimous_votes_give():
    split = AlphaSplit.even(1e-3, ONE.paths)
    expected = 0.5 * stats.norm.ppf(1e-3 ** (1 / 10_000))
    assert FixedPlan(100, 10_000).reach(ONE, split, "one") == pytest.approx(expected, rel=1e-9)
    experts = [expert_stage(name, sigma, 10) for name, sigma in (("a", 0.25), ("b", 1.0))]
    tree = flat_tree("r", 1.0, experts)
    half = stats.norm.ppf((5e-4 * 0.9) ** (1 / 10_000))
    assert FixedPlan(100, 10_000).reach(tree, AlphaSplit.even(1e-3, tree.paths)) == pytest.approx(half, rel=0.02)
    row = cascade_tree(experts[::-1], (0.55,))
    assert FixedPlan(100, 10_000).reach(row, AlphaSplit.even(1e-3, row.paths)) > 2.0


@pytest.mark.parametrize(
    "plan",
    [
        FixedPlan(50, 1000),
        AdaptivePlan(1000, [0.0]),
        AdaptivePlan(1000, [0.5, 0.25, 0.5], 10, 0.05, growth=1.5, first=20, last_share=0.7),
        AdaptivePlan(1000, [0.25], bound="mixture"),
    ],
)
def test_plans_survive_json(plan):
    import json

    again = plan_from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert (again.looks, again.shares, again.radii) == (plan.looks, plan.shares, plan.radii)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedPlan(0, 10),
        lambda: FixedPlan(10, 0),
        lambda: FixedPlan(10, 1.5),
        lambda: FixedPlan(True, 10),
        lambda: AdaptivePlan(100, []),
        lambda: AdaptivePlan(100, [np.nan]),
        lambda: AdaptivePlan(100, [-1.0]),
        lambda: AdaptivePlan(100, [0.5], beta=0.0),
        lambda: AdaptivePlan(100, [0.5], growth=1.0),
        lambda: AdaptivePlan(100, [0.5], last_share=1.0),
        lambda: AdaptivePlan(100, [0.5], beta=np.nan),
        lambda: AdaptivePlan(100, [0.5], bound="hoeffding"),
        lambda: plan_from_dict({"kind": "other"}),
        lambda: plan_from_dict({"kind": "fixed", "m": 3}),
    ],
)
def test_bad_plans_are_refused(make):
    with pytest.raises(PlanError):
        make()


def test_cells_of_the_grid():
    plan = AdaptivePlan(1000, [0.5, 0.25])
    np.testing.assert_array_equal(plan.cell(np.array([0.0, 0.1, 0.25, 0.3, 0.5, 9.0])), [0, 1, 2, 2, 3, 3])
