"""The engine: every vote counted once, the same votes whatever the grouping, networks that cannot be certified refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rsrouter import Expert, ExpertPool
from rsrouter.core import NetworkError, VoteRequest
from rsrouter.core.errors import InputError
from rsrouter.experts.small_resnet import SmallResNet
from rsrouter.router import DeferralRouter, Voter
from rsrouter.sampling import Engine, Execution, VoteModel, image_identity
from rsrouter.sampling.execution import prepare

SHAPE = (1, 12, 12)


def network(seed=0, classes=4):
    torch.manual_seed(seed)
    net = SmallResNet(classes, 1, width=8, blocks=((8, 2),))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.2, 0.2)
            m.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.2, 0.2)
    nn.init.normal_(net.fc.weight, std=3.0)
    return net.eval()


def model(module, classes=4, name="net", sigma=0.5):
    return VoteModel(name, module, sigma, (name,), (classes,), "digest")


def images(count=6):
    return torch.rand((count, *SHAPE), generator=torch.Generator().manual_seed(1))


def votes(engine, x, requests):
    identity = [image_identity(i) for i in x]
    return [r["net"] for r in engine.run(x, identity, requests)]


def requests(order, count=170, start=0):
    return [VoteRequest(i, "net", "estimate", start, count) for i in order]


def test_every_vote_is_counted_once():
    engine = Engine([model(network())], SHAPE, seed=0)
    for row in votes(engine, images(), requests(range(6), 133)):
        assert row.sum() == 133
        assert row.shape == (5,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_votes_do_not_depend_on_order_company_or_cuts(dtype):
    x, execution = images(), Execution(dtype=dtype)
    engine = Engine([model(network())], SHAPE, seed=0, execution=execution)
    together = votes(engine, x, requests(range(6)))
    assert len({tuple(v) for v in together}) > 1
    shuffled = votes(engine, x, requests([3, 1, 5, 0, 2, 4]))
    assert all((shuffled[i] == together[j]).all() for i, j in enumerate([3, 1, 5, 0, 2, 4]))
    for i in range(6):
        alone = votes(Engine([model(network())], SHAPE, seed=0, execution=execution), x[i : i + 1], requests([0]))
        assert (alone[0] == together[i]).all()
    first, rest = votes(engine, x, requests(range(6), 61)), votes(engine, x, requests(range(6), 109, start=61))
    assert all((a + b == c).all() for a, b, c in zip(first, rest, together, strict=True))


def test_seed_purpose_and_digest_change_the_noise():
    x = images(1)
    base = votes(Engine([model(network())], SHAPE, seed=0), x, requests([0], 400))[0]
    other_seed = votes(Engine([model(network())], SHAPE, seed=1), x, requests([0], 400))[0]
    other_purpose = votes(Engine([model(network())], SHAPE, seed=0), x, [VoteRequest(0, "net", "tune", 0, 400)])[0]
    assert (base != other_seed).any()
    assert (base != other_purpose).any()


def test_batches_that_may_not_be_mixed_give_the_same_votes():
    """The fallback for networks whose bits depend on a row's place: blocks of one request, aligned to the batch."""
    x = images(3)
    engine = Engine([model(network())], SHAPE, seed=0, execution=Execution(batch=32))
    packed = votes(engine, x, requests(range(3), 77, start=13))
    engine.runner("net").packs = False
    aligned = votes(engine, x, requests(range(3), 77, start=13))
    assert all(a.sum() == 77 for a in aligned)
    assert all((a == b).all() for a, b in zip(packed, aligned, strict=True))


def test_folding_keeps_the_function_and_leaves_the_original_alone():
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    folded = prepare(net, Execution(), torch.device("cpu"), SHAPE)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.module.modules())
    x = images()
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_module_in_training_mode_is_evaluated_in_eval_mode_and_stays_in_training_mode():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 4)).train()
    engine = Engine([model(net)], SHAPE, seed=0)
    assert votes(engine, images(1), requests([0]))[0].sum() == 170
    assert net.training


class _Stays(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.flatten(1))


class _AlwaysDropout(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, training=True))


def test_networks_that_cannot_be_certified_are_refused():
    with pytest.raises(NetworkError, match="random at test time"):
        votes(Engine([model(_Stays(_AlwaysDropout(144, 4)))], SHAPE, seed=0), images(1), requests([0]))
    batch_norm = nn.Sequential(nn.Flatten(), nn.Linear(144, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(NetworkError, match="rest of the batch"):
        votes(Engine([model(batch_norm)], SHAPE, seed=0), images(1), requests([0]))
    with pytest.raises(NetworkError, match="wrong shape"):
        votes(Engine([model(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)))], SHAPE, seed=0), images(1), requests([0]))


class _Neighbours(nn.Module):
    """Logits minus their mean over the batch, as small as `size` asks, beside a head of large logits."""

    def __init__(self, size):
        super().__init__()
        self.fc, self.size = nn.Linear(144, 4), size

    def forward(self, x):
        logits = self.fc(x.flatten(1))
        return 100.0 * logits, self.size * (logits - logits.mean(0))


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_small_logits_that_depend_on_the_batch_are_refused_too(size):
    two = VoteModel("net", _Neighbours(size), 0.5, ("net", "other"), (4, 4), "digest")
    with pytest.raises(NetworkError, match="rest of the batch"):
        votes(Engine([two], SHAPE, seed=0), images(1), requests([0]))


@pytest.mark.parametrize("limit", [1.5, 3.0, 6.0])
def test_a_row_that_is_invalid_for_its_neighbours_is_noticed(limit):
    class Spoilt(_Stays):
        def forward(self, x):
            logits = super().forward(x)
            return logits + (torch.nan if limit < x.max() else 0.0)  # in company that another batch has

    with pytest.raises(NetworkError, match="rest of the batch"):
        votes(Engine([model(Spoilt(nn.Linear(144, 4)))], SHAPE, seed=0), images(1), requests([0]))


def test_a_network_that_cannot_be_copied_says_so():
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    net.lock = threading.Lock()
    with pytest.raises(NetworkError, match="cannot be copied"):
        votes(Engine([model(net)], SHAPE, seed=0), images(1), requests([0]))


class _NaNWhereBright(nn.Module):
    def forward(self, x):
        flat = x.flatten(1)
        logits = torch.stack([flat[:, 0], -flat[:, 0]], 1)
        return torch.where((flat[:, 1] > 0.5)[:, None], torch.full_like(logits, float("nan")), logits)


def test_invalid_logits_vote_for_the_extra_outcome():
    x = torch.full((1, *SHAPE), 0.5)
    row = votes(Engine([model(_NaNWhereBright(), 2)], SHAPE, seed=0), x, requests([0], 2000))[0]
    assert row.sum() == 2000
    assert abs(row[2] - 1000) < 5 * np.sqrt(500)
    everything = votes(Engine([model(_Stays(nn.Linear(144, 2)), 2)], SHAPE, seed=0), x * float("nan"), requests([0], 10))[0]
    assert everything.tolist() == [0, 0, 10]


class _NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value would reach the host: `.item()`, `bool(tensor)`, data-dependent shapes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert "_local_scalar_dense" not in name, name
        assert "nonzero" not in name, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("noise", ["gaussian", "sound"])
def test_no_host_read_inside_a_round(noise):
    x = torch.round(images(3) * 255) / 255
    engine = Engine([model(network())], SHAPE, seed=0, noise=noise)
    runner = engine.runner("net")
    from rsrouter.sampling.noise import make_noise

    wanted = requests(range(3), 130)
    with _NoHostReads():
        counts = runner.enqueue(x, {0: 0, 1: 1, 2: 2}, wanted, [b"a", b"b", b"c"], make_noise(noise, SHAPE, torch.device("cpu")))
    assert (counts.sum(1) == 130).all()


def test_sharing_a_trunk_gives_both_votes_from_one_forward_pass():
    class Two(nn.Module):
        calls = 0

        def forward(self, x):
            Two.calls += 1
            return x.flatten(1)[:, :3], x.flatten(1)[:, 3:5]

    shared = VoteModel("net", Two(), 0.5, ("expert", "router"), (3, 2), "d")
    engine = Engine([shared], SHAPE, seed=0, execution=Execution(batch=50, fold=False))
    engine.run(images(1), [b"x"], [VoteRequest(0, "net", "estimate", 100, 1)])  # the first votes are checked once more
    Two.calls = 0
    got = engine.run(images(1), [b"x"], [VoteRequest(0, "net", "estimate", 0, 100)])[0]
    assert Two.calls == 2
    assert got["expert"].shape == (4,)
    assert got["router"].shape == (3,)
    assert got["expert"].sum() == got["router"].sum() == 100


def test_unknown_device_and_bad_execution():
    with pytest.raises(InputError, match="device cannot be used"):
        Engine([model(network())], SHAPE, seed=0, device="warp")
    with pytest.raises(InputError, match="device cannot be used"):
        Engine([model(network())], SHAPE, seed=0, device="cuda:99")
    with pytest.raises(InputError, match="Unknown dtype"):
        Execution(dtype="int4")
    with pytest.raises(InputError, match="execution batch"):
        Execution(batch=-1)


def test_shared_noise_is_one_stream_for_all_images_and_still_nothing_else():
    same = images(1).expand(3, *SHAPE)
    shared = votes(Engine([model(network())], SHAPE, seed=0, noise="gaussian-shared"), same, requests(range(3)))
    assert len({tuple(v) for v in shared}) == 1
    named = [image_identity(x, i) for i, x in enumerate(same)]
    own = Engine([model(network())], SHAPE, seed=0).run(same, named, requests(range(3)))
    assert len({tuple(v["net"]) for v in own}) > 1
    x = images()
    together = votes(Engine([model(network())], SHAPE, seed=0, noise="gaussian-shared"), x, requests(range(6)))
    alone = votes(Engine([model(network())], SHAPE, seed=0, noise="gaussian-shared"), x[4:5], requests([0]))
    assert (alone[0] == together[4]).all()


def test_one_model_at_several_sigmas_is_on_the_device_once():
    net = network()
    engine = Engine(
        [model(net, name="a", sigma=0.25), model(net, name="b", sigma=1.0), model(network(1), name="c")], SHAPE, seed=0
    )
    assert engine.runner("a").prepared is engine.runner("b").prepared
    assert engine.runner("a").prepared is not engine.runner("c").prepared
    assert engine.runner("a").model.sigma != engine.runner("b").model.sigma


class Timed(nn.Module):
    """A user's wrapper that keeps a whole number which no digest sees, and turns the logits around from 400 on."""

    def __init__(self, inner, sigma):
        super().__init__()
        self.inner, self.t = inner, round(1000 * sigma)

    def forward(self, x):
        out = self.inner(x)
        return out if self.t < 400 else out.flip(1)


@pytest.mark.parametrize("first", [0, 1])
def test_networks_that_only_look_the_same_are_not_run_as_one(first):
    net = network()
    models = [model(Timed(net, sigma), name=f"at_{sigma:g}", sigma=sigma) for sigma in (0.25, 0.5)]
    engine = Engine(models, SHAPE, seed=0)
    engine.runner(models[first].name)
    x = images(2)
    for m in models:
        assert torch.allclose(engine.runner(m.name).prepared(x), m.module(x), atol=1e-4)


def test_heads_that_vote_for_other_stages_are_not_run_as_one():
    trunk = Expert(network(), sigma=0.25, num_classes=4, input_shape=SHAPE, name="trunk")
    voters = [Voter("trunk"), Voter("trunk", 0.5, "head"), Voter("trunk", None, "head"), Voter("trunk", 0.5)]
    head = nn.Linear(trunk.module.fc.in_features + 4, 4)
    models = DeferralRouter(voters, (0.9, 0.9, 0.9), {"head": head}).bind(ExpertPool([trunk])).models
    engine, x = Engine(models, SHAPE, seed=0), images(1)
    for m in models:
        prepared = engine.runner(m.name).prepared(x)
        for ours, theirs in zip(prepared, m.module(x), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
