"""A transfer's certificates against the truth of the other network, at alpha = 0.1, and the mistakes that this must see."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special
from scipy.stats import binom

from rsrouter.core import AlphaSplit, FixedPlan, PlanError, Stage, Tree
from rsrouter.core.recompute import Moved, recompute, recompute_all
from rsrouter.core.tree import expert_stage

#: The other network votes like the first, but for this share of copies, all of which it takes from the class.
P, APART, SIGMA = 0.9, 0.06, 0.5
PLAN, ALPHA, PAIRS = FixedPlan(30, 400), 0.05, 300
TREE = Tree.of([expert_stage("one", SIGMA, 2)])


def rows(rng: np.random.Generator, count: int, apart: np.ndarray, offset: int = 0) -> list[dict]:
    """Votes of the first network and disagreements; `offset` shifts by how many images the latter are taken from elsewhere."""
    votes = rng.binomial(PLAN.n, P, count)
    moved = np.roll(rng.binomial(PAIRS, apart), offset)
    return [
        {"select": {"one": [30, 0, 0]}, "estimate": {"one": [int(v), PLAN.n - int(v), 0]}, "moved": {"one": [int(d), PAIRS]}}
        for v, d in zip(votes, moved, strict=True)
    ]


def failures(votes: list[dict], apart: np.ndarray, split: Moved, lose: float = 1.0) -> int:
    """Certificates above the true radius of the other network, among images with `apart > 0`."""
    found = recompute_all(TREE, PLAN, AlphaSplit.even(ALPHA, TREE.paths), votes, sides="one", moved=split)
    assert not found.faults
    true = SIGMA * special.ndtri(P - apart)
    return int((found.radius[apart > 0] > true[apart > 0]).sum())


SPLIT = Moved(AlphaSplit.even(ALPHA, TREE.paths), PAIRS)


def test_a_transfer_fails_at_most_as_often_as_both_alphas():
    rng, apart = np.random.default_rng(0), np.full(2000, APART)
    above = failures(rows(rng, 2000, apart), apart, SPLIT)
    assert binom.sf(above - 1, 2000, 2 * ALPHA) > 1e-4
    assert above > 0  # near the boundary, or this tests nothing


def test_a_bound_of_another_image_reused_is_seen():
    """Every other image has no disagreement at all: its bound, used for its neighbour, is wrong nearly always."""
    rng, apart = np.random.default_rng(1), np.tile([APART, 0.0], 500)
    assert failures(rows(rng, 1000, apart), apart, SPLIT) <= 0.2 * 500
    assert binom.sf(failures(rows(rng, 1000, apart, offset=1), apart, SPLIT) - 1, 500, 2 * ALPHA) < 1e-6


def test_no_disagreement_costs_little_and_no_pairs_cost_everything():
    votes = {"select": {"one": [30, 0, 0]}, "estimate": {"one": [400, 0, 0]}}
    split = AlphaSplit.even(ALPHA, TREE.paths)
    before = recompute(TREE, PLAN, split, [votes], sides="one")[0]
    after, none = (
        recompute(TREE, PLAN, split, [{**votes, "moved": m}], sides="one", moved=SPLIT)[0] for m in ({"one": [0, PAIRS]}, {})
    )
    assert 0.7 * before.radius < after.radius < before.radius
    assert none.radius == 0.0


@pytest.mark.parametrize("pair", [[1], [-1, PAIRS], [2, PAIRS - 1], [PAIRS + 1, PAIRS], [0.0, PAIRS], [1, 2, 3]])
def test_disagreements_that_cannot_be_are_refused(pair):
    votes = {"select": {"one": [30, 0, 0]}, "estimate": {"one": [400, 0, 0]}, "moved": {"one": pair}}
    split = AlphaSplit.even(ALPHA, TREE.paths)
    (found,) = recompute(TREE, PLAN, split, [votes], sides="one", moved=SPLIT)
    assert isinstance(found, PlanError)
    (found,) = recompute(TREE, PLAN, split, [votes], sides="one")
    assert isinstance(found, PlanError)


def test_a_deterministic_stage_does_not_move():
    gate = Stage("gate", 0.0, leads_to=("one", 0, -1), lipschitz=1.0)
    tree = Tree.of([gate, expert_stage("one", SIGMA, 2)])
    votes = {"select": {"one": [30, 0, 0]}, "estimate": {}, "logits": {"gate": [0.0, 3.0]}}
    split = AlphaSplit.even(ALPHA, tree.paths)
    (found,) = recompute(tree, PLAN, split, [{**votes, "select": {}}], moved=Moved(split, PAIRS))
    assert found.radius == pytest.approx(3.0 / np.sqrt(2.0))
