"""Deterministic stages in the policies: mixed trees against the truth, recomputed from what a table stores, and refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from rsrouter.core import ABSTAIN, AdaptivePlan, AlphaSplit, CertifyPolicy, FixedPlan, PredictPolicy, Stage, Tree, recompute
from rsrouter.core.certificates import entry_radii, group_entries, recursion
from rsrouter.core.errors import PlanError
from rsrouter.core.passes import pass_entries, pass_possible, pass_targets
from rsrouter.core.requests import PASS, VoteRequest
from tests.helpers.closed_form import random_tree, routed_answer

ALPHA, IMAGES = 0.05, 20
PLANS = [FixedPlan(30, 100), AdaptivePlan(400, (0.05, 0.1, 0.2, 0.3, 0.5), n0=30, first=40)]


def drive(policy, rng, p) -> int:
    """Answers every request until all images are done; the votes that were drawn."""
    votes = 0
    while not policy.done.all():
        requests = policy.next_requests(np.flatnonzero(~policy.done).tolist())
        assert requests
        votes += sum(r.count for r in requests if r.purpose != PASS)
        answers = [p[r.network] if r.purpose == PASS else rng.multinomial(r.count, p[r.network]) for r in requests]
        policy.update(requests, [{r.network: a} for r, a in zip(requests, answers, strict=True)])
    return votes


def as_row(certificate):
    """The votes of a certificate as they come back from a table."""
    stored = {"select": certificate.selection, "estimate": certificate.counts, "earlier": certificate.earlier}
    return json.loads(json.dumps({**stored, "logits": certificate.logits}))


def survey(seed: int, trees: int) -> None:
    rng = np.random.default_rng(seed)
    above, wrong, free, x = [], [], 0, np.zeros((1, 1))
    for t in range(trees):
        tree, models = random_tree(rng, 1, 0.5)
        p, plan = {s: models[s].probabilities(x)[0] for s in tree.order}, PLANS[t % 2]
        noisy = {s: q / q.sum() if tree.stages[s].votes else q + rng.uniform(-1, 1, q.shape) * tree.stages[s].rounding
                 for s, q in p.items()}  # fmt: skip
        rule, sides = ("tree", "min")[int(rng.random() < 0.3)], ("one", "two")[int(rng.integers(2))]
        split = AlphaSplit.even(ALPHA, tree.paths)
        policy = CertifyPolicy(tree, plan, split, IMAGES, rule=rule, sides=sides)
        votes = drive(policy, rng, noisy)
        made = [policy.certificate(i) for i in range(IMAGES)]
        assert sum(c.n_drawn for c in made) == votes
        free += votes == 0
        assert recompute.recompute(tree, plan, split, [as_row(c) for c in made], rule=rule, sides=sides) == made
        count = 0
        for i, certificate in enumerate(made):
            if certificate.radius > 0.0:
                true = {}
                for name, stage in tree.stages.items():
                    if stage.votes:
                        exact = np.clip(p[name][None], 1e-300, np.nextafter(1, 0))
                        entry = entry_radii(stage, exact, exact, np.array([policy._reference[name][i]]))
                    else:
                        entry = pass_entries(Stage(name, 0.0, stage.kind, stage.tau, stage.leads_to, lipschitz=stage.lipschitz),
                                             p[name][None])  # fmt: skip
                    true[name] = group_entries(stage, entry, np.array([certificate.predict]))
                count += certificate.radius > recursion(tree, true)[0][0] * (1 + 1e-9) + 1e-12
        above.append(int(count))
        answers = PredictPolicy(tree, 60, ALPHA, IMAGES)
        drive(answers, rng, noisy)
        found = np.array([answers.answer(i) for i in range(IMAGES)])
        wrong.append(int(((found != ABSTAIN) & (found != routed_answer(tree, models, x)[0])).sum()))
    assert free > 0
    for counts in (above, wrong):
        assert stats.binom.sf(max(counts) - 1, IMAGES, ALPHA) > 1e-4 / trees


def test_mixed_policies_fail_at_most_alpha_and_rows_recompute():
    survey(0, 60)


@pytest.mark.slow
def test_many_mixed_policies_fail_at_most_alpha():
    survey(1, 2000)


GATE = Stage("gate", 0.0, leads_to=(0, 1, ABSTAIN), lipschitz=1.0, rounding=0.1)


def test_rounding_is_taken_off_twice_and_nothing_not_finite_certifies():
    logits = [[1.2, 0.0], [0.15, 0.0], [np.nan, 5.0], [np.inf, 0.0], [-np.inf, 0.0]]
    entry = pass_entries(GATE, logits)
    assert entry[0, 1] == pytest.approx(1.0 / np.sqrt(2.0), rel=1e-9)
    assert entry[0, 1] < 1.0 / np.sqrt(2.0)
    assert entry[1].tolist() == [0.0, 0.0, np.inf]
    assert not entry[2:].any()
    assert pass_targets(GATE, logits).tolist() == [0, 0, 2, 2, 2]
    assert pass_possible(GATE, logits).tolist()[:3] == [[True, False, False], [True, True, False], [True] * 3]


def by_hand(stage: Stage, z: list[float]) -> tuple[list[float], int, list[bool]]:
    """Entry radii, target, and what the true function may decide, of one row of logits: the module's formulas in loops."""
    k, classes = len(z), range(len(z))
    if not all(map(math.isfinite, z)):
        return [0.0] * len(stage.leads_to), k, [True] * len(stage.leads_to)
    constant = [[stage.lipschitz[a][b] if isinstance(stage.lipschitz, tuple) else math.sqrt(2) * stage.lipschitz
                 for b in classes] for a in classes]  # fmt: skip
    tau, wrong = stage.tau or 0.0, 2 * stage.rounding
    lead = [z[a] - max(z[m] for m in classes if m != a) for a in classes]
    entry = [max(0.0, *((tau - (z[a] - z[m]) - wrong) / constant[a][m] for m in classes if m != a)) for a in classes]
    possible = [gap >= tau - wrong for gap in lead]
    if stage.tau is None:
        return [*entry, math.inf], lead.index(max(lead)), [*possible, False]
    kept = max(min((z[a] - z[m] - tau - wrong) / constant[a][m] for m in classes if m != a) for a in classes)
    target = lead.index(max(lead)) if max(lead) >= tau else k + 1
    return [*entry, math.inf, max(0.0, kept)], target, [*possible, False, not any(gap >= tau + wrong for gap in lead)]


@pytest.mark.parametrize("tau", [None, 0.7])
@pytest.mark.parametrize("rounding", [0.0, 0.05])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("table", [False, True])
def test_passes_are_the_formulas_one_by_one(tau: float | None, rounding: float, k: int, table: bool) -> None:
    rng = np.random.default_rng(k)
    constants = rng.uniform(0.5, 3.0, (k, k))
    lipschitz = tuple(map(tuple, (constants + constants.T).tolist())) if table else 1.3
    more = (ABSTAIN,) if tau is None else (ABSTAIN, "next")
    kind = "plurality" if tau is None else "threshold"
    stage = Stage("gate", 0.0, kind, tau, (*range(k), *more), lipschitz=lipschitz, rounding=rounding)
    z = rng.normal(size=(40, k)).round(1)
    z[0], z[1], z[2], z[3, 0], z[4, -1] = 0.0, -7.0, 1e3 * np.arange(k), np.nan, -np.inf
    z[5] = 0.5 * np.arange(k)[::-1]
    entry, target, possible = pass_entries(stage, z), pass_targets(stage, z), pass_possible(stage, z)
    assert entry.shape == possible.shape == (40, len(stage.leads_to))
    assert possible.dtype == bool
    for row, logits in enumerate(z.tolist()):
        wanted, to, may = by_hand(stage, logits)
        np.testing.assert_allclose(entry[row], wanted, rtol=1e-8, atol=1e-8)
        assert np.all(entry[row] <= np.array(wanted))  # rounded down
        assert target[row] == to
        if min(abs(abs(a - b) - s) for a in logits for b in logits for s in (0.7, 0.6, 0.8, 0.1)) > 1e-9:  # no rounding decides
            assert possible[row].tolist() == may
        assert possible[row, to] or not np.isfinite(logits).all()


def test_a_pass_is_read_in_float64_rounded_down_and_a_lead_of_tau_wins() -> None:
    gate = Stage("gate", 0.0, "threshold", 1.0, (0, 1, ABSTAIN, "next"), lipschitz=1.0, rounding=0.3)
    # 1 - 2 * 0.3 over the square root of 2, less the room for rounding both
    assert pass_entries(gate, [[0.0, 0.0]])[0, 0] <= 0.4 / math.sqrt(2.0) * (1.0 - 1e-12)
    assert pass_targets(gate, [[2.0, 1.0], [np.nextafter(2.0, 0.0), 1.0]]).tolist() == [0, 3]
    single = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    np.testing.assert_array_equal(pass_entries(gate, single), pass_entries(gate, single.astype(np.float64)))


def test_logits_that_do_not_fit_a_stage_are_refused() -> None:
    voting = Stage("net", 0.5, leads_to=(0, 1, ABSTAIN))
    for read in (pass_entries, pass_targets, pass_possible):
        for stage, logits in ((voting, [[1.0, 0.0]]), (GATE, [1.0, 0.0]), (GATE, [[1.0, 0.0, 2.0]]), (GATE, [[[1.0, 0.0]]])):
            with pytest.raises(PlanError, match="Logits do not fit"):
                read(stage, logits)
        assert len(read(GATE, [[1, 0], [0, 1]])) == 2


def test_a_tree_without_votes_needs_no_alpha_and_no_votes():
    tree = Tree.of([GATE])
    assert tree.paths == ((),)
    assert AlphaSplit.even(0.001, tree.paths).stages == {}
    policy = CertifyPolicy(tree, FixedPlan(10, 100), AlphaSplit.even(0.001, tree.paths), 2)
    assert policy.next_requests([0]) == [VoteRequest(0, "gate", PASS, 0, 1)]
    policy.update([VoteRequest(i, "gate", PASS, 0, 1) for i in (0, 1)], [{"gate": np.array([2.0, z])} for z in (1.0, np.nan)])
    assert policy.done.all()
    assert [policy.certificate(i).n_drawn for i in (0, 1)] == [0, 0]
    assert (policy.certificate(0).predict, policy.certificate(1).predict) == (0, ABSTAIN)
    assert FixedPlan(10, 100).reach(tree, AlphaSplit.even(0.001, tree.paths)) == np.inf


def test_alpha_goes_to_the_stages_that_vote():
    tree = Tree.of([Stage("gate", 0.0, leads_to=("a", "b", ABSTAIN), lipschitz=1.0), *(
        Stage(s, 0.5, leads_to=(0, 1, ABSTAIN)) for s in "ab")])  # fmt: skip
    assert tree.paths == (("a",), ("b",))
    assert tree.chains == (("gate", "a"), ("gate", "b"))
    assert AlphaSplit.even(0.01, tree.paths).stages == {"a": 0.01, "b": 0.01}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma": 0.25}, "sigma 0"),
        ({"rounding": -1.0}, "rounding"),
        ({"rounding": float("nan")}, "rounding"),
        ({"lipschitz": 0.0}, "above 0"),
        ({"lipschitz": float("nan")}, "above 0"),
        ({"lipschitz": ((0.0, 1.0), (2.0, 0.0))}, "symmetric"),
        ({"lipschitz": ((0.0, 1.0, 1.0),) * 3}, "symmetric"),
        ({"leads_to": (0, 1, 2)}, "invalid"),
        ({"kind": "threshold", "tau": 0.0, "leads_to": (0, 1, -1, "x")}, "tau > 0"),
    ],
)
def test_stages_that_cannot_be_are_refused(change, words):
    told = {"name": "gate", "sigma": 0.0, "leads_to": (0, 1, ABSTAIN), "lipschitz": 1.0}
    with pytest.raises(PlanError, match=words):
        Stage(**{**told, **change})


@pytest.mark.parametrize("logits", [None, [1.0], [1.0, "2"], [1.0, True], "12"])
def test_a_row_with_other_logits_is_no_row_of_the_tree(logits):
    row = {"select": {}, "estimate": {}, "logits": {} if logits is None else {"gate": logits}}
    tree = Tree.of([GATE])
    (found,) = recompute.recompute(tree, FixedPlan(1, 1), AlphaSplit.even(0.1, tree.paths), [row])
    assert isinstance(found, PlanError)
    assert "Logits" in str(found)


def test_a_pass_is_answered_once():
    policy = CertifyPolicy(Tree.of([GATE]), FixedPlan(1, 1), AlphaSplit.even(0.1, ((),)), 1)
    for wrong in (VoteRequest(0, "gate", "select", 0, 1), VoteRequest(0, "gate", PASS, 0, 2)):
        with pytest.raises(PlanError):
            policy.update([wrong], [{"gate": np.array([1.0, 0.0, 0.0]) if wrong.purpose == "select" else np.array([1.0, 0.0])}])
    policy.update(policy.next_requests([0]), [{"gate": np.array([1.0, 0.0])}])
    with pytest.raises(PlanError, match="no open request"):
        policy.update([VoteRequest(0, "gate", PASS, 0, 1)], [{"gate": np.array([9.0, 0.0])}])
