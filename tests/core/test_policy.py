"""CertifyPolicy with scripted votes: Cohen's CERTIFY, completed looks only, nothing read twice."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from rsrouter.core import (
    ABSTAIN,
    AdaptivePlan,
    AlphaSplit,
    CertifyPolicy,
    FixedPlan,
    PlanError,
    Stage,
    Tree,
    VoteRequest,
    cascade_tree,
    expert_stage,
    flat_tree,
)

ALPHA = 1e-3


def drive(tree, plan, shares, images, seed, *, rule="tree", sides="two", window=None):
    """Runs a policy on multinomial votes; `shares[stage]` is `(images, L)`. Returns it and the votes it took."""
    rng = np.random.default_rng(seed)
    policy = CertifyPolicy(tree, plan, AlphaSplit.even(ALPHA, tree.paths), images, rule=rule, sides=sides)
    log = []
    while not policy.done.all():
        live = np.flatnonzero(~policy.done).tolist()[:window]
        requests = policy.next_requests(live)
        assert requests, "an unfinished image must ask for votes"
        answers = [
            {s: rng.multinomial(r.count, shares[s][r.image]) for s in tree.order if tree.stages[s].network == r.network}
            for r in requests
        ]
        log.extend(zip(requests, answers, strict=True))
        policy.update(requests, answers)
    return policy, log


def spread(rng, images, width, strength=2.0):
    p = rng.dirichlet(np.full(width, 0.4), images)
    p[:, 0] += rng.exponential(strength, images)
    return p / p.sum(1, keepdims=True)


def test_fixed_plan_is_cohens_certify():
    tree = Tree.of([expert_stage("e", 0.5, 10)])
    shares = {"e": spread(np.random.default_rng(0), 300, 11)}
    policy, log = drive(tree, FixedPlan(100, 2000), shares, 300, 1, sides="one")
    votes = {(r.image, r.purpose): a["e"] for r, a in log}
    abstained = 0
    for i in range(300):
        top = int(votes[i, "select"].argmax())
        if top == 10:
            assert policy.certificate(i).predict == ABSTAIN
            continue
        p_a_lower = proportion_confint(votes[i, "estimate"][top], 2000, alpha=2 * ALPHA, method="beta")[0]
        found = policy.certificate(i)
        if p_a_lower < 0.5:
            abstained += 1
            assert (found.predict, found.radius) == (ABSTAIN, 0.0)
        else:
            assert found.predict == top
            assert found.radius == pytest.approx(0.5 * stats.norm.ppf(p_a_lower), rel=1e-9)
            assert found.radius <= 0.5 * stats.norm.ppf(p_a_lower)
        assert (found.n_drawn, found.expert, found.bound_by) == (2100, "e", "e")
        assert found.counts == {"e": tuple(votes[i, "estimate"].tolist())}
        assert found.selection == {"e": tuple(votes[i, "select"].tolist())}
    assert abstained > 10


def linear_lower(plan: AdaptivePlan, top: int, total: int) -> float:
    """The largest proportion that is rejected after `top` of `total` votes, by bisection on what `LinearSpending` promises."""
    due = {n: (1 - plan.last_share) * n / plan.n_max for n in plan.looks[:-1]} | {plan.n_max: 1.0}

    def rejected(p: float) -> bool:
        first = next((n for n in plan.looks[:-1] if p**n <= ALPHA * due[n]), plan.n_max)
        earlier = [n for n in plan.looks if n < total]
        share = 0.0 if total < first else due[total] - (due[earlier[-1]] if earlier and total > first else 0.0)
        return stats.binom.sf(top - 1, total, p) <= ALPHA * share

    low, high = 0.0, top / total
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


@pytest.mark.parametrize("how", [{}, {"spending": "even"}, {"bound": "mixture"}], ids=["linear", "even", "mixture"])
def test_adaptive_radius_is_what_the_completed_looks_allow(how):
    """Recomputed from the log with an independent bound: no hope, no unfinished look gets into a radius."""
    tree = Tree.of([Stage("e", 1.0, leads_to=(0, 1))])
    plan = AdaptivePlan(4000, [0.25, 0.5, 1.0, 2.0], **how)
    shares = {"e": np.column_stack([p := np.linspace(0.4, 1.0, 200), 1 - p])}
    policy, log = drive(tree, plan, shares, 200, 2, sides="one")
    looks = dict(zip(plan.looks, plan.shares, strict=True))
    stopped_early = 0
    for i in range(200):
        top, total, best = 0, 0, 0.0
        c = next(int(a["e"].argmax()) for r, a in log if r.image == i and r.purpose == "select")
        for request, answer in log:
            if request.image == i and request.purpose == "estimate":
                assert request.start == total
                top, total = top + answer["e"][c], total + request.count
                if how:
                    best = max(best, proportion_confint(top, total, alpha=2 * ALPHA * looks[total], method="beta")[0])
                else:
                    best = max(best, linear_lower(plan, top, total))
        found = policy.certificate(i)
        allowed = max(0.0, stats.norm.ppf(best))
        assert found.radius <= allowed + 1e-12
        if "bound" not in how:
            assert found.radius == pytest.approx(allowed, rel=1e-9, abs=1e-9)
        assert found.n_drawn == total + 100
        stopped_early += total < 4000
    assert stopped_early > 50


def test_adaptive_and_fixed_plans_mostly_agree_on_the_grid():
    experts = [expert_stage(f"e{k}", s, 5) for k, s in enumerate((0.25, 0.5, 1.0))]
    tree, rng = flat_tree("r", 1.0, experts), np.random.default_rng(3)
    shares = {e.name: spread(rng, 200, 6) for e in experts} | {"r": spread(rng, 200, 4, 0.5)}
    grid = [0.0, 0.25, 0.5, 0.75, 1.0]
    adaptive, _ = drive(tree, AdaptivePlan(10_000, grid), shares, 200, 4)
    fixed, _ = drive(tree, FixedPlan(100, 10_000), shares, 200, 4)
    cells = AdaptivePlan(10_000, grid).cell
    assert np.mean(cells(adaptive.radius) >= cells(fixed.radius)) > 0.9
    drawn = [sum(p.drawn(i) for i in range(200)) for p in (adaptive, fixed)]
    assert drawn[0] < 0.5 * drawn[1]


@pytest.mark.parametrize("sides", ["one", "two"])
def test_tree_rule_is_never_below_the_min_rule_on_the_same_votes(sides):
    experts = [expert_stage(f"e{k}", s, 3) for k, s in enumerate((0.5, 1.0))]
    tree, rng = flat_tree("r", 1.0, experts), np.random.default_rng(5)
    shares = {e.name: spread(rng, 100, 4) for e in experts} | {"r": spread(rng, 100, 3, 0.5)}
    streams = {}

    def run(rule):
        policy = CertifyPolicy(tree, FixedPlan(50, 500), AlphaSplit.even(ALPHA, tree.paths), 100, rule=rule, sides=sides)
        while not policy.done.all():
            requests = policy.next_requests(np.flatnonzero(~policy.done).tolist())
            answers = []
            for r in requests:
                key = (r.image, r.network, r.purpose)
                if key not in streams:
                    streams[key] = np.random.default_rng([7, r.image, len(r.purpose), int(r.network[-1:] == "1")]).multinomial(
                        r.count, shares[r.network][r.image]
                    )
                answers.append({r.network: streams[key]})
            policy.update(requests, answers)
        return [policy.certificate(i) for i in range(100)]

    by_tree, by_min = run("tree"), run("min")
    assert all(a.radius >= b.radius for a, b in zip(by_tree, by_min, strict=True))
    # one-sided, the router's invalid outcome is only bounded by one minus the top outcome: agreement gains nothing
    assert any(a.radius > b.radius for a, b in zip(by_tree, by_min, strict=True)) == (sides == "two")
    for a in by_min:
        assert a.radius == pytest.approx(min(a.r_router, a.r_expert))


def test_nested_routers_certify_where_all_experts_agree():
    """Off the selected path a routing stage draws selection votes of its own before it estimates."""
    leaves = [expert_stage(f"e{k}", 0.5, 3) for k in range(4)]
    inner = [Stage(f"q{k}", 0.5, leads_to=(f"e{2 * k}", f"e{2 * k + 1}", -1)) for k in range(2)]
    tree = Tree.of([Stage("r", 0.5, leads_to=("q0", "q1", -1)), *inner, *leaves])
    shares = {e.name: np.array([[0.97, 0.02, 0.01, 0.0]]) for e in leaves}
    shares |= {name: np.array([[0.51, 0.49, 0.0]]) for name in ("r", "q0", "q1")}
    policy, log = drive(tree, FixedPlan(100, 2000), shares, 1, 0)
    assert policy.certificate(0).radius > 0.3
    off = "q1" if policy._path[0][0][1] == 0 else "q0"
    purposes = [r.purpose for r, _ in log if r.network == off]
    assert purposes == ["select", "estimate"]
    # sampled under the min rule only on the path: a router at .51 to .49 certifies next to nothing
    minimal, _ = drive(tree, FixedPlan(100, 2000), shares, 1, 0, rule="min")
    assert minimal.certificate(0).radius < 0.1


def test_cascade_and_shared_networks():
    experts = [expert_stage("big", 1.0, 3), expert_stage("small", 0.25, 3)]
    tree = cascade_tree(experts, (0.55,))
    shares = {"big": np.array([[0.3, 0.3, 0.4, 0.0], [0.9, 0.05, 0.05, 0.0]]), "small": np.array([[0.98, 0.01, 0.01, 0.0]] * 2)}
    policy, _ = drive(tree, FixedPlan(100, 5000), shares, 2, 0)
    deferred, answered = policy.certificate(0), policy.certificate(1)
    assert (deferred.expert, deferred.predict) == ("small", 0)
    assert 0.1 < deferred.radius < 0.25 * 4
    assert (answered.expert, answered.predict) == ("big", 0)
    assert answered.radius > 0.9

    stages = [
        Stage("r", 0.5, leads_to=("a", "b"), network="shared"),
        expert_stage("a", 0.5, 2, network="shared"),
        expert_stage("b", 0.25, 2),
    ]
    shared = Tree.of(stages)
    shares = {"r": np.array([[0.95, 0.05]]), "a": np.array([[0.95, 0.05, 0.0]]), "b": np.array([[0.99, 0.01, 0.0]])}
    policy, log = drive(shared, FixedPlan(100, 5000), shares, 1, 0)
    assert policy.certificate(0).radius > 0.3
    assert len([r for r, _ in log if r.network == "shared"]) == 2
    with pytest.raises(PlanError):
        drive(Tree.of([stages[0], expert_stage("a", 0.3, 2, network="shared"), stages[2]]), FixedPlan(), shares, 1, 0)


def test_invalid_votes_never_certify():
    tree = Tree.of([expert_stage("e", 0.5, 2)])
    policy, _ = drive(tree, FixedPlan(20, 200), {"e": np.array([[0.0, 0.0, 1.0]])}, 1, 0)
    assert (policy.certificate(0).predict, policy.certificate(0).radius) == (ABSTAIN, 0.0)


def test_votes_must_answer_open_requests():
    """A stream that is read twice, or a shortened look, would void the bound: refused, the state unchanged."""
    tree = Tree.of([Stage("e", 0.5, leads_to=(0, 1))])
    plan = AdaptivePlan(400, [1.0], n0=20, spending="even")
    policy = CertifyPolicy(tree, plan, AlphaSplit.even(ALPHA, tree.paths), 1)
    ask = policy.next_requests([0])
    wrong = VoteRequest(0, "e", "estimate", 0, 100)
    for requests, votes in (
        ([wrong], [[90, 10]]),
        (ask, [[10, 5]]),
        (ask, [[25, -5]]),
        (ask, [[20]]),
        (ask, [[19.5, 0.5]]),
        (ask * 2, [[20, 0]] * 2),
        (ask, []),
    ):
        with pytest.raises(PlanError):
            policy.update(requests, [{"e": np.array(v)} for v in votes])
    with pytest.raises(PlanError):
        policy.update(ask, [{}])
    policy.update(ask, [{"e": np.array([20, 0])}])
    first = policy.next_requests([0])
    assert first == [VoteRequest(0, "e", "estimate", 0, 100)]
    with pytest.raises(PlanError):
        policy.certificate(0)
    policy.update(first, [{"e": np.array([95, 5])}])
    for again in (
        first,
        ask,
        [VoteRequest(0, "e", "estimate", 50, 100)],
        [VoteRequest(1, "e", "estimate", 100, 100)],
        [VoteRequest(0, "other", "estimate", 100, 100)],
        [VoteRequest(0, "e", "predict", 100, 100)],
    ):
        with pytest.raises(PlanError):
            policy.update(again, [{"e": np.array([r.count, 0])} for r in again])
    assert policy.drawn(0) == 120


def test_a_split_that_was_changed_or_is_another_trees_is_refused():
    tree = Tree.of([Stage("r", 1.0, leads_to=("a", "b")), expert_stage("a", 0.5, 2), expert_stage("b", 0.5, 2)])
    split = AlphaSplit.even(ALPHA, tree.paths)
    split.stages["r"] = 0.5
    for bad in (split, AlphaSplit(ALPHA, {"r": ALPHA}, (("r",),))):
        with pytest.raises(PlanError):
            CertifyPolicy(tree, FixedPlan(), bad, 1)
    with pytest.raises(PlanError):
        CertifyPolicy(tree, FixedPlan(), AlphaSplit.even(ALPHA, tree.paths), 1, rule="best")
    with pytest.raises(PlanError):
        CertifyPolicy(tree, FixedPlan(), AlphaSplit.even(ALPHA, tree.paths), 1, sides="three")


def test_one_image_at_a_time_is_the_same():
    experts = [expert_stage(f"e{k}", s, 3) for k, s in enumerate((0.5, 1.0))]
    tree = flat_tree("r", 1.0, experts)
    plan = AdaptivePlan(2000, [0.25, 0.5, 1.0], n0=50)
    results = []
    for window in (None, 1):
        policy = CertifyPolicy(tree, plan, AlphaSplit.even(ALPHA, tree.paths), 20)
        while not policy.done.all():
            requests = policy.next_requests(np.flatnonzero(~policy.done).tolist()[:window])
            policy.update(
                requests,
                [
                    {
                        r.network: np.random.default_rng([r.image, len(r.purpose), ord(r.network[-1]), r.start]).multinomial(
                            r.count, [0.8, 0.15, 0.05] if r.network == "r" else [0.9, 0.06, 0.04, 0.0]
                        )
                    }
                    for r in requests
                ],
            )
        results.append([policy.certificate(i) for i in range(20)])
    assert results[0] == results[1]


def test_the_core_imports_no_torch():
    code = (
        "import sys, rsrouter.core, rsrouter.core.predict, rsrouter.core.budget; "
        "sys.exit(int('torch' in sys.modules or 'statsmodels' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
