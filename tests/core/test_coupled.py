"""Stages stop together: none is sampled once it can no longer change the certified cell. And paths are counted first."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from rsrouter.core.bounds import AlphaSplit
from rsrouter.core.certify import CertifyPolicy
from rsrouter.core.errors import PlanError
from rsrouter.core.plans import AdaptivePlan, FixedPlan
from rsrouter.core.tree import MOST_PATHS, Stage, Tree, cascade_tree, expert_stage, flat_tree

N_MAX = 10_000
PLAN = AdaptivePlan(N_MAX, (0.25, 0.5))


def certify(tree, shares, plan=PLAN, seed=0):
    """Runs one image on multinomial votes of the stages' `shares`; the certificate, and estimation votes per network."""
    rng, votes = np.random.default_rng(seed), dict.fromkeys(tree.networks, 0)
    policy = CertifyPolicy(tree, plan, AlphaSplit.even(1e-3, tree.paths), 1)
    while not policy.done.all():
        requests = policy.next_requests([0])
        for request in requests:
            votes[request.network] += request.count * (request.purpose == "estimate")
        names = [{s.name for s in tree.stages.values() if s.network == r.network} for r in requests]
        policy.update(
            requests, [{n: rng.multinomial(r.count, shares[n]) for n in own} for r, own in zip(requests, names, strict=True)]
        )
    return policy.certificate(0), votes


def flat(sigmas=(1.0, 1.0)):
    return flat_tree("router", 1.0, [expert_stage(f"e{k}", sigma, 2) for k, sigma in enumerate(sigmas)])


SURE, TORN = [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]


def test_a_hopeless_expert_stops_its_router_too():
    certificate, votes = certify(flat(), {"router": SURE, "e0": TORN, "e1": SURE})
    assert certificate.radius == 0.0
    assert votes["router"] + votes["e0"] < 0.25 * N_MAX


def test_a_hopeless_router_stops_the_expert_where_the_experts_disagree():
    _, votes = certify(flat(), {"router": TORN, "e0": SURE, "e1": [0.0, 1.0, 0.0]})
    assert max(votes["e0"], votes["e1"]) < 0.2 * N_MAX


def test_an_expert_off_the_path_is_not_sampled_where_the_router_is_sure():
    certificate, votes = certify(flat(), {"router": SURE, "e0": SURE, "e1": SURE})
    assert certificate.radius >= 0.5
    assert votes["e1"] == 0
    assert votes["router"] + votes["e0"] < 0.1 * N_MAX


def test_an_expert_off_the_path_is_sampled_where_it_can_raise_the_cell():
    certificate, votes = certify(flat(), {"router": [0.52, 0.48, 0.0], "e0": SURE, "e1": SURE})
    assert certificate.radius >= 0.5
    assert votes["e1"] > 0


def test_a_later_stage_of_a_cascade_is_not_sampled_where_the_first_decides():
    tree = cascade_tree([expert_stage("e0", 1.0, 2), expert_stage("e1", 0.25, 2)], [0.6])
    certificate, votes = certify(tree, {"e0": SURE, "e1": SURE})
    assert certificate.radius >= 0.5
    assert votes["e1"] == 0


def test_a_fixed_plan_draws_the_path_only_where_nothing_else_can_help():
    _, votes = certify(flat(), {"router": SURE, "e0": SURE, "e1": SURE}, FixedPlan(100, 1000))
    assert votes["router"] == votes["e0"] == 1000


def layers(count, width):
    """`count` layers of `width` stages, each leading to every stage of the next."""
    stages = []
    for layer in range(count):
        below = [f"{layer + 1}.{k}" for k in range(width)] if layer + 1 < count else [0, 1]
        stages += [Stage(f"{layer}.{k}", 1.0, leads_to=(*below, 0)) for k in range(width if layer else 1)]
    return Tree.of(stages)


@pytest.mark.parametrize(("count", "width"), [(1, 2), (2, 3), (4, 2), (5, 3)])
def test_every_path_is_listed_once(count, width):
    tree = layers(count, width)
    assert len(tree.paths) == len(set(tree.paths)) == width ** (count - 1)
    assert {len(path) for path in tree.paths} == {count}
    assert all(b in tree.stages[a].children for path in tree.paths for a, b in pairwise(path))


def test_a_graph_with_too_many_paths_is_refused_before_they_are_listed():
    with pytest.raises(PlanError, match="too many paths") as refused:
        _ = layers(60, 2).paths
    assert f"{MOST_PATHS:,}" in refused.value.expected
    assert f"{2**59:,}" in refused.value.received
