"""The public contract, on small networks: certify, predict, label, train, save and load."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

import rsrouter
from rsrouter import (
    AdaptivePlan,
    CascadeRouter,
    Expert,
    ExpertPool,
    FixedPlan,
    FlatRouter,
    InputError,
    NetworkError,
    RoutedSmooth,
    RSRouterError,
    Smooth,
    label_images,
)
from rsrouter.clock import BAR
from rsrouter.core import binom_lower, vote_radius
from rsrouter.core.terms import Terms
from rsrouter.core.tree import Tree, expert_stage
from rsrouter.experts.places import ASSETS
from rsrouter.router.base import Routed
from rsrouter.sampling import Execution, VoteModel

SHAPE = (1, 6, 6)


def linear(classes=3, seed=0, scale=1.0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, classes))
    with torch.no_grad():
        net[1].weight.mul_(scale)
    return net


def expert(sigma, seed=0, **changes):
    return Expert(linear(seed=seed, scale=8.0), **{"sigma": sigma, "num_classes": 3, "input_shape": SHAPE, **changes})


@pytest.fixture(scope="module")
def pool():
    return ExpertPool([expert(1.0, 2), expert(0.25, 0), expert(0.5, 1)])


@pytest.fixture(scope="module")
def routed(pool):
    return RoutedSmooth(pool, FlatRouter(linear(seed=5, scale=4.0), sigma=1.0))


@pytest.fixture(scope="module")
def images():
    return torch.rand((6, *SHAPE), generator=torch.Generator().manual_seed(3))


def test_every_public_name_can_be_imported():
    for name in rsrouter.__all__:
        assert getattr(rsrouter, name) is not None
    with pytest.raises(AttributeError):
        _ = rsrouter.no_such_name


@pytest.mark.parametrize("module", ["rsrouter", "rsrouter.core"])
def test_import_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pool_is_ordered_by_sigma_and_name(pool):
    assert pool.names == ("sigma_0.25", "sigma_0.5", "sigma_1")
    assert pool.sigmas == (0.25, 0.5, 1.0)


def test_smooth_is_cohens_certify(images):
    one = Smooth(expert(0.5))
    for certificate in one.certify(images, Terms(FixedPlan(100, 1000), alpha=0.001)):
        votes = np.array(certificate.counts["sigma_0.5"])
        top = int(np.argmax(certificate.selection["sigma_0.5"]))
        lower = float(binom_lower(votes[top], 1000, 0.001))
        assert votes.sum() == 1000
        assert certificate.n_drawn == 1100
        assert certificate.radius == (float(vote_radius(0.5, lower)) if lower > 0.5 else 0.0)
        assert certificate.predict == (top if lower > 0.5 else rsrouter.ABSTAIN)


@pytest.mark.parametrize("plan", [FixedPlan(100, 1000), AdaptivePlan(1000, [0, 0.25, 0.5])], ids=["fixed", "adaptive"])
def test_certificates_do_not_depend_on_grouping(routed, images, plan):
    base = routed.certify(images, plan, ids=range(6))
    assert any(c.radius > 0 for c in base)
    for batch_size in (64, 250, 1000):
        assert routed.certify(images, plan, ids=range(6), batch_size=batch_size) == base
    order = [4, 0, 5, 2, 1, 3]
    shuffled = routed.certify(images[order], plan, ids=order)
    assert shuffled == [base[i] for i in order]
    assert [routed.certify(images[i : i + 1], plan, ids=[i])[0] for i in range(6)] == base


def test_tree_rule_is_never_below_the_min_rule_and_draws_at_least_as_much(routed, images):
    plan = FixedPlan(100, 2000)
    tree, least = (routed.certify(images, Terms(plan, rule=r, seed=7)) for r in ("tree", "min"))
    for a, b in zip(tree, least, strict=True):
        assert a.radius >= b.radius
        assert a.n_drawn >= b.n_drawn
        assert b.radius == pytest.approx(min(b.r_router, b.r_expert), abs=1e-12) or b.predict == -1
        assert set(b.counts) <= {"router", b.expert}


def test_labels_never_reach_certify():
    for method in (Smooth.certify, RoutedSmooth.certify):
        assert not {"label", "labels", "y", "target"} & set(
            method.__code__.co_varnames[: method.__code__.co_argcount + method.__code__.co_kwonlyargcount]
        )


def test_predict(routed, images):
    answers = routed.predict(images, n=500)
    assert answers.dtype == np.int64
    assert answers.shape == (6,)
    certified = routed.certify(images, FixedPlan(100, 2000))
    clear = [i for i, c in enumerate(certified) if c.radius > 0.0]
    assert clear
    assert all(answers[i] in (certified[i].predict, -1) for i in clear)
    assert (routed.predict(images, n=500, seed=1) == routed.predict(images, n=500, seed=1)).all()


def test_predict_prepares_networks_once_and_notices_a_change(images, monkeypatch):
    prepared = []
    original = rsrouter.sampling.engine.prepare
    monkeypatch.setattr(rsrouter.sampling.engine, "prepare", lambda *a: prepared.append(1) or original(*a))
    one = expert(0.5)
    smooth = Smooth(one)
    first = smooth.predict(images, n=200, seed=1)
    smooth.predict(images, n=200)
    assert smooth.predict(images, n=200, seed=1).tolist() == first.tolist() == Smooth(one).predict(images, n=200, seed=1).tolist()
    assert len(prepared) == 2
    assert pickle.loads(pickle.dumps(smooth)).predict(images, n=200, seed=1).tolist() == first.tolist()
    with torch.no_grad():
        one.module[1].bias.fill_(float("nan"))
    with pytest.raises(NetworkError, match="changed after it was bound"):
        smooth.predict(images, n=200, seed=1)


def test_cascade_needs_no_training(pool, images):
    routed = RoutedSmooth(pool, CascadeRouter((0.55, 0.55)))
    certificates = routed.certify(images, FixedPlan(100, 1000))
    assert any(c.radius > 0 for c in certificates)
    assert routed.tree.root == "sigma_1"


def test_an_expert_that_always_says_nan_is_never_certified(images):
    class NaN(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), float("nan"))

    for certificate in Smooth(expert(0.5).__class__(NaN(), sigma=0.5, num_classes=3, input_shape=SHAPE)).certify(
        images, FixedPlan(10, 100)
    ):
        assert (certificate.predict, certificate.radius) == (-1, 0.0)


def test_label_images(pool, images):
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    radius, predict = label_images(pool, images, labels, n=100)
    assert radius.shape == predict.shape == (6, 3)
    assert (radius[predict != labels[:, None].numpy()] == 0).all()
    again, _ = label_images(pool, images[:2], labels[:2], n=100)
    assert (again == radius[:2]).all()


def test_save_and_load_give_the_same_certificates(routed, images, tmp_path):
    routed.save_pretrained(tmp_path / "router")
    loaded = RoutedSmooth.from_pretrained(tmp_path / "router")
    plan = FixedPlan(50, 300)
    assert loaded.certify(images, plan) == routed.certify(images, plan)
    assert loaded.digest == routed.digest


BAD_IMAGES = {
    "nan": (torch.full((1, *SHAPE), float("nan")), "finite"),
    "inf": (torch.full((1, *SHAPE), float("inf")), "finite"),
    "0..255": (torch.full((1, *SHAPE), 255.0), "finite"),
    "negative": (torch.full((1, *SHAPE), -0.1), "finite"),
    "bytes": (torch.zeros((1, *SHAPE), dtype=torch.uint8), "floats"),
    "no batch": (torch.zeros(SHAPE), "shape"),
    "channels": (torch.zeros((1, 3, 6, 6)), "shape"),
    "array": (np.zeros((1, *SHAPE), dtype=np.float32), "tensor"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_get_a_typed_error(routed, kind):
    images, words = BAD_IMAGES[kind]
    for call in (lambda: routed.certify(images, FixedPlan(10, 100)), lambda: routed.predict(images, n=100)):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert caught.value.expected
        assert caught.value.received
        assert caught.value.remedy


def test_other_bad_input(routed, pool, images):
    plan = FixedPlan(10, 100)
    with pytest.raises(InputError, match="device"):
        routed.certify(images, plan, device="warp")
    with pytest.raises(InputError, match="one id per image"):
        routed.certify(images, plan, ids=[1, 2])
    with pytest.raises(InputError, match="batch_size"):
        routed.certify(images, plan, batch_size=0)
    with pytest.raises(RSRouterError, match="rule"):
        routed.certify(images, Terms(plan, rule="max"))
    with pytest.raises(RSRouterError, match="alpha"):
        routed.certify(images, Terms(plan, alpha=0.0))
    with pytest.raises(RSRouterError, match="radius 9"):
        routed.certify(images, AdaptivePlan(1000, [9.0]))
    with pytest.raises(InputError, match="do not fit the pool"):
        RoutedSmooth(pool, FlatRouter(linear(), sigma=1.0, experts=["sigma_0.25", "nobody", "sigma_1"]))
    with pytest.raises(NetworkError, match="wrong shape"):
        RoutedSmooth(pool, FlatRouter(linear(classes=2), sigma=1.0)).certify(images, plan)
    with pytest.raises(InputError, match="thresholds"):
        RoutedSmooth(pool, CascadeRouter((0.55,)))
    with pytest.raises(InputError, match="/255"):
        expert(64.0)


def test_empty_input(routed):
    assert routed.certify(torch.zeros((0, *SHAPE)), FixedPlan(10, 100)) == []
    assert routed.predict(torch.zeros((0, *SHAPE)), n=100).shape == (0,)


def test_wrong_types_get_typed_errors_too(routed, images):
    for alpha in ("x", [0.1, "b"], None):
        with pytest.raises(RSRouterError, match="alpha"):
            routed.certify(images, Terms(FixedPlan(10, 100), alpha=alpha))
    with pytest.raises(RSRouterError, match="radii"):
        AdaptivePlan(1000, None)
    with pytest.raises(InputError, match="one id per image"):
        routed.certify(images, FixedPlan(10, 100), ids=3)
    with pytest.raises(RSRouterError):
        CascadeRouter(0.6)


@pytest.mark.parametrize(("sigma", "stages", "width"), [(0.25, ("s",), 3), (1.0, ("s",), 2), (1.0, ("t",), 3)])
def test_a_router_whose_networks_are_not_those_of_its_stages_is_refused(sigma, stages, width):
    tree = Tree.of([expert_stage("s", 1.0, 3)])
    with pytest.raises(InputError, match="do not fit its stages"):
        Routed(tree, (VoteModel("s", linear(), sigma, stages, (width,), "digest"),))
    Routed(tree, (VoteModel("s", linear(), 1.0, ("s",), (3,), "digest"),))


def test_the_device_of_a_loaded_router() -> None:
    folder = ASSETS / "router"
    assert RoutedSmooth.from_pretrained(folder).device is None
    loaded = RoutedSmooth.from_pretrained(folder, device="cpu")
    assert loaded.device == "cpu"
    assert loaded.with_execution(Execution(batch=7)).device == "cpu"
    with pytest.raises(InputError, match="device"):
        RoutedSmooth.from_pretrained(folder, device="nowhere")
    loaded.device = "nowhere"  # it is the one that is asked, unless a call names another
    with pytest.raises(InputError, match="device"):
        loaded.engine(0)
    assert loaded.engine(0, "cpu").device.type == "cpu"


def test_a_terminal_shows_a_bar_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, bool]] = []

    class Bar(tqdm):
        def __init__(self, desc: str, **more: object) -> None:
            super().__init__(desc=desc, **more)
            shown.append((desc, not self.disable))

    monkeypatch.setattr("rsrouter.smooth.BAR", partial(Bar, *BAR.args, **BAR.keywords))
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    smooth, x = Smooth(Expert(net, sigma=0.5, num_classes=2, input_shape=(1, 2, 2))), torch.rand(2, 1, 2, 2)
    for live in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda live=live: live, raising=False)
        smooth.certify(x, FixedPlan(10, 20))
        smooth.certify(x, FixedPlan(10, 20), progress=lambda drawn: None)
        smooth.predict(x, n=20)
    assert shown == [("certify", False)] * 2 + [("predict", False), ("certify", True), ("certify", False), ("predict", True)]
