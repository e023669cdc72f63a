"""Shared votes: the same certificates as without, and nothing drawn twice."""

from __future__ import annotations

import pytest

from rsrouter import AdaptivePlan, CascadeRouter, ExpertPool, FixedPlan, FlatRouter, RoutedSmooth, Smooth
from rsrouter.core.terms import Terms
from rsrouter.sampling import VoteMemo
from tests.helpers.small_router import expert, images, router_module


@pytest.fixture
def setting():
    pool = ExpertPool([expert(0.25), expert(0.5)])
    x, _ = images().batch(range(12))
    flat = RoutedSmooth(pool, FlatRouter(router_module(), sigma=0.5))
    return pool, x, [flat, RoutedSmooth(pool, CascadeRouter((0.6,))), Smooth(pool[0]), Smooth(pool[1])]


@pytest.mark.parametrize("plan", [FixedPlan(50, 1000), AdaptivePlan(1000, (0, 0.25, 0.5), n0=50)])
def test_same_certificates_and_every_vote_once(setting, plan):
    _, x, classifiers = setting
    memo = VoteMemo()
    for smoothed in classifiers:
        alone = smoothed.certify(x, Terms(plan, seed=5))
        smoothed.memo = memo
        assert smoothed.certify(x, Terms(plan, seed=5)) == alone
    # flat and cascade ask the experts about the same images, and the experts alone ask once more
    assert memo.drawn < 0.8 * memo.asked
    before = memo.drawn
    classifiers[0].certify(x, Terms(plan, seed=5))
    assert memo.drawn == before


def test_other_seed_image_network_or_execution_is_another_vote(setting):
    pool, x, _ = setting
    memo, plan = VoteMemo(), FixedPlan(50, 200)
    smoothed = Smooth(pool[0])
    smoothed.memo = memo
    smoothed.certify(x[:2], Terms(plan, seed=5))
    drawn = memo.drawn
    smoothed.certify(x[:2], Terms(plan, seed=6))
    assert memo.drawn == 2 * drawn
    smoothed.certify(x[:2] * 0.5, Terms(plan, seed=5))
    assert memo.drawn == 3 * drawn
    smoothed.certify(x[:2], Terms(plan, seed=5), ids=["a", "b"])
    assert memo.drawn == 4 * drawn
    other = Smooth(expert(0.25, tilt=0.1))
    other.memo = memo
    other.certify(x[:2], Terms(plan, seed=5))
    assert memo.drawn == 5 * drawn


def test_images_that_share_noise_keep_votes_of_their_own(setting):
    pool, x, _ = setting
    smoothed, plan = Smooth(pool[0], noise="gaussian-shared"), FixedPlan(50, 1000)
    alone = smoothed.certify(x, Terms(plan, seed=5))
    assert len({c.predict for c in alone}) > 1
    smoothed.memo = VoteMemo()
    assert smoothed.certify(x, Terms(plan, seed=5)) == alone
    assert smoothed.certify(x, Terms(plan, seed=5)) == alone
