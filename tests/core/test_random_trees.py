"""The whole policy on random trees: sampled votes, every rule and plan, against the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rsrouter.core import ABSTAIN, AdaptivePlan, AlphaSplit, CertifyPolicy, FixedPlan, PredictPolicy, entry_radii
from rsrouter.core.certificates import group_entries, recursion
from tests.helpers.closed_form import random_tree, routed_answer

ALPHA, IMAGES = 0.05, 40
GRID = (0.05, 0.1, 0.2, 0.3, 0.5)
PLANS = [
    FixedPlan(30, 100),
    AdaptivePlan(400, GRID, n0=30, first=40),
    AdaptivePlan(200, GRID, n0=30, first=40, bound="mixture"),
]


def drive(policy, rng, p):
    while not policy.done.all():
        requests = policy.next_requests(np.flatnonzero(~policy.done).tolist())
        assert requests
        policy.update(requests, [{r.network: rng.multinomial(r.count, p[r.network])} for r in requests])


def survey(seed: int, trees: int) -> tuple[list[int], list[int]]:
    """Per tree: certificates above the recursion on true probabilities, and wrong answers of PREDICT, of `IMAGES` each."""
    rng = np.random.default_rng(seed)
    too_large, wrong = [], []
    for t in range(trees):
        tree, models = random_tree(rng, 1)
        x = np.zeros((1, 1))
        p = {s: models[s].probabilities(x)[0] for s in tree.order}
        p = {s: q / q.sum() for s, q in p.items()}
        rule, sides = ("tree", "min")[int(rng.random() < 0.3)], ("one", "two")[int(rng.integers(2))]
        split = AlphaSplit.even(ALPHA, tree.paths)
        policy = CertifyPolicy(tree, PLANS[t % len(PLANS)], split, IMAGES, rule=rule, sides=sides)
        drive(policy, rng, p)
        above = 0
        for i in range(IMAGES):
            certificate = policy.certificate(i)
            if certificate.radius > 0.0:
                true = {}
                for name, stage in tree.stages.items():
                    reference, exact = np.array([policy._reference[name][i]]), np.clip(p[name][None], 1e-300, np.nextafter(1, 0))
                    entry = entry_radii(stage, exact, exact, reference)
                    true[name] = group_entries(stage, entry, np.array([certificate.predict]))
                above += certificate.radius > recursion(tree, true)[0][0] * (1 + 1e-9) + 1e-12
        too_large.append(int(above))
        answers = PredictPolicy(tree, 60, ALPHA, IMAGES)
        drive(answers, rng, p)
        found = np.array([answers.answer(i) for i in range(IMAGES)])
        wrong.append(int(((found != ABSTAIN) & (found != routed_answer(tree, models, x)[0])).sum()))
    return too_large, wrong


def check(too_large: list[int], wrong: list[int]) -> None:
    for counts in (too_large, wrong):
        trees = len(counts)
        share = sum(counts) / trees / IMAGES
        print(f"\n{sum(counts)} of {trees * IMAGES} ({share:.2%}, alpha {ALPHA:.0%}), worst tree {max(counts)} of {IMAGES}")
        # every single tree, with a Bonferroni correction over the trees
        assert stats.binom.sf(max(counts) - 1, IMAGES, ALPHA) > 1e-4 / trees


def test_policies_on_random_trees_fail_at_most_alpha():
    check(*survey(0, 60))


@pytest.mark.slow
def test_policies_on_many_random_trees_fail_at_most_alpha():
    check(*survey(1, 2000))
