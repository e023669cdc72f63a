"""The radius as a function of the stored votes: the policy's own certificate, recomputed from nothing but its row."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rsrouter.core import (
    AdaptivePlan,
    AlphaSplit,
    CertifyPolicy,
    FixedPlan,
    Plan,
    PlanError,
    Stage,
    Tree,
    cascade_tree,
    expert_stage,
    flat_tree,
)
from rsrouter.core.recompute import recompute
from rsrouter.results.rows import Row, parse_counts

EXPERTS = [expert_stage(f"e{k}", sigma, 4) for k, sigma in enumerate((0.25, 0.5, 1.0))]
SHARED = [expert_stage("e0", 0.25, 4), expert_stage("e1", 1.0, 4, network="router")]
TREES = {
    "one": Tree.of([EXPERTS[1]]),
    "flat": flat_tree("router", 1.0, EXPERTS),
    "shared": flat_tree("router", 1.0, SHARED),
    "cascade": cascade_tree(EXPERTS[::-1], (0.6, 0.55)),
    "two routers": Tree.of(
        [
            Stage("top", 1.0, leads_to=("left", "right", -1)),
            Stage("left", 0.5, leads_to=("e0", "e1", 2, -1)),
            Stage("right", 0.5, leads_to=("e1", "e2", -1)),
            *EXPERTS,
        ]
    ),
}
PLANS: dict[str, Plan] = {
    "fixed": FixedPlan(20, 400),
    "adaptive": AdaptivePlan(3000, (0.25, 0.5, 0.75, 1.0), 20, growth=1.6),
    "fine": AdaptivePlan(3000, tuple(np.arange(0.02, 1.0, 0.02)), 20, growth=1.3, last_share=0.5),
    "mixture": AdaptivePlan(3000, (0.3, 0.6), 20, growth=1.4, bound="mixture"),
}


def certify(tree: Tree, plan: Plan, rule: str, sides: str, images: int, seed: int):
    """Certificates of `images` images whose votes are drawn from random probabilities."""
    rng = np.random.default_rng(seed)
    odds = {s: rng.dirichlet(np.full(tree.stages[s].num_outcomes, rng.choice([0.08, 0.3])), images) for s in tree.order}
    split = AlphaSplit.even(0.01, tree.paths)
    policy = CertifyPolicy(tree, plan, split, images, rule=rule, sides=sides)
    while live := [i for i in range(images) if not policy.done[i]]:
        requests = policy.next_requests(live)
        stages = [[s for s in tree.order if tree.stages[s].network == r.network] for r in requests]
        policy.update(
            requests,
            [{s: rng.multinomial(r.count, odds[s][r.image]) for s in group} for r, group in zip(requests, stages, strict=True)],
        )
    return split, [policy.certificate(i) for i in range(images)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("tree", TREES)
def test_rows_give_their_certificates_back(tree: str, plan: str) -> None:
    for rule in ("tree", "min"):
        for sides in ("two", "one"):
            split, certificates = certify(TREES[tree], PLANS[plan], rule, sides, 60, seed=len(tree) + len(plan))
            stored = [parse_counts(Row.from_certificate(c, idx=i).to_line().split("\t")[-1]) for i, c in enumerate(certificates)]
            again = recompute(TREES[tree], PLANS[plan], split, stored, rule=rule, sides=sides)
            for mine, theirs in zip(certificates, again, strict=True):
                assert mine == theirs


def test_earlier_looks_matter_somewhere() -> None:
    """The case that the stored earlier looks are for does occur, and without them the radius would not come back."""
    split, certificates = certify(TREES["flat"], PLANS["fine"], "tree", "two", 300, seed=5)
    stored = [{"select": c.selection, "estimate": c.counts, "earlier": c.earlier} for c in certificates]
    assert 0 < sum(bool(c.earlier) for c in certificates) < 300
    bare = recompute(TREES["flat"], PLANS["fine"], split, [{**s, "earlier": {}} for s in stored])
    radii = np.array([[c.radius, b.radius] for c, b in zip(certificates, bare, strict=True)])
    assert np.all(radii[:, 1] <= radii[:, 0])
    assert np.any(radii[:, 1] < radii[:, 0])


def _edit(votes: dict, change) -> dict:
    copy = json.loads(json.dumps(votes))
    change(copy)
    return copy


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["estimate"]["router"].__setitem__(0, v["estimate"]["router"][0] + 1),
        lambda v: v["select"]["router"].__setitem__(0, v["select"]["router"][0] + 1),
        lambda v: v["select"].clear(),
        lambda v: v["estimate"].__setitem__("other", [1, 2]),
        lambda v: v["estimate"]["router"].append(0),
        lambda v: v["estimate"]["router"].__setitem__(slice(0, 2), [401, -1]),
        lambda v: v.__setitem__("earlier", {"router@400": v["estimate"]["router"]}),
    ],
)
def test_votes_that_cannot_be(change) -> None:
    split, certificates = certify(TREES["flat"], PLANS["fixed"], "tree", "two", 40, seed=4)
    certificate = next(c for c in certificates if "router" in c.counts)
    votes = {"select": certificate.selection, "estimate": certificate.counts}
    good, bad = recompute(TREES["flat"], PLANS["fixed"], split, [_edit(votes, lambda v: None), _edit(votes, change)])
    assert good == certificate
    assert isinstance(bad, PlanError)
