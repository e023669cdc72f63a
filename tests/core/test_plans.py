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
    expected_votes,
    expert_stage,
    flat_tree,
    plan_from_dict,
)
from rsrouter.core.bounds import LinearSpending

ONE = Tree.of([Stage("e", 0.5, leads_to=(0, 1))])


def crossing(plan: AdaptivePlan, proportions, alpha: float, side: str = "lower") -> list[float]:
    """P(the bound is on the wrong side of p at some look) per p, exactly: the count's law, stopped at the first crossing."""
    sign = 1.0 if side == "lower" else -1.0
    of = plan.bounders[side == "upper"]
    bounds = [of(np.arange(look + 1), look, alpha * share) for look, share in zip(plan.looks, plan.shares, strict=True)]
    found = []
    for p in proportions:
        law, drawn, crossed = np.ones(1), 0, 0.0
        for look, bound in zip(plan.looks, bounds, strict=True):
            law = np.convolve(law, stats.binom.pmf(np.arange(look - drawn + 1), look - drawn, p))
            drawn = look
            wrong = sign * bound > sign * p
            crossed += law[wrong].sum()
            law = np.where(wrong, 0.0, law)
        found.append(float(crossed))
    return found


def worst_proportions(plan: AdaptivePlan, alpha: float, each: int) -> np.ndarray:
    """Proportions just below values that some look's bound takes: where it fails most often."""
    lower_of, _ = plan.bounders
    found = []
    for look, share in zip(plan.looks, plan.shares, strict=True):
        counts = np.unique(np.linspace(look // 2, look, each).astype(int))
        found.append(lower_of(counts, look, alpha * share))
    values = np.unique(np.concatenate(found))
    return np.nextafter(values[values > 0.3], 0)


EVERY_WAY = [
    AdaptivePlan(1600, [0.5]),
    AdaptivePlan(900, [0.5], growth=1.1, first=20, last_share=0.1),
    AdaptivePlan(1600, [0.5], spending="even"),
    AdaptivePlan(900, [0.5], growth=1.3, first=20, last_share=0.5, spending="even"),
    AdaptivePlan(1600, [0.5], bound="mixture"),
    AdaptivePlan(50, [0.5]),
]


@pytest.mark.parametrize(
    "plan", EVERY_WAY, ids=["default", "linear, many looks", "even", "even, many looks", "mixture", "one look"]
)
def test_looks_cross_at_most_alpha(plan: AdaptivePlan):
    alpha = 0.05
    assert plan.looks[-1] == plan.n_max
    assert np.all(np.diff(plan.looks) > 0)
    crossed = crossing(plan, [*worst_proportions(plan, alpha, 6), 0.5, 0.7, 0.9, 0.99], alpha)
    assert max(crossed) <= alpha
    assert max(crossed) > (0.1 if plan.bound == "mixture" else 0.3) * alpha
    mirrored = crossing(plan, np.nextafter(1.0 - worst_proportions(plan, alpha, 3), 1.0), alpha, "upper")
    assert 0.1 * alpha < max(mirrored) <= alpha


@pytest.mark.slow
def test_looks_cross_at_most_alpha_at_5000():
    alpha = 1e-3
    for plan in (
        AdaptivePlan(5000, [0.5]),
        AdaptivePlan(5000, [0.5], growth=1.1, last_share=0.3),
        AdaptivePlan(5000, [0.5], growth=1.2, last_share=0.5, spending="even"),
    ):
        crossed = max(crossing(plan, worst_proportions(plan, alpha, 12), alpha))
        print(f"\n{len(plan.looks)} looks up to 5,000: crossing probability at most {crossed / alpha:.4f} alpha")
        assert crossed <= alpha


def test_planted_mistake_full_alpha_at_every_look_crosses_too_often():
    class Peeked(AdaptivePlan):
        @property
        def shares(self):
            return (1.0,) * len(self.looks)

    assert crossing(Peeked(1600, [0.5], spending="even"), [0.8], 0.05)[0] > 0.05 * 1.5


def test_planted_mistake_spending_what_was_due_at_every_look_crosses_too_often():
    plan = AdaptivePlan(1600, [0.5], growth=1.1, last_share=0.1)
    spending = LinearSpending(plan.looks, plan.last_share)
    spending.added = spending.spent  # every look takes all that is due by then, whatever earlier looks took
    plan.__dict__["bounders"] = (spending.lower, spending.upper)
    assert max(crossing(plan, [0.8, 0.9], 0.05)) > 0.05 * 1.5


@pytest.mark.parametrize("level", [1e-3, 0.05])
def test_bounds_of_linear_spending(level: float):
    spending = LinearSpending((20, 50, 100, 160), 0.4)
    assert spending.spent[-1] == 1.0
    np.testing.assert_allclose(spending.added.cumsum(), spending.spent)
    for n in spending.looks:
        counts = np.arange(n + 1)
        low, high = spending.lower(counts, n, level), spending.upper(counts, n, level)
        assert np.all(np.diff(low) >= 0)  # the shared bound of rivals needs it
        assert np.all(low <= counts / n)
        np.testing.assert_allclose(high, 1.0 - low[::-1], atol=1e-9)
        # never better than the whole level at one look, and not far from it
        whole = binom_lower(counts, n, level)
        assert np.all(low <= whole)
        assert np.all(whole - low < 0.2)
    # what no earlier look could reject is left to the last one with the whole level
    assert spending.lower(160, 160, level) == pytest.approx(level ** (1 / 160), rel=1e-9)
    # different looks and levels in one call
    both = spending.lower([20, 90], [20, 100], [level, level / 2])
    np.testing.assert_array_equal(both, [spending.lower(20, 20, level), spending.lower(90, 100, level / 2)])
    with pytest.raises(PlanError, match="completed looks"):
        spending.lower(10, 30, level)
    with pytest.raises(PlanError, match="whole numbers"):
        spending.upper(10, np.nan, level)


def test_linear_spending_draws_fewer_votes_of_images_that_are_nearly_unanimous():
    radii = np.arange(0, 1.8, 0.25)
    linear, even = AdaptivePlan(100_000, radii), AdaptivePlan(100_000, radii, spending="even")
    share = [0.75, 0.95, 0.99999]
    ours, before = (expected_votes(plan, share, 0.5, runs=200) for plan in (linear, even))
    assert ours[2] < 0.8 * before[2]
    assert ours.sum() < 0.85 * before.sum()
    split = AlphaSplit.even(1e-3, ONE.paths)
    assert linear.reach(ONE, split, "one") == FixedPlan(100, 100_000).reach(ONE, split, "one") > even.reach(ONE, split, "one")


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
        AdaptivePlan(1000, [0.25], spending="even"),
    ],
)
def test_plans_survive_json(plan):
    import json
    import pickle

    again = plan_from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan == pickle.loads(pickle.dumps(plan))
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
        lambda: AdaptivePlan(100, [0.5], spending="all at once"),
        lambda: AdaptivePlan(100, [0.5], spending=["linear"]),
        lambda: AdaptivePlan(100, [0.5], bound="mixture", spending="linear"),
        lambda: AdaptivePlan(100, [0.5], last_share="most"),
        lambda: AdaptivePlan(100, [0.5], growth=True),
        lambda: AdaptivePlan(10**13, [0.5]),
        lambda: FixedPlan(100, 10**13),
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
