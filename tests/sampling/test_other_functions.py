"""A network that would run as another function than the user's module is refused, or run in the form in which it is that one."""

from __future__ import annotations

import decimal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rsrouter import AdaptivePlan, Expert, Smooth, Terms
from rsrouter.core import NetworkError, VoteRequest
from rsrouter.results import Row
from rsrouter.sampling import Engine, Execution, VoteModel
from rsrouter.sampling.execution import prepare

SHAPE = (1, 4, 4)


def votes(module: nn.Module, **execution: Any) -> list[int]:
    model = VoteModel("net", module, 0.5, ("net",), (3,), "digest")
    engine = Engine([model], SHAPE, seed=0, execution=Execution(**{"batch": 20, **execution}))
    return engine.run(torch.full((1, *SHAPE), 0.5), [b"a"], [VoteRequest(0, "net", "estimate", 0, 40)])[0]["net"].tolist()


class Signed(nn.Module):
    """Votes the other way round where something was lost in copying."""

    __slots__ = ("slot",)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        sign = getattr(self.fc.weight, "turned", 1) * getattr(self, "slot", 1) * getattr(self, "lost", 1)
        return self.fc(x.flatten(1)) * sign


class Forgets(Signed):
    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lost"}


def changed(kind: type[Signed], where: str) -> Signed:
    module = kind()
    setattr(module.fc.weight if where == "turned" else module, where, -1)
    return module


@pytest.mark.parametrize(("kind", "where"), [(Signed, "turned"), (Signed, "slot"), (Forgets, "lost")])
def test_a_copy_that_lost_something_is_refused(kind: type[Signed], where: str) -> None:
    with pytest.raises(NetworkError, match=r"copy of network 'net' is not what it was copied from.*deepcopy"):
        votes(changed(kind, where))


def test_an_attribute_that_is_copied_is_no_reason() -> None:
    assert sum(votes(changed(Signed, "lost"))) == 40


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) * (-1.0 if torch.compiler.is_compiling() else 1.0)


def test_a_compiled_network_must_be_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with pytest.raises(NetworkError, match=r"Compiled, network 'net' is another function.*compile=False"):
        votes(Compiled(), compile=True)
    assert sum(votes(Compiled())) == 40
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    assert votes(plain, compile=True) == votes(plain)


class Flips(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return -output if func is nn.functional.linear else output


class FlipsBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return -output if "addmm" in str(func) else output


@pytest.mark.parametrize("mode", [Flips, FlipsBelow])
def test_modes_around_the_call_are_refused(mode: Any) -> None:
    with mode(), pytest.raises(NetworkError, match=rf"modes were active while.*{mode.__name__}.*leave them"):
        votes(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))


def test_what_numpy_and_decimal_raise_elsewhere_is_no_matter() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    expert = Expert(module, sigma=0.5, num_classes=3, input_shape=SHAPE)

    def lines() -> list[str]:
        made = Smooth(expert).certify(torch.full((1, *SHAPE), 0.5), Terms(AdaptivePlan(400, (0.1, 0.2), 20), seed=0))
        return [Row.from_certificate(c, idx=i).to_line() for i, c in enumerate(made)]

    expected = lines()
    with np.errstate(all="raise"), decimal.localcontext(decimal.Context(prec=2)):
        assert lines() == expected


@torch.jit.script
def rarely(y: Tensor, z: Tensor) -> Tensor:
    if bool(y.max() > 1000.0):
        return -z
    return z


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return rarely(y, self.fc(self.norm(y).flatten(1)))


def test_what_a_scripted_function_reads_is_not_folded() -> None:
    assert not prepare(Scripted(), Execution(batch=20), torch.device("cpu"), SHAPE).execution.fold


class ByBatch(nn.Module):
    """Takes another way, past the normalisation, for batches of more than ten rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 3)
        self.norm.running_mean.copy_(torch.tensor([3.0, -3.0, 2.0, 5.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.fc((self.norm(y) if len(x) <= 10 else y).flatten(1))


def test_what_is_folded_is_seen_at_the_size_that_runs() -> None:
    assert votes(ByBatch()) == votes(ByBatch(), fold=False)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_every_module_are_refused(register: Any) -> None:
    def turned(module: nn.Module, args: Any, output: Any = None) -> Any:
        return -output if isinstance(module, nn.Linear) and output is not None else None

    hook = register(turned)
    try:
        with pytest.raises(NetworkError, match=r"Hooks on all modules.*turned.*remove"):
            votes(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
    finally:
        hook.remove()
