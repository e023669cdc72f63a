"""Lipschitz constants: computed ones bound the truth, declared ones that do not hold are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rsrouter import Expert, ExpertPool, InputError, NetworkError
from rsrouter.experts.describe import build_described, describe_module
from rsrouter.experts.lipschitz import GroupSort, Lipschitz, compute, conv_norm, pair_table

SHAPE = (2, 6, 6)


def net(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(*layers)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


NETWORKS = {
    "dense": lambda: net(nn.Flatten(), nn.Linear(72, 12), GroupSort(), nn.Linear(12, 4)),
    "conv": lambda: net(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 2, stride=2), nn.Flatten(), nn.Linear(36, 3)),
    "strided": lambda: net(nn.Conv2d(2, 4, 3, stride=2, padding=1), GroupSort(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(4, 3)),
    "dilated": lambda: net(
        nn.Conv2d(2, 2, 2, dilation=2, padding=1), nn.ReLU(), nn.AvgPool2d(3, 1), nn.Flatten(), nn.Linear(32, 3)
    ),
}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_computed_constants_bound_the_local_ones(name):
    network = NETWORKS[name]()
    found = compute(network, SHAPE)
    double = network.double()
    x = torch.rand(1, *SHAPE, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: double(v)[0], x).flatten(1).numpy()
    k = len(jacobian)
    local = np.linalg.norm(jacobian[:, None] - jacobian[None], axis=2)
    table = pair_table(found.constants, k)
    assert np.all(local <= table + 1e-12)
    assert local.max() > 0.01 * table.max()


def test_the_norm_of_a_convolution_is_bounded_and_nearly_met():
    torch.manual_seed(1)
    for stride, padding, dilation, kernel in ((1, 1, 1, 3), (2, 0, 1, 2), (2, 1, 1, 3), (1, 2, 2, 3)):
        conv = nn.Conv2d(2, 3, kernel, stride, padding, dilation, bias=False).double()
        matrix = torch.autograd.functional.jacobian(lambda v, conv=conv: conv(v[None]).flatten(), torch.zeros(SHAPE).double())
        true = float(np.linalg.norm(matrix.flatten(1).numpy(), 2))
        sides = (6 + 2 * padding,) * 2
        bound = conv_norm(conv.weight.detach().numpy(), sides, (stride,) * 2, (dilation,) * 2)
        assert true <= bound <= 1.9 * true
        if kernel == stride:
            assert bound == pytest.approx(true, rel=1e-6)


def test_computed_rounding_holds_and_is_small():
    network = NETWORKS["dense"]()
    found = compute(network, SHAPE)
    x = torch.rand(50, *SHAPE)
    exact = [v.detach().numpy().astype(np.longdouble) for v in network.parameters()]
    h = x.flatten(1).numpy().astype(np.longdouble) @ exact[0].T + exact[1]
    h = np.stack([np.minimum(h[:, ::2], h[:, 1::2]), np.maximum(h[:, ::2], h[:, 1::2])], 2).reshape(len(h), -1)
    true = h @ exact[2].T + exact[3]
    with torch.no_grad():
        away = np.abs(network.double()(x.double()).numpy() - true).max()
    assert 0 < away <= found.rounding < 1e-11


def test_a_single_number_has_the_root_of_two():
    assert pair_table(2.0, 2)[0, 1] == pytest.approx(2.0 * np.sqrt(2.0))


def expert(module: nn.Module, **settings) -> Expert:
    return Expert(module, num_classes=4, input_shape=SHAPE, **settings)


def test_a_declared_constant_that_a_pair_violates_is_refused():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(72, 4))
    true = compute(linear, SHAPE).constants
    assert expert(linear, lipschitz=true).lipschitz == Lipschitz(true, 1e-6)
    low = tuple(tuple(0.95 * v for v in row) for row in true)
    with pytest.raises(NetworkError, match="does not hold"):
        expert(linear, lipschitz=low)


def test_a_violation_is_found_where_the_network_is_steep():
    class Steep(nn.Module):
        def forward(self, x):
            first = torch.relu(8.0 * (x.flatten(1).mean(1, keepdim=True) - 0.6)) * 5.0
            return torch.cat([first, torch.zeros_like(first), -first, first], 1)

    with pytest.raises(NetworkError, match="does not hold"):
        expert(Steep(), lipschitz=1.0)


class Opaque(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :4]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"lipschitz": 1.0, "sigma": 0.5}, InputError, "noise level"),
        ({"lipschitz": -1.0}, InputError, "above 0"),
        ({"lipschitz": float("nan")}, InputError, "above 0"),
        ({"lipschitz": True}, InputError, "above 0"),
        ({"lipschitz": "guess"}, InputError, "compute"),
        ({"lipschitz": [[0.0, 1.0], [1.0, 0.0]]}, InputError, "symmetric"),
        ({"lipschitz": 1.0, "rounding": -1.0}, InputError, "rounding"),
        ({"lipschitz": 1.0, "rounding": 0.0}, None, ""),
        ({"sigma": 0.5, "rounding": 1.0}, InputError, "no Lipschitz"),
        ({"lipschitz": "compute"}, NetworkError, "cannot be computed"),
        ({}, InputError, "sigma"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, error, words):
    if error is None:
        assert expert(Opaque(), **settings).sigma == 0.0
        return
    with pytest.raises(error, match=words):
        expert(Opaque(), **settings)


def test_hooks_and_unknown_layers_are_not_computed():
    hooked = NETWORKS["dense"]()
    hooked[1].register_forward_hook(lambda *_: None)
    replaced = NETWORKS["dense"]()
    replaced[3].forward = lambda x: 9.0 * x[:, :4]
    for network in (
        hooked,
        replaced,
        nn.Sequential(nn.Softmax(1), nn.Flatten()),
        nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten()),
    ):
        with pytest.raises(NetworkError):
            compute(network, SHAPE)


def test_group_sort_is_written_down_and_built_again():
    network = NETWORKS["dense"]()
    again = build_described(describe_module(network))
    again.load_state_dict(network.state_dict())
    x = torch.rand(3, *SHAPE)
    assert torch.equal(again(x), network(x))
    assert expert(again, lipschitz="compute").digest == expert(network, lipschitz="compute").digest


def test_the_constant_is_part_of_the_digest_and_survives_a_pool():
    network = NETWORKS["dense"]()
    one, other = expert(network, lipschitz="compute"), expert(network, lipschitz=100.0)
    assert one.digest != other.digest != expert(network, sigma=0.5).digest
    assert one.with_settings(name="again").lipschitz == one.lipschitz
    assert ExpertPool([one, expert(network, sigma=0.5)]).sigmas == (0.0, 0.5)
