"""`Expert` and its digest: everything that decides a vote changes it, nothing else does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from rsrouter.core.errors import InputError
from rsrouter.experts import Expert, module_digest
from rsrouter.experts.expert import check_sigma
from tests.helpers.legacy import MEAN, STD, NormalizeLayer


def make(module: nn.Module | None = None, **settings: object) -> Expert:
    torch.manual_seed(0)
    module = module or nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    return Expert(module, **{"sigma": 0.5, "num_classes": 3, "input_shape": (3, 2, 2), **settings})  # type: ignore[arg-type]


class Scaled(nn.Module):
    """A user's layer that keeps what it needs as plain attributes."""

    def __init__(self, scale: float, mode: str = "a") -> None:
        super().__init__()
        self.scale, self.mode, self.calls = scale, mode, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.scale


def test_digest_of_equal_experts_is_equal() -> None:
    assert make().digest == make().digest == make(name="other").digest
    module = make().module
    assert module_digest(module) == module_digest(copy.deepcopy(module))
    scaled = Scaled(2.0)
    before = module_digest(scaled)
    scaled(torch.ones(1))  # a counter may decide, and its value is told
    assert module_digest(scaled) != before


def test_digest_sees_all_that_decides_a_vote() -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    norms = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3))
    moved = copy.deepcopy(norms)
    moved[2].running_mean += 1  # a buffer
    experts = [
        make(),
        make(other),
        make(sigma=0.25),
        make(mean=MEAN, std=STD),
        make(mean=MEAN, std=(1.0, 1.0, 1.0)),
        make(nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False))),
        make(norms),
        make(moved),
        make(nn.Sequential(NormalizeLayer(MEAN, STD), nn.Flatten())),
        make(nn.Sequential(NormalizeLayer(MEAN, MEAN), nn.Flatten())),
        make(Scaled(1.0)),
        make(Scaled(2.0)),
        make(Scaled(2.0, "b")),
        make(nn.Sequential(nn.LeakyReLU(0.1))),
        make(nn.Sequential(nn.LeakyReLU(0.2))),
    ]
    assert len({e.digest for e in experts}) == len(experts)


class Configured(nn.Module):
    def __init__(self, setting: object) -> None:
        super().__init__()
        self.setting, self.calls = setting, 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (False, True),
        ((2, 2), (2, 3)),
        ({"scale": 1.0}, {"scale": 2.0}),
        (np.zeros(3), np.ones(3)),
        (np.float32(1), np.float32(2)),
        ([torch.zeros(1)], [torch.ones(1)]),
        (torch.zeros(1), torch.ones(1)),
    ],
    ids=str,
)
def test_digest_sees_settings_of_users_modules(one: object, other: object) -> None:
    assert module_digest(Configured(one)) == module_digest(Configured(copy.deepcopy(one)))
    assert module_digest(Configured(one)) != module_digest(Configured(other))


def test_digest_sees_settings_that_no_repr_tells() -> None:
    """The same weights split into other heads, or normalised elsewhere, are another function."""
    layers = []
    for heads, first in [(2, False), (4, False), (2, True)]:
        torch.manual_seed(0)
        layers.append(nn.TransformerEncoderLayer(8, heads, norm_first=first))
    assert len({str(layer) for layer in layers}) == 1
    assert len({module_digest(layer) for layer in layers}) == 3


def test_network_normalises_pixels() -> None:
    expert = make(nn.Flatten(), num_classes=12, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    out = expert.network()(torch.full((1, 3, 2, 2), 0.75))
    torch.testing.assert_close(out, torch.tensor([[0.5] * 4 + [0.5] * 4 + [0.375] * 4]))
    plain = make(nn.Flatten(), num_classes=12)
    assert plain.network() is plain.module


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sigma": -1.0}, "sigma"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"sigma": float("inf")}, "sigma"),
        ({"sigma": True}, "sigma"),
        ({"sigma": None}, "sigma"),
        ({"sigma": 127.5}, "sigma=0.5"),
        ({"num_classes": 1}, "classes"),
        ({"num_classes": 2.0}, "classes"),
        ({"input_shape": (3, 2)}, "input shape"),
        ({"input_shape": (3, 0, 2)}, "input shape"),
        ({"mean": MEAN}, "half"),
        ({"mean": (0.5,), "std": (0.5,)}, "3 finite"),
        ({"mean": MEAN, "std": (0.0, 1.0, 1.0)}, "above 0"),
        ({"mean": (float("nan"),) * 3, "std": STD}, "finite"),
        ({"name": "../x"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a b"}, "name"),
    ],
)
def test_experts_that_cannot_be(settings: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        make(**settings)
    assert caught.value.remedy
    if "sigma" in settings:
        with pytest.raises(InputError):
            check_sigma(settings["sigma"], "it")


def test_a_function_is_not_a_module() -> None:
    with pytest.raises(InputError, match=r"nn\.Module"):
        Expert(lambda x: x, sigma=0.5, num_classes=2, input_shape=(1, 1, 1))  # type: ignore[arg-type]
