"""Folding watches the network run, and a folded copy that computes something else is not used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from rsrouter.core import VoteRequest
from rsrouter.experts.small_resnet import SmallResNet
from rsrouter.sampling import Engine, Execution, VoteModel
from rsrouter.sampling.execution import prepare

CPU = torch.device("cpu")


class Misled(nn.Module):
    """Would take another branch under a symbolic trace, where tensors are stand-ins; `how` says what the other branch does."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).flatten(1)
        if isinstance(y, Tensor):
            return y
        return -y if self.how == "negates" else y.no_such_attribute


def folded(module: nn.Module, shape: tuple[int, ...] = (1, 2, 2)) -> bool:
    """Whether it is folded; what runs is the same function in any case."""
    prepared = prepare(module, Execution(), CPU, shape)
    x = torch.rand(4, *shape)
    for ours, theirs in zip(prepared(x), module.eval()(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    left = any(isinstance(m, nn.BatchNorm2d) for m in prepared.module.modules())
    assert prepared.execution.fold is not left
    return not left


@pytest.mark.parametrize("how", ["negates", "raises"])
def test_what_would_mislead_a_trace_is_folded_as_it_runs(how: str) -> None:
    torch.manual_seed(0)
    assert folded(Misled(how))


def test_a_plain_network_is_folded() -> None:
    torch.manual_seed(0)
    assert folded(nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten()))


class ByKeyword(Misled):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(x)).flatten(1)


class NeverEval(Misled):
    """BatchNorm that stays in training mode: for `check_network` to refuse, not for folding to trip over."""

    def train(self, mode: bool = True) -> NeverEval:
        super().train(mode)
        self.bn.training = True
        return self


class Branches(Misled):
    """Reads what the convolution returns where an image is bright, which the images that it is watched on may not be."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (y if x.mean() > 100 else self.bn(y)).flatten(1)


class ReadTwice(Misled):
    """The convolution's output, too small to matter in a check of logits, goes elsewhere as well."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.bn(y) + 1e-9 * y).flatten(1)


class TwoNorms(Misled):
    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.other = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (self.bn(y) + self.other(y)).flatten(1)


class Keeps(Misled):
    """Reads the last call's convolution."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out = self.bn(y) if self.last is None else self.bn(y) + 0.0 * self.last.sum()
        self.last = y
        return out.flatten(1)


class SharedConv(Misled):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).flatten(1) + self.conv(x).flatten(1)


class ReadsWeights(Misled):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).flatten(1) + self.conv.weight.sum()


class Returns(Misled):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y).flatten(1), y  # type: ignore[return-value]


class Masks(Misled):
    """Runs on the rows that it picks: how many, Python may know."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x[x.flatten(1).sum(1) > -1.0]
        return self.bn(self.conv(kept)).flatten(1)


def hooked() -> nn.Module:
    module = Misled("negates")
    module.conv.register_forward_hook(lambda layer, args, output: output * 2)
    return module


@pytest.mark.parametrize(
    "make",
    [ByKeyword, NeverEval, Branches, ReadTwice, TwoNorms, Keeps, SharedConv, ReadsWeights, Returns, Masks, lambda how: hooked()],
)
def test_what_cannot_be_folded_runs_as_it_is(make: Callable[[str], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make("negates").eval()
    prepared = prepare(module, Execution(), CPU, (1, 2, 2))
    assert any(isinstance(m, nn.BatchNorm2d) for m in prepared.module.modules())
    assert not prepared.execution.fold
    x = torch.rand(4, 1, 2, 2)
    torch.testing.assert_close(prepared(x), module(x))


def test_other_threads_are_left_alone() -> None:
    """Eight threads prepare and vote at once on several models, while a ninth runs a plain layer: everyone gets what they get
    alone, and nothing of torch is another object afterwards."""
    torch.manual_seed(0)
    nets = [SmallResNet(4, 1, width=4, blocks=((4, 1), (8, 2))).eval() for _ in range(3)]
    x = torch.rand(2, 1, 8, 8)
    requests = [VoteRequest(i, "net", "estimate", 0, 120) for i in range(2)]
    globals_before = (nn.Module.__call__, nn.Module.__getattr__, nn.Module._call_impl, torch.conv2d, nn.functional.batch_norm)

    def votes(net: nn.Module) -> list[list[int]]:
        model = VoteModel("net", net, 0.5, ("net",), (4,), "digest")
        engine = Engine([model], (1, 8, 8), seed=0, execution=Execution(batch=40))
        counts = [r["net"].tolist() for r in engine.run(x, [b"a", b"b"], requests)]
        assert engine.describe()["execution"]["net"]["fold"]
        return counts

    alone = [votes(net) for net in nets]
    layer, rows = nn.Linear(4, 3), torch.rand(5, 4)
    expected, stop, wrong, ran = layer(rows), threading.Event(), [], []

    def bystander() -> None:
        while not stop.is_set():
            try:
                ran.append(torch.equal(layer(rows), expected))
            except Exception as error:  # patched by somebody
                wrong.append(error)
                return

    beside = threading.Thread(target=bystander)
    beside.start()
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(votes, nets * 8))
    stop.set()
    beside.join()
    assert together == alone * 8
    assert not wrong
    assert ran
    assert all(ran)
    assert (
        nn.Module.__call__,
        nn.Module.__getattr__,
        nn.Module._call_impl,
        torch.conv2d,
        nn.functional.batch_norm,
    ) == globals_before
    assert torch.equal(layer(rows), expected)
