"""Votes that are simulated from few: what they promise at radii that only nearly unanimous votes reach."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp

from rsrouter.core.posterior import SHAPES, dissent_shape, posterior_shares
from rsrouter.training.chains import accuracy, chain_radius, expert_radius
from rsrouter.training.simulated import SimulatedVotes, shared_levels

SIGMA, PLAN, FAR = 0.66, 100_000, 2.0


def shares(a: float, b: float, rng: np.random.Generator, count: int = 1000) -> np.ndarray:
    """`(N, 10)`: the true class first, dissent from Beta(a, b) spread over the others."""
    dissent = rng.beta(a, b, count)
    return np.column_stack([1 - dissent, dissent[:, None] * rng.dirichlet(np.full(9, 0.3), count)])


def drawn(each: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.multinomial(n, row) for row in each])


def far(votes: SimulatedVotes) -> float:
    """Share of images that one expert certifies at the far radius."""
    return float(accuracy(*expert_radius(votes, 1e-3), np.zeros(len(votes.counts), dtype=np.int64), (FAR,))[0])


@pytest.mark.parametrize(("a", "b", "n"), [(0.05, 3.0, 100), (0.2, 5.0, 100), (0.4, 5.0, 400), (0.7, 8.0, 400)])
def test_few_votes_promise_what_many_hold(a: float, b: float, n: int) -> None:
    promised, held, shape = [], [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        each = shares(a, b, rng)
        held.append(far(SimulatedVotes(drawn(each, PLAN, rng), drawn(each, 100, rng), PLAN, 100, SIGMA)))
        few = drawn(each, n, rng)
        shape.append(dissent_shape(few))
        promised.append(far(SimulatedVotes.draw(few, SIGMA, PLAN, 100, rng)))
    # four standard errors of the mean; a fixed prior of .02 an outcome is off by .03 to .18 here, but for a = .2
    assert np.mean(promised) == pytest.approx(np.mean(held), abs=max(0.012, 4 * np.std(np.subtract(promised, held)) / 8**0.5))
    assert np.mean(shape) == pytest.approx(a, rel=0.25)


def test_the_shape_stays_within_its_range() -> None:
    unanimous = np.array([[50, 0, 0]] * 20)
    assert dissent_shape(unanimous) == SHAPES[0]
    assert dissent_shape(np.array([[30, 20, 0]] * 20)) == SHAPES[0]  # nobody is sure
    assert dissent_shape(np.array([[47, 2, 1]] * 20)) == pytest.approx(SHAPES[1], rel=1e-3)


def test_a_voter_that_is_always_sure_stays_so() -> None:
    rng = np.random.default_rng(0)
    assert far(SimulatedVotes.draw(np.array([[400, *[0] * 9]] * 200), SIGMA, PLAN, 100, rng)) > 0.98


def test_an_image_without_votes_is_no_reason_to_stop() -> None:
    """A network that answers NaN for an image has no votes there: the image is not certified, and says nothing of dissent."""
    rng = np.random.default_rng(0)
    votes = np.array([[0] * 10] * 5 + [[90, *[0] * 9]] * 20)
    assert dissent_shape(votes) == SHAPES[0]
    assert dissent_shape(votes[:5]) == SHAPES[0]
    for levels in (None, shared_levels(25, 10, rng)):
        drawn_votes = SimulatedVotes.draw(votes, SIGMA, PLAN, 100, rng, 10, levels)
        assert drawn_votes.counts.sum(1).tolist() == [0] * 5 + [PLAN] * 20
        radius = expert_radius(drawn_votes, 1e-3)[1]
        assert not radius[:5].any()
        assert np.all(radius[5:] > 1.0)


def test_levels_do_not_change_the_law() -> None:
    rng = np.random.default_rng(3)
    votes = np.tile([97, 2, 1, 0], (4000, 1))
    free = posterior_shares(votes, rng, 0.1)
    tied = posterior_shares(votes, rng, 0.1, levels=rng.random((4000, 6)))
    assert tied.sum(1) == pytest.approx(1.0)
    for outcome in range(4):
        assert ks_2samp(free[:, outcome], tied[:, outcome]).pvalue > 1e-4


def test_stages_that_read_the_same_votes_are_sure_of_the_same_images() -> None:
    """A chain is as sure as its surest stage: three draws from the posterior of the same votes would promise the luckiest."""
    rng = np.random.default_rng(0)
    few, labels = drawn(shares(0.3, 5.0, rng), 200, rng), np.zeros(1000, dtype=np.int64)
    levels, chain = shared_levels(1000, 10, rng), (("a", 0.505), ("b", 0.53), ("c", None))
    tied = {k: SimulatedVotes.draw(few, SIGMA, PLAN, 100, rng, levels=levels) for k in "abc"}
    free = {k: SimulatedVotes.draw(few, SIGMA, PLAN, 100, rng) for k in "abc"}
    spread = [np.abs(v["a"].counts[:, 0] - v["b"].counts[:, 0]) / PLAN for v in (tied, free)]
    assert np.quantile(spread[0], 0.99) < 0.01  # 100,000 votes differ by chance
    assert np.quantile(spread[1], 0.5) > np.quantile(spread[0], 0.9)
    reached = [accuracy(*chain_radius(voters, chain, 1e-3), labels, (FAR,))[0] for voters in (tied, free)]
    assert reached[1] > reached[0] + 0.008
