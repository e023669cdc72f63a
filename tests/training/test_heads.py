"""Heads trained for the radii they are to certify."""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch

from rsrouter import FlatRouter, InputError, RoutedSmooth
from rsrouter.demo import load_pool
from rsrouter.experts import build_architecture
from rsrouter.training.flat import RECIPES
from rsrouter.training.heads import HeadGoal, HeadRecipe, train_head
from rsrouter.training.losses import RadiusUtility, named_radius, radius_weights

RADII = (0.0, 0.5, 1.0, 1.5)
QUICK = HeadRecipe(hidden=16, steps=400, batch=64, lr=0.05, cross_entropy=0.03)


def features(n=200, copies=12, seed=0):
    """Two classes on a line under noise: odd images far from the border, even ones near it; logits say class 0 of everything."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=n)
    place = np.where(np.arange(n) % 2, 2.5, 0.4) * (2 * labels - 1)
    seen = place[:, None] + rng.standard_normal((n, copies))
    x = np.stack([seen, seen**2, np.ones_like(seen), np.zeros_like(seen)], 2)
    return torch.from_numpy(x).half(), torch.from_numpy(labels)


def test_utility_counts_the_radii_a_probability_certifies():
    normal = NormalDist()
    utility = RadiusUtility(2.0, (0.0, 1.0, 3.0), (1.0, 2.0, 1.0), 1e-4, 0.0)
    p = torch.tensor([0.4, normal.cdf(0.4), normal.cdf(0.6), normal.cdf(1.4), normal.cdf(1.6), 1.0])
    assert utility(p).tolist() == pytest.approx([0.0, 0.25, 0.75, 0.75, 1.0, 1.0], abs=1e-6)


def test_utility_has_its_middle_past_the_radius_and_rises():
    utility = RadiusUtility(0.5, (1.0,), (3.0,), 0.2, 0.04)
    at = torch.tensor([NormalDist().cdf(1.04 / 0.5)])
    assert utility(at).item() == pytest.approx(0.5, abs=1e-5)
    values = utility(torch.linspace(0.01, 0.999, 200))
    assert torch.all(values[1:] > values[:-1])


def test_utility_has_a_finite_gradient_where_every_copy_agrees():
    p = torch.tensor([0.0, 1.0, 0.7], requires_grad=True)
    RadiusUtility(1.0, RADII, (1.0,) * 4, 0.2, 0.04)(p).sum().backward()
    assert torch.isfinite(p.grad).all()
    assert p.grad[2] > 0


def test_radius_weights():
    assert radius_weights((0.8, 0.4, 0.0), (0.0, 1.0, 2.0), 1.0) == (1.25, 2.5, 0.0)
    assert radius_weights((0.5, 0.5, 0.5), (0.0, 0.25, 2.0), 3.0) == (6.0, 4.0, 2.0)
    assert radius_weights((0.0, 0.0), (0.0, 2.0), 1.0) == (1.0, 1.0)


def certified(head, x, labels, sigma):
    """Share of images whose mean vote for the true class reaches each radius, without confidence bounds."""
    with torch.no_grad():
        votes = head(x.float().flatten(0, 1)).argmax(-1).view(x.shape[:2])
    share = (votes == labels[:, None]).float().mean(1).double().clamp(1e-3, 1 - 1e-3)
    radius = sigma * torch.special.ndtri(share)
    return np.array([(radius > r).double().mean() for r in RADII])


def test_a_head_certifies_what_it_is_trained_for():
    x, labels = features()
    new, truth = features(seed=1, copies=300)
    goal = HeadGoal(1.0, RADII, (1.0, 0.5, 0.5, 0.5))
    weights = radius_weights(goal.envelope, RADII, 1.0)

    def worth(recipe):
        head = train_head(x, labels, 2, recipe=recipe, goal=goal, seed=0)
        return float(np.average(certified(head, new, truth, 1.0), weights=weights))

    # the best border for these radii gives up half of the images near it; cross-entropy keeps them, and holds less far
    plain = worth(replace(QUICK, objective="consistency", consistency=0.0, entropy=0.0))
    assert worth(QUICK) > plain + 0.02
    assert certified(lambda z: z[:, -2:], new, truth, 1.0).max() < 0.6


def test_heads_are_told_apart_by_their_labels():
    assert HeadRecipe().label == "u0_1"
    assert HeadRecipe(tilt=3.0).label == "u0_1t3"
    assert HeadRecipe("consistency", consistency=2.5).label == "c2_5"


def test_same_seed_same_head_other_tilt_other_head():
    x, labels = features()
    goal = HeadGoal(1.0, RADII, (1.0, 0.5, 0.5, 0.5))
    few = replace(QUICK, steps=20)
    once, again = (train_head(x, labels, 2, recipe=few, goal=goal, seed=0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), again.state_dict().values()))
    tilted = train_head(x, labels, 2, recipe=replace(few, tilt=3.0), goal=goal, seed=0)
    assert not torch.equal(tilted.layers[0].weight, once.layers[0].weight)


@pytest.mark.parametrize(
    ("recipe", "goal", "copies"),
    [
        (HeadRecipe("radius"), None, 4),
        (HeadRecipe(), None, 4),
        (HeadRecipe(), HeadGoal(1.0, (0.0,), (1.0,)), 4),
        (HeadRecipe(), HeadGoal(1.0, RADII, (1.0,) * 4), 1),
    ],
)
def test_what_cannot_be_trained_is_refused(recipe, goal, copies):
    x, labels = features(n=10, copies=copies)
    with pytest.raises(InputError) as error:
        train_head(x, labels, 2, recipe=recipe, goal=goal, seed=0)
    assert error.value.expected
    assert error.value.remedy


def test_a_network_built_with_tuples_is_the_same_after_saving(tmp_path):
    pool = load_pool()
    network = build_architecture("small_resnet", len(pool), {"width": 4, "blocks": ((8, 2), (8, 1))})
    RoutedSmooth(pool, FlatRouter(network, sigma=1.0)).save_pretrained(tmp_path / "router")
    again = RoutedSmooth.from_pretrained(tmp_path / "router").router.module
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(again.eval()(x), network.eval()(x))


def test_the_regulariser_counts_as_much_as_the_radius_it_protects():
    # experts in the order of the logits: sigma 1, 0.25, 0.5
    order = torch.tensor([2, 0, 1])
    radius = torch.tensor([[1.0, 0.2, 0.4], [0.0, 0.7, 0.9], [2.0, 0.5, 0.6]])
    copies = [torch.eye(3)[[0, 1, 2]], torch.eye(3)[[2, 1, 1]]]
    assert named_radius(copies, radius, order, "strong").tolist() == pytest.approx([1.0, 0.7, 0.6])
    assert named_radius(copies, radius, order, "weak").tolist() == pytest.approx([0.4, 0.7, 0.5])
    assert RECIPES["dual-rs"].radius_weight == "strong"
