"""Properties of the certificate on counts, by hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from rsrouter.core import (
    AlphaSplit,
    FixedPlan,
    PlanError,
    Stage,
    Tree,
    binom_lower,
    binom_upper,
    cascade_tree,
    entry_radii,
    expert_stage,
    flat_tree,
    tree_radius,
    vote_radius,
)

ALPHA = 1e-2
CLASSES = 3
EXPERTS = 3


@st.composite
def votes(draw, outcomes: int):
    """Counts of one stage, often with a clear winner."""
    counts = [draw(st.integers(0, 200)) for _ in range(outcomes)]
    counts[draw(st.integers(0, outcomes - 1))] += draw(st.integers(0, 3000))
    counts[0] += 1
    return np.array(counts)


@st.composite
def routed(draw):
    """A flat tree or a cascade, and votes for every stage."""
    sigmas = [draw(st.sampled_from([0.25, 0.5, 1.0])) for _ in range(EXPERTS)]
    experts = [expert_stage(f"e{k}", s, CLASSES) for k, s in enumerate(sigmas)]
    if draw(st.booleans()):
        tree = flat_tree("r", draw(st.sampled_from([0.5, 1.0])), experts)
    else:
        tree = cascade_tree(experts, [draw(st.sampled_from([0.55, 0.7, 0.9])) for _ in range(EXPERTS - 1)])
    return tree, {name: draw(votes(tree.stages[name].num_outcomes)) for name in tree.order}


def certify(
    tree: Tree,
    counts: dict[str, np.ndarray],
    c: int,
    references: dict[str, int],
    *,
    sides: str = "two",
    sampled: set[str] | None = None,
) -> float:
    split = AlphaSplit.even(ALPHA, tree.paths)
    stages, lower, upper = [], {}, {}
    for name, stage in tree.stages.items():
        reference = np.array([references[name]])
        stages.append(Stage(name, stage.sigma, stage.kind, stage.tau, stage.leads_to, reference))
        if sampled is None or name in sampled:
            plan = FixedPlan(1, int(counts[name].sum()))
            bounds = plan.bounds(
                stage, counts[name][None], np.zeros(1, int), reference, np.array([c]), alpha=split.stages[name], sides=sides
            )
            lower[name], upper[name] = bounds.lower, bounds.upper
    return float(tree_radius(stages, tree.root, lower, upper, np.array([c]))[0][0])


def fixed_beforehand(draw_c: int, tree: Tree, counts: dict[str, np.ndarray]) -> dict[str, int]:
    """References as selection would give them: the winner where a stage routes, else the class."""
    return {
        name: int(counts[name].argmax()) if not (stage.answers[: stage.num_outcomes] == draw_c).any() else draw_c
        for name, stage in tree.stages.items()
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(routed(), st.integers(0, CLASSES - 1), st.sampled_from(["one", "two"]))
def test_one_more_stage_never_hurts(case, c, sides):
    tree, counts = case
    references = fixed_beforehand(c, tree, counts)
    sampled: set[str] = set()
    radius = certify(tree, counts, c, references, sides=sides, sampled=sampled)
    for name in tree.order:
        sampled = sampled | {name}
        more = certify(tree, counts, c, references, sides=sides, sampled=sampled)
        assert more >= radius
        radius = more


@settings(max_examples=200, deadline=None, derandomize=True)
@given(routed(), st.integers(0, CLASSES - 1), st.data())
def test_raising_counts_moves_the_radius_the_right_way(case, c, data):
    """A vote moved to an outcome that answers c never lowers R; moved to one that answers another class never raises it."""
    tree, counts = case
    references = fixed_beforehand(c, tree, counts)
    name = data.draw(st.sampled_from(list(tree.order)))
    stage = tree.stages[name]
    answers = stage.answers[: stage.num_outcomes]
    donors = np.flatnonzero(counts[name] > 0)
    before = certify(tree, counts, c, references)
    moved = {**counts, name: counts[name].copy()}
    donor = int(data.draw(st.sampled_from(donors.tolist())))
    receivers = [k for k in range(stage.num_outcomes) if answers[k] != -2 and k != donor]
    assume(receivers)
    receiver = int(data.draw(st.sampled_from(receivers)))
    amount = data.draw(st.integers(1, int(counts[name][donor])))
    moved[name][donor] -= amount
    moved[name][receiver] += amount
    after = certify(tree, moved, c, references)
    if answers[receiver] == c:
        # taken from a stage-bound outcome the entry there only gets harder; from any other one too
        assert after >= before or references[name] == donor
    elif answers[donor] == c or references[name] == donor:
        assert after <= before


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(["one", "two"]))
def test_never_below_the_min_rule_at_equal_total_alpha(data, sides):
    experts = [expert_stage(f"e{k}", s, CLASSES) for k, s in enumerate((0.25, 0.5, 1.0))]
    tree = flat_tree("r", 1.0, experts)
    counts = {name: data.draw(votes(tree.stages[name].num_outcomes)) for name in tree.order}
    chosen = int(counts["r"][:EXPERTS].argmax())
    c = int(counts[f"e{chosen}"][:CLASSES].argmax())
    references = {"r": chosen} | {f"e{k}": c for k in range(EXPERTS)}
    radius = certify(tree, counts, c, references, sides=sides)

    def alone(sigma: float, votes: np.ndarray, top: int) -> float:
        # invalid votes, the last column, count for every rival
        n = votes.sum()
        rest = min(n, np.delete(votes[:-1], top).max() + votes[-1])
        if sides == "one":
            return float(vote_radius(sigma, binom_lower(votes[top], n, ALPHA / 2)))
        return float(vote_radius(sigma, binom_lower(votes[top], n, ALPHA / 2 * 0.9), binom_upper(rest, n, ALPHA / 2 * (1 - 0.9))))

    expert = experts[chosen]
    assert radius >= min(alone(1.0, counts["r"], chosen), alone(expert.sigma, counts[expert.name], c)) * (1 - 1e-12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data(), st.permutations(range(EXPERTS)))
def test_the_order_of_experts_changes_nothing(data, order):
    experts = [expert_stage(f"e{k}", s, CLASSES) for k, s in enumerate((0.25, 0.5, 1.0))]
    tree = flat_tree("r", 1.0, experts)
    counts = {name: data.draw(votes(tree.stages[name].num_outcomes)) for name in tree.order}
    c, chosen = data.draw(st.integers(0, CLASSES - 1)), int(counts["r"][:EXPERTS].argmax())
    references = {"r": chosen} | {f"e{k}": c for k in range(EXPERTS)}
    other = flat_tree("r", 1.0, [experts[k] for k in order])
    moved = {**counts, "r": np.array([*(counts["r"][k] for k in order), counts["r"][-1]])}
    assert certify(other, moved, c, {**references, "r": order.index(chosen)}) == certify(tree, counts, c, references)


def test_special_cases():
    """One stage is Cohen's radius; a router with only the chosen expert sampled is the min rule."""
    one = Tree.of([Stage("e", 0.5, leads_to=(0, 1, 2))])
    counts = {"e": np.array([900, 60, 40])}
    expected = 0.5 * stats.norm.ppf(stats.beta.ppf(ALPHA, 900, 101))
    assert certify(one, counts, 0, {"e": 0}, sides="one") == pytest.approx(expected, rel=1e-9)

    experts = [expert_stage(f"e{k}", s, CLASSES) for k, s in enumerate((0.25, 1.0))]
    tree = flat_tree("r", 1.0, experts)
    counts = {"r": np.array([800, 200, 0]), "e0": np.array([990, 5, 5, 0]), "e1": np.array([900, 50, 50, 0])}
    references = {"r": 0, "e0": 0, "e1": 0}
    r_router = stats.norm.ppf(stats.beta.ppf(ALPHA / 2, 800, 201))
    r_expert = 0.25 * stats.norm.ppf(stats.beta.ppf(ALPHA / 2, 990, 11))
    found = certify(tree, counts, 0, references, sides="one", sampled={"r", "e0"})
    assert found == pytest.approx(min(r_router, r_expert), rel=1e-9)

    # a cascade that surely defers is its last expert
    row = cascade_tree(experts[::-1], (0.9,))
    counts["e1"] = np.array([400, 300, 300, 0])
    z_hi = stats.norm.ppf(stats.beta.isf(ALPHA / 2, 401, 600))
    last = certify(row, counts, 0, {"e0": 0, "e1": 0})
    alone = certify(Tree.of([experts[0]]), {"e0": counts["e0"]}, 0, {"e0": 0})
    assert last == pytest.approx(min(alone, stats.norm.ppf(0.9) - z_hi), rel=0.05)


def test_a_router_is_not_needed_where_every_outcome_answers_the_same():
    """Unsampled stages have entry radii 0, so agreement below them still counts."""
    tree = Tree.of([Stage("r", 1.0, leads_to=("a", "b")), Stage("a", 0.5, leads_to=(0, 1)), Stage("b", 0.5, leads_to=(0, 1))])
    bounds = {"a": [[0.9, 0.0]], "b": [[0.8, 0.0]]}, {"a": [[1.0, 0.1]], "b": [[1.0, 0.2]]}
    radius, by = tree_radius(tree, None, *bounds, np.array([0]))
    assert radius[0] == pytest.approx(0.5 * stats.norm.ppf(0.8))
    assert by[0] == "b"
    assert tree_radius(tree, "a", *bounds, np.array([0]))[0][0] == pytest.approx(0.5 * stats.norm.ppf(0.9))


def test_nan_and_nonsense_bounds_certify_nothing():
    stage = Stage("e", 0.5, leads_to=(0, 1))
    for lower, upper in (
        ([[np.nan, 0]], [[1, 0.1]]),
        ([[0.9, 0]], [[1, np.nan]]),
        ([[1.5, 0]], [[1, -0.5]]),
        ([[0.4, 0]], [[1, 0.5]]),
        ([[0.0, 0]], [[1, 1]]),
        ([[-np.inf, 0]], [[1, np.inf]]),
    ):
        radius, _ = tree_radius([stage], None, {"e": lower}, {"e": upper}, np.array([0]))
        assert radius[0] == 0.0
    assert vote_radius(0.5, np.nan) == 0.0
    assert vote_radius(0.5, [0.9], [np.nan])[0] == 0.0
    assert vote_radius(0.5, 0.5) == 0.0
    assert vote_radius(0.5, 1.0) == 0.0
    assert vote_radius(0.5, [0.9], [0.0])[0] == 0.0
    for c in (np.array([0.0]), np.array([[0]])):
        with pytest.raises(PlanError):
            tree_radius([stage], None, {}, {}, c)
    assert tree_radius([stage], None, {"e": [[0.9, 0.0]]}, {"e": [[1.0, 0.1]]}, np.array([-1]))[0][0] == 0.0
    with pytest.raises(PlanError):
        entry_radii(stage, np.zeros((1, 3)), np.zeros((1, 3)), np.zeros(1, int))
    with pytest.raises(PlanError):
        vote_radius(0.0, 0.9)


@pytest.mark.parametrize("counts", [[[5, -1, 6]], [[5, 5, 5]], [[10, 0]], [[5.0, 2.5, 2.5]], [[np.nan, 5, 5]]])
def test_bad_counts_are_refused(counts):
    stage = Stage("e", 0.5, leads_to=(0, 1, 2))
    with pytest.raises(PlanError):
        FixedPlan(1, 10).bounds(stage, np.array(counts), np.zeros(1, int), np.zeros(1, int), np.zeros(1, int), alpha=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Stage("s", 0.0, leads_to=(0, 1)),
        lambda: Stage("s", np.nan, leads_to=(0, 1)),
        lambda: Stage("s", True, leads_to=(0, 1)),
        lambda: Stage("s", 1.0, leads_to=(0,)),
        lambda: Stage("s", 1.0, leads_to=(0, -2)),
        lambda: Stage("s", 1.0, leads_to=(0, 1.5)),
        lambda: Stage("s", 1.0, "threshold", 0.5, (0, 1, 2)),
        lambda: Stage("s", 1.0, "threshold", np.nan, (0, 1, 2)),
        lambda: Stage("s", 1.0, "plurality", 0.6, (0, 1)),
        lambda: Stage("s", 1.0, "majority", None, (0, 1)),
        lambda: Tree.of([]),
        lambda: Tree.of([Stage("s", 1.0, leads_to=(0, "t"))]),
        lambda: Tree.of([Stage("s", 1.0, leads_to=(0, "s"))]),
        lambda: Tree.of([Stage("s", 1.0, leads_to=(0, 1)), Stage("t", 1.0, leads_to=(0, 1))]),
        lambda: Tree({"x": Stage("s", 1.0, leads_to=(0, 1))}, "x"),
        lambda: Tree.of([Stage("s", 1.0, leads_to=(0, 1))], "t"),
        lambda: cascade_tree([expert_stage("a", 1.0, 2)], [0.6, 0.7]),
        lambda: cascade_tree([expert_stage("a", 1.0, 2), expert_stage("b", 1.0, 2), expert_stage("c", 1.0, 2)], [0.6]),
    ],
)
def test_bad_trees_are_refused(make):
    with pytest.raises(PlanError):
        make()
