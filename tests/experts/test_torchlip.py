"""Networks of deel-torchlip: their constant is computed from what they export, or declared and tried."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rsrouter import Expert, FixedPlan, NetworkError, Smooth
from rsrouter.experts.lipschitz import compute, pair_table

torchlip = pytest.importorskip("deel.torchlip")
SHAPE = (2, 8, 8)


def network(factor: float = 1.0) -> nn.Module:
    """Every kind of layer that is recognised."""
    torch.manual_seed(0)
    made = torchlip.Sequential(
        torchlip.SpectralConv2d(2, 4, 3, padding=1),
        torchlip.GroupSort2(),
        torchlip.ScaledAvgPool2d(2),
        torchlip.InvertibleDownSampling(2),
        torchlip.SpectralConv2d(16, 8, 1),
        torchlip.MaxMin(),
        torchlip.ScaledAdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        torchlip.SpectralLinear(16, 8),
        torchlip.FullSort(),
        torchlip.FrobeniusLinear(8, 3),
        k_coef_lip=factor,
    )
    made(torch.rand(4, *SHAPE))  # a training pass, which iterates the norms
    return made.eval()


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_constant_of_an_exported_network_bounds_its_local_ones(factor):
    exported = network(factor).vanilla_export()
    found = compute(exported, SHAPE)
    x = torch.rand(1, *SHAPE, dtype=torch.float64)
    double = exported.double()
    jacobian = torch.autograd.functional.jacobian(lambda v: double(v)[0], x).flatten(1).numpy()
    local = np.linalg.norm(jacobian[:, None] - jacobian[None], axis=2)
    table = pair_table(found.constants, 3)
    assert np.all(local <= table + 1e-12)
    assert local.max() > 0.001 * table.max()
    assert found.rounding < 1e-9


def test_a_dense_network_is_nearly_one_lipschitz():
    torch.manual_seed(0)
    wide, narrow = torchlip.SpectralLinear(128, 32), torchlip.SpectralLinear(32, 3)
    made = torchlip.Sequential(nn.Flatten(), wide, torchlip.GroupSort2(), narrow)
    with torch.no_grad():
        for _ in range(30):
            made(torch.rand(4, *SHAPE))
    exported = made.eval().vanilla_export()
    table = pair_table(compute(exported, SHAPE).constants, 3)
    assert table.max() == pytest.approx(np.sqrt(2.0), rel=1e-3)
    expert = Expert(exported, lipschitz="compute", num_classes=3, input_shape=SHAPE)
    (certificate,) = Smooth(expert).certify(torch.rand(1, *SHAPE), FixedPlan(1, 1))
    assert certificate.n_drawn == 0
    assert certificate.radius > 0


def test_weights_that_are_computed_in_every_pass_are_refused():
    with pytest.raises(NetworkError, match="vanilla_export"):
        compute(network(), SHAPE)


OTHERS = [torchlip.LPReLU(), torchlip.ScaledL2NormPool2d(2), torchlip.HouseHolder(2), torchlip.LipResidual()]


@pytest.mark.parametrize("layer", OTHERS, ids=lambda layer: type(layer).__name__)
def test_other_layers_must_be_declared(layer):
    with pytest.raises(NetworkError, match="declare"):
        compute(nn.Sequential(layer, nn.Flatten(), nn.Linear(128, 3)), SHAPE)


def test_a_declared_constant_of_such_a_network_is_tried():
    made = nn.Sequential(torchlip.LPReLU(), nn.Flatten(), nn.Linear(128, 3))
    bound = float(torch.linalg.matrix_norm(made[2].weight.detach(), 2)) * 1.001
    settings = {"num_classes": 3, "input_shape": SHAPE}
    assert Expert(made.eval(), lipschitz=bound, **settings).lipschitz.constants == bound
    with pytest.raises(NetworkError, match="does not hold"):
        Expert(made.eval(), lipschitz=0.3 * bound, **settings)
