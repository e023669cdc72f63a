"""PREDICT on a tree: error rates on stages with known probabilities, near-ties included."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rsrouter.core import ABSTAIN, AlphaSplit, PlanError, Stage, VoteRequest, cascade_tree, expert_stage, flat_tree
from rsrouter.core.predict import PredictPolicy, confidence_set


def classifier(outcomes: int) -> Stage:
    return Stage("e", 1.0, leads_to=tuple(range(outcomes)))


def router(outcomes: int) -> Stage:
    return Stage("r", 1.0, leads_to=(*("ab" for _ in range(outcomes - 1)), 0))


def exact_error(stage: Stage, p: np.ndarray, n: int, alpha: float, winner: int) -> float:
    """P(the set misses the winner), by summing the multinomial pmf over three outcomes."""
    grid = np.array([(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)])
    return float(stats.multinomial.pmf(grid, n, p)[~confidence_set(stage, grid, alpha)[:, winner]].sum())


@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("p", [(0.5, 0.5, 0.0), (1 / 3, 1 / 3, 1 / 3), (0.4, 0.35, 0.25), (0.48, 0.47, 0.05)])
@pytest.mark.parametrize("stage", [classifier(3), router(3)], ids=["classifier", "router"])
def test_plurality_sets_miss_the_winner_at_most_alpha(stage, p, alpha):
    for n in (7, 20, 41):
        assert exact_error(stage, np.array(p), n, alpha, 0) <= alpha


def misses(stage: Stage, p: np.ndarray, n: int, alpha: float, winner: int, runs: int = 20_000) -> int:
    counts = np.random.default_rng(9).multinomial(n, p, runs)
    return int((~confidence_set(stage, counts, alpha)[:, winner]).sum())


@pytest.mark.parametrize("stage", [classifier(10), router(10)], ids=["classifier", "router"])
@pytest.mark.parametrize("p", [np.full(10, 0.1), np.array([0.104, *[0.896 / 9] * 9]), np.array([*[0.19] * 5, *[0.01] * 5])])
@pytest.mark.parametrize("n", [40, 500])
def test_ten_near_ties(stage, p, n):
    p, alpha, runs = p / p.sum(), 0.05, 20_000
    wrong = misses(stage, p, n, alpha, 0)
    assert stats.binom.sf(wrong - 1, runs, alpha) > 1e-4, f"{wrong} of {runs}"


def test_planted_mistake_uncorrected_pairs_are_caught(monkeypatch: pytest.MonkeyPatch):
    """Without the Bonferroni correction ten equal outcomes exclude one of them far too often."""
    stage = router(10)
    wrong = misses(stage, np.full(10, 0.1), 500, 0.05 * 9, 0)  # alpha / (L - 1) at nine times alpha is alpha for each pair
    assert stats.binom.sf(wrong - 1, 20_000, 0.05) < 1e-6


@pytest.mark.parametrize("alpha", [0.05, 0.3])
@pytest.mark.parametrize("tau", [0.55, 0.8])
def test_threshold_sets_miss_the_winner_at_most_alpha(tau, alpha):
    stage = Stage("t", 1.0, "threshold", tau, (0, 1, 2, "next"))
    near = np.nextafter(tau, 0)
    for n in (9, 40):
        # just below tau the stage defers, at tau the class wins
        for p in ((near, 1 - near, 0.0), (near, (1 - near) / 2, (1 - near) / 2), (0.3, 0.4, 0.3)):
            assert exact_error(stage, np.array(p), n, alpha, 3) <= alpha
        for p in ((tau, 1 - tau, 0.0), (tau, (1 - tau) / 2, (1 - tau) / 2), (0.95, 0.05, 0.0)):
            assert exact_error(stage, np.array(p), n, alpha, 0) <= alpha


def test_single_stage_is_cohens_predict():
    stage = classifier(3)
    counts = np.array([[60, 40, 0], [70, 30, 0], [50, 50, 0], [10, 0, 0], [11, 0, 0]])
    kept = confidence_set(stage, counts, 0.001)
    for row, found in zip(counts, kept, strict=True):
        decided = stats.binomtest(int(row[0]), int(row[0] + row[1]), 0.5).pvalue <= 0.001
        np.testing.assert_array_equal(found, [True, not decided, not decided])


def answers(tree, shares, n, runs, alpha, seed=0):
    rng = np.random.default_rng(seed)
    policy = PredictPolicy(tree, n, alpha, runs)
    drawn = 0
    while requests := policy.next_requests(np.flatnonzero(~policy.done).tolist()):
        votes = [{r.network: rng.multinomial(r.count, shares[r.network])} for r in requests]
        drawn += sum(r.count for r in requests)
        policy.update(requests, votes)
    return np.array([policy.answer(i) for i in range(runs)]), drawn


EXPERTS = [expert_stage(name, 0.5, 3) for name in "ab"]


def test_a_tie_in_the_router_is_no_tie_where_the_experts_agree():
    tree = flat_tree("r", 1.0, EXPERTS)
    shares = {"r": [0.5, 0.5, 0.0], "a": [0.9, 0.1, 0, 0], "b": [0.8, 0.1, 0.1, 0]}
    found, drawn = answers(tree, shares, 300, 50, 1e-3)
    assert np.all(found == 0)
    assert drawn == 50 * 900
    found, _ = answers(tree, shares | {"b": [0.1, 0.8, 0.1, 0]}, 300, 50, 1e-3)
    assert np.mean(found == ABSTAIN) > 0.9


def test_a_clear_router_asks_one_expert_and_invalid_abstains():
    tree = flat_tree("r", 1.0, EXPERTS)
    found, drawn = answers(tree, {"r": [0.1, 0.9, 0.0], "a": [0, 1, 0, 0], "b": [1, 0, 0, 0]}, 200, 10, 1e-3)
    assert np.all(found == 0)
    assert drawn == 10 * 400
    found, drawn = answers(tree, {"r": [0.0, 0.1, 0.9], "a": [0, 1, 0, 0], "b": [1, 0, 0, 0]}, 200, 10, 1e-3)
    assert np.all(found == ABSTAIN)
    assert drawn == 10 * 200
    assert np.all(answers(tree, {"r": [0, 1, 0], "a": [0, 1, 0, 0], "b": [0, 0, 0, 1]}, 200, 5, 1e-3)[0] == ABSTAIN)


def test_cascade_answers_where_deferring_changes_nothing():
    tree = cascade_tree(EXPERTS, (0.6,))
    found, _ = answers(tree, {"a": [0.6, 0.4, 0, 0], "b": [0.9, 0.1, 0, 0]}, 300, 20, 1e-3)
    assert np.all(found == 0)
    found, _ = answers(tree, {"a": [0.3, 0.3, 0.4, 0], "b": [0.05, 0.9, 0.05, 0]}, 300, 20, 1e-3)
    assert np.all(found == 1)


@pytest.mark.parametrize(
    ("make", "shares", "truth"),
    [
        # both stages of the path at a near-tie: errors may add up to alpha, not beyond
        (lambda: flat_tree("r", 1.0, EXPERTS), {"r": [0.51, 0.49, 0], "a": [0.51, 0.49, 0, 0], "b": [0.0, 1.0, 0, 0]}, 0),
        (lambda: cascade_tree(EXPERTS, (0.6,)), {"a": [0.599, 0.401, 0, 0], "b": [0.49, 0.51, 0, 0]}, 1),
    ],
    ids=["flat", "cascade"],
)
def test_routed_errors_stay_below_alpha(make, shares, truth):
    alpha, runs = 0.2, 2000
    found, _ = answers(make(), shares, 60, runs, alpha)
    wrong = int(((found != truth) & (found != ABSTAIN)).sum())
    assert stats.binom.sf(wrong - 1, runs, alpha) > 1e-4


def test_bad_input_is_refused():
    tree = flat_tree("r", 1.0, EXPERTS)
    for n, alpha in ((0, 0.1), (1.5, 0.1), (10, 0.0), (10, np.nan), (10, AlphaSplit(0.1, {"r": 0.1}, (("r",),)))):
        with pytest.raises(PlanError):
            PredictPolicy(tree, n, alpha, 1)
    policy = PredictPolicy(tree, 10, 0.1, 1)
    with pytest.raises(PlanError):
        policy.answer(0)
    for network, purpose, count, row in (
        ("a", "predict", 10, [10, 0, 0, 0]),
        ("r", "predict", 20, [20, 0, 0]),
        ("r", "estimate", 10, [10, 0, 0]),
        ("r", "predict", 10, [9, 0, 0]),
    ):
        with pytest.raises(PlanError):
            policy.update([VoteRequest(0, network, purpose, 0, count)], [{network: np.array(row)}])
    with pytest.raises(PlanError):
        confidence_set(classifier(3), np.zeros((2, 3), int), 0.1)
