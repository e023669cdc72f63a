"""Certificates from sampled votes against the known true radius: violations at most alpha, planted mistakes caught."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from rsrouter.core import AdaptivePlan, AlphaSplit, CertifyPolicy, FixedPlan, Plan, Stage, Tree, cascade_tree, expert_stage

ALPHA = 0.05
SHAPE = (3, 32, 32)


def unit_image() -> np.ndarray:
    u = np.random.default_rng(11).normal(size=SHAPE).astype(np.float32)
    return u / np.linalg.norm(u)


class HalfSpaces:
    """Streams of votes of linear base models: outcome 0 where `<u, x + noise> < offset`, else 1 (x at 0).

    `full` draws the noise of every vote in 3 x 32 x 32; otherwise its projection on u, which has the same law.
    """

    def __init__(self, tree: Tree, offsets: dict[str, float], images: int, seed: int, *, full: bool = False) -> None:
        self.tree, self.offsets, self.images, self.full = tree, offsets, images, full
        self.rng = np.random.default_rng(seed)
        self.u = unit_image().ravel()
        self.streams: dict[tuple[str, str], np.ndarray] = {}

    def projections(self, count: int, sigma: float) -> np.ndarray:
        if not self.full:
            return self.rng.normal(0.0, sigma, count)
        parts = [
            self.rng.standard_normal((min(4096, count - at), self.u.size), dtype=np.float32) @ self.u
            for at in range(0, count, 4096)
        ]
        return sigma * np.concatenate(parts)

    def stream(self, purpose: str, name: str, length: int) -> np.ndarray:
        """`(images, length)`: the vote at every position of every image's stream."""
        if (purpose, name) not in self.streams:
            stage = self.tree.stages[name]
            z = self.projections(self.images * length, stage.sigma).reshape(self.images, length)
            self.streams[purpose, name] = (z >= self.offsets[name]).astype(np.int8)
        return self.streams[purpose, name]


def run(
    votes: HalfSpaces,
    plan: Plan,
    *,
    sides: str = "one",
    purpose_of: Callable[[str], str] = str,
    tamper: Callable[[CertifyPolicy], None] | None = None,
) -> np.ndarray:
    """Certified radii of all images."""
    policy = CertifyPolicy(votes.tree, plan, AlphaSplit.even(ALPHA, votes.tree.paths), votes.images, sides=sides)
    if tamper is not None:
        tamper(policy)
    length = {"select": plan.n0, "estimate": max(plan.n_max, plan.n0)}
    while not policy.done.all():
        requests = policy.next_requests(np.flatnonzero(~policy.done).tolist())
        answers = []
        for r in requests:
            purpose = purpose_of(r.purpose)
            ones = int(votes.stream(purpose, r.network, length[purpose])[r.image, r.start : r.start + r.count].sum())
            row = np.zeros(votes.tree.stages[r.network].num_outcomes, dtype=np.int64)
            row[:2] = r.count - ones, ones
            answers.append({r.network: row})
        policy.update(requests, answers)
    return np.array([policy.certificate(i).radius for i in range(votes.images)])


def tied_vote() -> tuple[Tree, dict[str, float]]:
    """One expert, x on its decision boundary: the true radius is 0."""
    return Tree.of([Stage("e", 0.5, leads_to=(0, 1))]), {"e": 0.0}


def agreement(radius: float) -> tuple[Tree, dict[str, float]]:
    """Router and second expert change at the same distance, where the answer does: both bounds must hold."""
    tree = Tree.of(
        [
            Stage("r", 1.0, leads_to=("a", "b")),
            Stage("a", 0.5, leads_to=(0, 1)),
            Stage("b", 0.5, leads_to=(0, 1)),
        ]
    )
    return tree, {"r": radius, "a": 10.0, "b": radius}


def cascade(radius: float) -> tuple[Tree, dict[str, float]]:
    """A threshold stage that defers at `radius`, to an expert that changes its answer at the same distance."""
    from scipy.special import ndtri

    tree = cascade_tree([expert_stage("t", 1.0, 2), expert_stage("b", 0.5, 2)], (0.6,))
    # outcome 0 has probability Phi((offset - s) / sigma); it reaches 0.6 up to s = offset - sigma * Phi^-1(0.6)
    return tree, {"t": radius + 1.0 * float(ndtri(0.6)), "b": radius}


def excess(violations: int, total: int) -> float:
    """p-value of "fails more often than alpha"."""
    return float(stats.binom.sf(violations - 1, total, ALPHA))


CASES = {
    "tied vote": (tied_vote, 0.0),
    "agreement": (lambda: agreement(0.4), 0.4),
    "cascade": (lambda: cascade(0.4), 0.4),
}
PLANS = {
    "fixed": FixedPlan(60, 200),
    "adaptive": AdaptivePlan(800, [0.1, 0.2, 0.3, 0.4], n0=60, first=50),
    "mixture": AdaptivePlan(400, [0.1, 0.2, 0.3, 0.4], n0=60, first=50, bound="mixture"),
}


@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", CASES)
def test_violations_stay_below_alpha(case: str, plan: str, sides: str):
    make, true_radius = CASES[case]
    radii = run(HalfSpaces(*make(), 2000, seed=1), PLANS[plan], sides=sides)
    wrong = int((radii > true_radius).sum())
    assert excess(wrong, len(radii)) > 1e-4, f"{wrong} of {len(radii)} radii are too large"


def test_the_instances_are_tight():
    """The fixed plan fails nearly as often as it may: so the tests above can see a mistake."""
    tree, offsets = agreement(0.4)
    radii = run(HalfSpaces(tree, offsets, 4000, seed=2), FixedPlan(60, 200))
    assert 0.5 * ALPHA < np.mean(radii > 0.4) < 1.2 * ALPHA
    assert np.mean((radii > 0.2) & (radii <= 0.4)) > 0.5  # near the true radius


class PeekedPlan(AdaptivePlan):
    """Planted: the whole alpha at every look."""

    @property
    def shares(self) -> tuple[float, ...]:
        return (1.0,) * len(self.looks)


class _Split:
    """Planted: a split nobody checked."""

    def __init__(self, split: AlphaSplit) -> None:
        self.stages, self.lower_share = dict.fromkeys(split.stages, split.total), split.lower_share


def spend_twice(policy: CertifyPolicy) -> None:
    policy.split = _Split(policy.split)


def same_stream(_: str) -> str:
    return "estimate"


MISTAKES = ["peeked", "top class from the estimation votes", "selection votes reused", "alpha spent twice"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake: str):
    if mistake == "peeked":
        votes = HalfSpaces(*tied_vote(), 2000, seed=3)
        radii, true_radius = run(votes, PeekedPlan(3200, [0.5], n0=60, first=25, growth=1.5, spending="even")), 0.0
    elif mistake == "top class from the estimation votes":
        radii, true_radius = run(HalfSpaces(*tied_vote(), 2000, seed=4), FixedPlan(200, 200), purpose_of=same_stream), 0.0
    elif mistake == "selection votes reused":
        radii, true_radius = run(HalfSpaces(*tied_vote(), 2000, seed=5), FixedPlan(150, 200), purpose_of=same_stream), 0.0
    else:
        radii, true_radius = run(HalfSpaces(*agreement(0.4), 2000, seed=6), FixedPlan(60, 200), tamper=spend_twice), 0.4
    assert excess(int((radii > true_radius).sum()), len(radii)) < 1e-5


FEWER_VOTES = {
    "fixed": FixedPlan(60, 200),
    "adaptive": AdaptivePlan(400, [0.1, 0.2, 0.3, 0.4], n0=60, first=50),
    "mixture": AdaptivePlan(200, [0.1, 0.2, 0.3, 0.4], n0=60, first=25, bound="mixture"),
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", FEWER_VOTES)
@pytest.mark.parametrize("case", CASES)
def test_violations_stay_below_alpha_in_image_space(case: str, plan: str):
    """The same with every vote's noise drawn in 3 x 32 x 32."""
    make, true_radius = CASES[case]
    radii = run(HalfSpaces(*make(), 2000, seed=8, full=True), FEWER_VOTES[plan])
    wrong = int((radii > true_radius).sum())
    near = int(((radii > 0.5 * true_radius) & (radii <= 1.5 * true_radius)).sum())
    print(
        f"\n{case}, {plan}: {wrong} of {len(radii)} too large ({wrong / len(radii):.2%}, alpha {ALPHA:.0%}), "
        f"{near} within half of the true radius {true_radius}, mean {radii.mean():.3f}"
    )
    assert excess(wrong, len(radii)) > 1e-4
