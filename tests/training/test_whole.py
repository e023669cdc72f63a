"""Networks of a deferral router's own: trained for what the chain certifies, stored and loaded, and resumed to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch

from rsrouter import (
    Expert,
    ExpertPool,
    FixedPlan,
    InputError,
    RoutedSmooth,
    Terms,
    build_architecture,
    train_router,
)
from rsrouter.router import DeferralRouter
from rsrouter.router.chain import Voter, bind_chain
from rsrouter.training import DeferralRecipe, ResumeStore, WholeRecipe
from rsrouter.training.heads import HeadGoal
from rsrouter.training.whole import ChainUtility, train_whole, whole_votes

KWARGS = {"channels": (4, 4), "hidden": 8, "size": 8}
RADII = (0.0, 0.25, 0.5)
QUICK = WholeRecipe(steps=60, batch=16, group=4, lr=0.02, cross_entropy=1.0, average=0.8)


def pictures(n, seed):
    """Ten classes by brightness; labels 0 and 1 only."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    return torch.rand((n, 1, 8, 8), generator=generator) * 0.2 + 0.7 * y[:, None, None, None], y


@pytest.fixture(scope="module")
def pool():
    torch.manual_seed(0)
    networks = [build_architecture("small_cnn", 2, KWARGS).eval() for _ in range(2)]
    given = {"input_shape": (1, 8, 8), "num_classes": 2, "mean": (0.5,), "std": (0.3,)}
    return ExpertPool(
        [Expert(n, sigma=sigma, name=name, **given) for n, sigma, name in zip(networks, (0.25, 0.5), "ab", strict=True)]
    )


def test_the_radius_trained_for_is_the_one_certified():
    """With exact probabilities the objective's radius is the chain's certificate."""
    utility = ChainUtility(HeadGoal(0.5, RADII, (1.0, 1.0, 1.0)), WholeRecipe(tau=0.6))
    p = torch.tensor([[0.9, 0.07, 0.03], [0.55, 0.4, 0.05], [0.3, 0.58, 0.12], [0.2, 0.7, 0.1]])
    behind = torch.tensor([0.2, 0.3, 0.1, 0.4])
    normal, z = NormalDist(), NormalDist().inv_cdf
    expected = [
        min(0.5 * (z(0.6) - z(max(row[1], row[2]))), max(0.5 * (z(row[0]) - z(0.6)), b))
        for row, b in zip(p.tolist(), behind.tolist(), strict=True)
    ]
    assert utility.radius(p, torch.zeros(4, dtype=torch.long), behind).tolist() == pytest.approx(expected, abs=1e-5)
    assert expected[3] < 0 < expected[2]  # it answers wrongly; it defers, and the expert behind holds
    assert normal.cdf(0) == 0.5
    alone = ChainUtility(HeadGoal(0.5, RADII, (1.0, 1.0, 1.0)), WholeRecipe(tau=0.0))
    assert alone.radius(p, torch.zeros(4, dtype=torch.long), behind).tolist() == pytest.approx(
        [0.5 * z(q) for q in (0.9, 0.55, 0.3, 0.2)], abs=1e-5
    )


def test_it_learns_and_the_expert_stays(pool):
    x, y = pictures(64, 0)
    new, truth = pictures(40, 1)
    before = pool["b"].digest
    goal = HeadGoal(0.5, RADII, (1.0, 1.0, 1.0))
    module = train_whole(
        pool["b"], x, y, torch.zeros(64), recipe=QUICK, goal=goal, seed=0, log=lambda line: None, store=ResumeStore()
    )
    votes = whole_votes(pool["b"], module, 0.5, new, 20, seed=0, purpose="tune")[0]
    assert (votes.argmax(1) == truth.numpy()).mean() > 0.9
    pool["b"].check_unchanged()
    assert pool["b"].digest == before


def test_a_stopped_training_ends_at_the_same_bits(pool, tmp_path):
    x, y = pictures(32, 0)
    goal, recipe = HeadGoal(0.5, RADII, (1.0, 1.0, 1.0)), replace(QUICK, steps=30)
    given = {"recipe": recipe, "goal": goal, "seed": 0}
    whole = train_whole(pool["b"], x, y, torch.zeros(32), log=lambda line: None, store=ResumeStore(), **given)

    class Stop(Exception):
        pass

    class Stopping(ResumeStore):
        def put(self, key, value, *, small=False):
            super().put(key, value, small=small)
            raise Stop

    with pytest.raises(Stop):
        train_whole(pool["b"], x, y, torch.zeros(32), log=lambda line: None, store=Stopping(tmp_path, every=0.0), **given)
    again = train_whole(pool["b"], x, y, torch.zeros(32), log=lambda line: None, store=ResumeStore(tmp_path, every=0.0), **given)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_router_with_a_network_of_its_own_is_trained_saved_and_loaded(pool, tmp_path):
    x, y = pictures(60, 0)
    recipe = DeferralRecipe(heads=(), whole=(QUICK,), tune_copies=40, levels=(1.2,))
    lines = []
    routed = train_router(pool, "deferral", x, y, radii=RADII, recipe=recipe, plan_n=1000, out=tmp_path / "r", log=lines.append)
    assert any(voter.whole for voter in routed.router.voters), lines  # the experts know nothing
    images = pictures(4, 2)[0]
    terms = Terms(FixedPlan(20, 200), alpha=0.01)
    config = json.loads((tmp_path / "r" / "config.json").read_text())["router"]
    loaded = DeferralRouter.from_config(config)
    loaded.modules.load_state_dict(routed.router.modules.state_dict())
    assert loaded.digest == routed.router.digest
    one, other = routed.certify(images, terms), RoutedSmooth(pool, loaded).certify(images, terms)
    assert [c.radius for c in one] == [c.radius for c in other]
    assert max(c.radius for c in one) > 0


def test_networks_of_ones_own_may_be_offered(pool):
    x, y = pictures(40, 0)
    goal = HeadGoal(0.5, RADII, (1.0, 1.0, 1.0))
    good = train_whole(
        pool["b"], *pictures(64, 3), torch.zeros(64), recipe=QUICK, goal=goal, seed=0, log=lambda line: None, store=ResumeStore()
    )
    recipe = DeferralRecipe(heads=(), tune_copies=30)
    offered = [(Voter("b", sigma, "mine", whole=True), good) for sigma in (0.3, 0.5)]
    routed = train_router(pool, "deferral", x, y, radii=RADII, recipe=recipe, networks=offered, plan_n=1000)
    assert "mine" in {voter.head for voter in routed.router.voters}
    with pytest.raises(InputError, match="told apart"):
        train_router(pool, "deferral", x, y, radii=RADII, recipe=recipe, networks=[(Voter("b"), good)])


@pytest.mark.parametrize("name", ["catrs_0.5", "", "keys", "training", 5])
def test_a_name_that_no_module_can_have_is_refused_before_anything_is_drawn(pool, name):
    own = build_architecture("small_cnn", 2, KWARGS).eval()
    voter = Voter("b", 0.5, name, whole=True)
    with pytest.raises(InputError, match="cannot have this name"):
        DeferralRouter([voter], [], {name: own})
    with pytest.raises(InputError, match="cannot have this name"):
        train_router(pool, "deferral", *pictures(20, 0), radii=RADII, recipe=DeferralRecipe(heads=()), networks=[(voter, own)])


def test_one_network_at_two_noise_levels_and_twice_at_one(pool):
    own = build_architecture("small_cnn", 2, KWARGS).eval()
    voters = [
        Voter("b", 0.5, "own", whole=True),
        Voter("a"),
        Voter("b", 0.5, "own", whole=True),
        Voter("b", 0.3, "own", whole=True),
    ]
    routed = bind_chain(pool, voters, (0.6, 0.6, 0.6), {"own": own})
    assert sorted((m.sigma, len(m.stages)) for m in routed.models) == [(0.25, 1), (0.3, 1), (0.5, 2)]
    other = bind_chain(pool, voters, (0.6, 0.6, 0.6), {"own": build_architecture("small_cnn", 2, KWARGS).eval()})
    assert other.digest != routed.digest
    image = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        for model in routed.models:
            out = model.module(image)
            first = out if torch.is_tensor(out) else out[0]
            wanted = (own if "own" in model.name else pool["a"].module)((image - 0.5) / 0.3)
            assert first == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    "voter",
    [Voter("b", None, None, whole=True), Voter("b", 0.5, "own", ("a",), whole=True), Voter("b", 0.5, "own", grid=2, whole=True)],
)
def test_a_whole_network_reads_no_features(pool, voter):
    with pytest.raises(InputError, match="reads no features"):
        bind_chain(pool, [voter], (), {"own": build_architecture("small_cnn", 2, KWARGS)})


@pytest.mark.parametrize("settings", [{"tau": 0.4}, {"group": 1}, {"steps": 0}])
def test_recipes_that_cannot_be(settings):
    with pytest.raises(InputError, match="cannot be trained like this"):
        WholeRecipe(**settings)
