"""Folding goes through a symbolic trace, and a trace that computes something else is not used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rsrouter.sampling.execution import Execution, prepare

CPU = torch.device("cpu")


class Misled(nn.Module):
    """Takes another branch under tracing, where tensors are stand-ins; `how` says what the other branch does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).flatten(1)
        if isinstance(y, Tensor):
            return y
        return -y if self.how == "negates" else y.no_such_attribute


@pytest.mark.parametrize("how", ["negates", "raises"])
def test_a_trace_that_differs_is_not_run(how: str) -> None:
    torch.manual_seed(0)
    module = Misled(how).eval()
    x = torch.rand(4, 1, 2, 2)
    prepared = prepare(module, Execution(), CPU, (1, 2, 2))
    torch.testing.assert_close(prepared(x), module(x))
    assert any(isinstance(m, nn.BatchNorm2d) for m in prepared.module.modules())


def test_an_honest_trace_is_folded() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten()).eval()
    prepared = prepare(module, Execution(), CPU, (1, 2, 2))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepared.module.modules())
    x = torch.rand(4, 1, 2, 2)
    torch.testing.assert_close(prepared(x), module(x))


class ByKeyword(Misled):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(x)).flatten(1)


class NeverEval(Misled):
    """BatchNorm that stays in training mode: for `check_network` to refuse, not for folding to trip over."""

    def train(self, mode: bool = True) -> NeverEval:
        super().train(mode)
        self.bn.training = True
        return self


@pytest.mark.parametrize("module", [ByKeyword("negates"), NeverEval("negates")])
def test_what_cannot_be_folded_runs_as_it_is(module: nn.Module) -> None:
    module.eval()
    x = torch.rand(4, 1, 2, 2)
    prepared = prepare(module, Execution(), CPU, (1, 2, 2))
    torch.testing.assert_close(prepared(x), module(x))
