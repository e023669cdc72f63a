"""Patience: every level is sound, fewer votes cost certified images, and both are what the policy does."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from rsrouter.core import AdaptivePlan, AlphaSplit, FixedPlan, PlanError, Stage, Tree, cascade_tree, expert_stage
from rsrouter.core.budget import expected_votes
from rsrouter.core.patience import LEVELS, Streams, check_patience, patience_costs, patience_of, run, wald_floor, with_patience

ONE = Tree.of([Stage("vote", 0.5, leads_to=(0, 1))])
SPLIT = AlphaSplit.even(0.001, ONE.paths)
PLAN = AdaptivePlan(10_000, [0.0, 0.25, 0.5, 0.75, 1.0])


def two(top: np.ndarray) -> dict[str, np.ndarray]:
    return {"vote": np.stack([top, 1.0 - top], axis=1)}


def test_less_patience_draws_fewer_votes_and_certifies_less() -> None:
    costs = patience_costs(ONE, PLAN, SPLIT, two(np.linspace(0.5, 1.0, 300)), sides="one")
    assert [cost.beta for cost in costs] == list(LEVELS)
    for patient, impatient in pairwise(costs):
        assert impatient.votes < patient.votes
        assert impatient.floor is not None
        assert impatient.floor < patient.floor
        assert impatient.kept <= patient.kept
    assert costs[0].lost <= 0.02 < costs[-1].lost
    assert all(cost.share == cost.votes / 10_100 for cost in costs)


def test_votes_are_those_of_the_other_simulation() -> None:
    plan = AdaptivePlan(5_000, [0.0, 0.5], beta=0.2)
    (cost,) = patience_costs(ONE, plan, SPLIT, two(np.full(2000, 0.87)), levels=(0.2,), sides="one")
    expected = expected_votes(plan, 0.87, 0.5, runs=2000, seed=5)[0]
    assert abs(cost.votes - plan.n0 - expected) < 4 * plan.n_max / 2 / np.sqrt(1000)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_no_level_certifies_too_often(beta: float) -> None:
    """At a share whose true radius is .5, a certificate of .5 is wrong; it may happen with probability alpha at most."""
    alpha, count = 0.05, 2000
    shares = two(np.full(count, stats.norm.cdf(1.0) - 1e-9))  # radius .5 at sigma .5, all but
    split, plan = AlphaSplit.even(alpha, ONE.paths), AdaptivePlan(1000, [0.5], beta=beta)
    policy = run(Streams(ONE, plan, shares, {}, seed=1), plan, split, count, "tree", "one")
    wrong = int((policy.radius >= 0.5).sum())
    assert stats.binomtest(wrong, count, alpha, alternative="greater").pvalue > 1e-3


def test_the_loss_is_in_accuracy_where_there_are_labels() -> None:
    shares = two(np.linspace(0.5, 1.0, 200))
    every = patience_costs(ONE, PLAN, SPLIT, shares, levels=(0.5,))[0]
    none = patience_costs(ONE, PLAN, SPLIT, shares, levels=(0.5,), labels=np.full(200, 7))[0]
    assert every.lost > 0
    assert none.lost == 0.0
    assert none.votes == every.votes


def test_a_chain_and_a_stage_that_casts_no_votes() -> None:
    chain = cascade_tree([expert_stage("b", 1.0, 2), expert_stage("a", 0.5, 2)], (0.6,))
    split = AlphaSplit.even(0.001, chain.paths)
    p = np.linspace(0.4, 0.99, 40)
    shares = {s: np.stack([p, 1 - p, 0 * p], 1) for s in ("a", "b")}
    costs = patience_costs(chain, AdaptivePlan(2000, [0.25, 0.5]), split, shares, levels=(0.01, 0.5))
    assert costs[1].votes < costs[0].votes
    assert costs[0].floor is None
    gate = Tree.of([Stage("gate", 0.0, "threshold", 1.0, (0, 1, -1, "a"), lipschitz=1.0), expert_stage("a", 0.5, 2)], "gate")
    split = AlphaSplit.even(0.001, gate.paths)
    logits = {"gate": np.stack([8 * p - 4, 0 * p], 1)}
    found = patience_costs(gate, AdaptivePlan(2000, [0.25, 0.5]), split, {"a": shares["a"]}, levels=(0.1,), logits=logits)
    assert 0 < found[0].votes < 2100
    with pytest.raises(PlanError, match="do not fit the tree"):
        patience_costs(gate, AdaptivePlan(2000, [0.25, 0.5]), split, {"a": shares["a"]}, levels=(0.1,))


@pytest.mark.parametrize("beta", [0.0, 0.0099, 0.51, 1.0, -0.1, float("nan"), "0.1", True, None])
def test_levels_out_of_range(beta: object) -> None:
    with pytest.raises(PlanError, match="patience is out of range"):
        check_patience(beta)
    with pytest.raises(PlanError, match="patience is out of range"):
        patience_of(0.5, 1000, levels=(0.1, beta))  # type: ignore[arg-type]


def test_a_fixed_plan_has_no_patience() -> None:
    with pytest.raises(PlanError, match="Only an adaptive plan"):
        with_patience(FixedPlan(10, 100), 0.1)
    assert with_patience(PLAN, 0.01) == PLAN


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {"vote": [[0.5, 0.6]]},
        {"vote": [[1.5, -0.5]]},
        {"vote": [[0.5, 0.3, 0.2]]},
        {"vote": [[float("nan"), 0.5]]},
        {"vote": np.zeros((0, 2))},
    ],
)
def test_shares_that_are_none(shares: dict[str, object]) -> None:
    with pytest.raises(PlanError):
        patience_costs(ONE, PLAN, SPLIT, shares)  # type: ignore[arg-type]


def test_walds_floor_is_below_a_test_that_must_decide() -> None:
    """The sequential probability ratio test of the two simple hypotheses draws about its bound, and never less on average."""
    share, edge, alpha, beta = 0.9, 0.8, 0.001, 0.01
    floor = wald_floor([share], [edge], 10**6, alpha, beta)[0]
    rng = np.random.default_rng(0)
    up, down = np.log(share / edge), np.log((1 - share) / (1 - edge))
    steps = np.where(rng.random((4000, 2000)) < share, up, down).cumsum(1)
    out = (steps >= np.log((1 - beta) / alpha)) | (steps <= np.log(beta / (1 - alpha)))
    assert out.any(1).all()
    drawn = out.argmax(1) + 1
    assert floor <= drawn.mean() + 4 * drawn.std() / np.sqrt(len(drawn))
    assert drawn.mean() < 1.3 * floor
