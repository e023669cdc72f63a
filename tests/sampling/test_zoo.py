"""Modules that users bring: each is certified as the function that it is, or refused with the reason."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from rsrouter.core import NetworkError, VoteRequest
from rsrouter.sampling import Engine, Execution, VoteModel

SHAPE, CLASSES, BATCH = (1, 6, 6), 4, 24


def linear(classes: int = CLASSES) -> nn.Linear:
    return nn.Linear(36, classes)


class Around(nn.Module):
    """A linear layer on pixels, and what a function makes of `(pixels (B, 36), logits (B, C))`."""

    def __init__(self, after: Callable[[Tensor, Tensor], Any], classes: int = CLASSES) -> None:
        super().__init__()
        self.fc, self.after = linear(classes), after

    def forward(self, x: Tensor) -> Any:
        flat = x.flatten(1)
        return self.after(flat, self.fc(flat))


def masked(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, z: torch.cat([z[:, :-1], torch.full_like(z[:, :1], value)], 1)


def leaning(value: float, size: float = 1.0) -> nn.Module:
    """Votes by the mean of its batch, beside a masked class."""
    return Around(lambda x, z: masked(value)(x, z + size * (z.mean(0, keepdim=True) - 2 * z.mean())))


class Normed(nn.Module):
    """BatchNorm by the batch's own statistics, and a masked class."""

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Linear(64, CLASSES)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(self.bn(self.conv(x)).relu().flatten(1))
        return z if self.value is None else masked(self.value)(x, z)


class Conv(nn.Module):
    """A convolution that normalisations and reshapes follow."""

    def __init__(self, after: Callable[[Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.fc, self.after = nn.Conv2d(1, 4, 3), norm or nn.BatchNorm2d(4), nn.Linear(64, CLASSES), after

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.after(self.norm(self.conv(x))))


class Counts(nn.Module):
    """Another function after some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = linear(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x.flatten(1)) * (-1.0 if self.calls > 12 else 1.0)


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = linear(), nn.BatchNorm1d(CLASSES)

    def train(self, mode: bool = True) -> RunningMean:
        return super().train(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x.flatten(1)))


class WritesBuffer(nn.Module):
    """Returns one tensor again and again, with the content of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = linear()
        self.register_buffer("out", torch.zeros(BATCH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != len(self.out):
            return self.fc(x.flatten(1))
        return self.out.copy_(self.fc(x.flatten(1)))


class Listed(nn.Module):
    """Members in plain containers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        members = [linear(), linear()]
        keep = {"list": members, "tuple": tuple(members), "dict": dict(enumerate(members)), "modules": nn.ModuleList(members)}
        hold = lambda x: members[0](x)  # noqa: E731
        self.members = {**keep, "object": SimpleNamespace(a=members), "closure": hold, "partial": partial(hold)}[kind]

    def forward(self, x: Tensor) -> Tensor:
        held = self.members.a if isinstance(self.members, SimpleNamespace) else self.members
        if callable(held) and not isinstance(held, nn.ModuleList):
            return held(x.flatten(1))
        return sum(m(x.flatten(1)) for m in (held.values() if isinstance(held, dict) else held))


class Branching(nn.Module):
    """Each row takes the way that its own pixels say."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        out = self.a(flat)
        rows = (flat.mean(1) > 0.5).nonzero().flatten()
        return out.index_copy(0, rows, torch.cat([self.b(flat[i : i + 1]) for i in rows])) if len(rows) else out


class TracedBranch(nn.Module):
    """What a symbolic trace would take for another network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        z = self.fc(y.reshape(y.shape[0], -1))
        return masked(-1e9)(x, z if torch.is_tensor(z) and not isinstance(z, torch.fx.Proxy) else -z)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(36, 36), nn.Linear(36, 36), linear()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x.flatten(1)).relu()))


class Plain(nn.Module):
    """A tensor that no buffer holds."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc, self.mean = linear(), torch.full((36,), 0.5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1) - self.mean)


class Says(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.fc, self.error = linear(), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fc = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.3, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x.flatten(1, 2)).mean(1))


class Lock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lock = linear(), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), linear())


def quantised(kind: str) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), linear(), nn.ReLU(), nn.Linear(CLASSES, CLASSES)).eval()
    if kind == "dynamic":
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    static = nn.Sequential(torch.ao.quantization.QuantStub(), *net, torch.ao.quantization.DeQuantStub()).eval()
    static.qconfig = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)
    torch.ao.quantization.prepare(static, inplace=True)
    static(torch.rand(64, *SHAPE))
    return torch.ao.quantization.convert(static, inplace=True)


def exported(static: bool) -> nn.Module:
    dynamic = None if static else ({0: torch.export.Dim("batch", min=1, max=4096)},)
    return torch.export.export(
        sequential().eval(), (torch.rand(BATCH if static else 2, *SHAPE),), dynamic_shapes=dynamic
    ).module()


def pruned() -> nn.Module:
    net = sequential()
    prune.l1_unstructured(net[1], "weight", 0.5)
    return net


def old_weight_norm(removed: bool) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(linear()))
    if removed:
        nn.utils.remove_weight_norm(net[1])
    return net


def old_spectral_norm() -> nn.Module:
    """In training mode it takes a step of the power iteration in every call."""
    return nn.Sequential(nn.Flatten(), nn.utils.spectral_norm(linear()))


class SpectralTrain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.utils.parametrizations.spectral_norm(linear())

    def train(self, mode: bool = True) -> SpectralTrain:
        return super().train(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def saturated(x: Tensor, z: Tensor) -> Tensor:
    return torch.sigmoid(100 * z)


#: Name, module, and what the refusal says; None: certified, and the function is the module's in eval mode.
ZOO: list[tuple[str, Callable[[], nn.Module], str | None]] = [
    ("linear", sequential, None),
    ("in training mode", lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), linear()).train(), None),
    ("masked -1e3", lambda: Around(masked(-1e3)), None),
    ("masked -1e4", lambda: Around(masked(-1e4)), None),
    ("masked -1e9", lambda: Around(masked(-1e9)), None),
    ("masked -inf", lambda: Around(masked(-math.inf)), None),
    ("masked finfo.min", lambda: Around(masked(torch.finfo(torch.float32).min)), None),
    *(
        (f"batch mean, masked {value:g}", partial(leaning, value), "rest of the batch")
        for value in (0.0, -1e3, -1e4, -1e9, -math.inf, math.nan)
    ),
    ("weak batch mean, masked", lambda: leaning(-1e9, 0.01), "rest of the batch"),
    ("batch mean, shifted", lambda: Around(lambda x, z: 1e4 + z - 2 * z.mean(0)), "rest of the batch"),
    ("batch mean of one class of small logits", lambda: Around(lambda x, z: z * 1e-6 - 2e-6 * z.mean(0)), "rest of the batch"),
    (
        "batch mean beside a huge class",
        lambda: Around(lambda x, z: torch.cat([1e9 * z[:, :1], z[:, 1:] - 2 * z[:, 1:].mean(0)], 1)),
        "rest of the batch",
    ),
    (
        "batch mean in close rows alone",
        lambda: Around(lambda x, z: torch.where(z.topk(2).values.diff().abs() < 0.1, z.mean(0) - z, z)),
        "rest of the batch",
    ),
    (
        "order in the batch",
        lambda: Around(lambda x, z: z + torch.arange(len(z))[:, None] * torch.eye(CLASSES)[0]),
        "rest of the batch",
    ),
    ("votes of its neighbours", lambda: Around(lambda x, z: z.roll(1, 0)), "rest of the batch"),
    ("NaN where the batch is bright", lambda: Around(lambda x, z: z + (math.nan if x.max() > 2 else 0.0)), "rest of the batch"),
    ("batch statistics", lambda: Normed(None), "rest of the batch"),
    ("batch statistics, masked", lambda: Normed(-1e4), "rest of the batch"),
    ("batch statistics, masked -inf", lambda: Normed(-math.inf), "rest of the batch"),
    ("running statistics in training mode", RunningMean, "rest of the batch|random|changed"),
    ("instance norm", lambda: Conv(lambda y: y.flatten(1), nn.InstanceNorm2d(4)), None),
    ("group norm", lambda: Conv(lambda y: y.flatten(1), nn.GroupNorm(2, 4)), None),
    ("layer norm", lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(36), linear()), None),
    ("softmax over the batch", lambda: Around(lambda x, z: z.softmax(0)), "rest of the batch"),
    ("dropout", lambda: Around(lambda x, z: F.dropout(z, 0.5, training=True)), "random"),
    ("rare dropout", lambda: Around(lambda x, z: z + 1e-6 * (torch.rand_like(z) > 0.9)), "random"),
    (
        "seeded dropout",
        lambda: Around(lambda x, z: z * torch.rand(z.shape, generator=torch.Generator().manual_seed(1))),
        "rest of the",
    ),
    ("counter", Counts, "changed|random|rest of the batch"),
    ("one output buffer", WritesBuffer, None),
    ("traced branch", TracedBranch, None),
    ("rows of their own way", Branching, None),
    ("view after a convolution", lambda: Conv(lambda y: y.view(y.size(0), -1)), None),
    ("strides", lambda: Conv(lambda y: y.as_strided((len(y), 64), (64, 1))), None),
    ("weight norm", lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(linear())), None),
    ("old weight norm", lambda: old_weight_norm(True), None),
    ("old weight norm, not removed", lambda: old_weight_norm(False), None),
    ("old spectral norm", old_spectral_norm, None),
    ("spectral norm", lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(linear())), None),
    ("spectral norm in training mode", SpectralTrain, "random|changed"),
    ("pruned", pruned, None),
    ("tied weights", Tied, None),
    ("lazy", lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES)), "parameters without values"),
    ("lazy after one batch", lambda: _run(nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))), None),
    ("meta", lambda: sequential().to("meta"), "parameters without values"),
    ("traced by torch.jit", lambda: torch.jit.trace(sequential().eval(), torch.rand(2, *SHAPE)), None),
    ("scripted", lambda: torch.jit.script(sequential().eval()), None),
    ("scripted and frozen", lambda: torch.jit.freeze(torch.jit.script(sequential().eval())), None),
    ("exported", lambda: exported(False), None),
    ("exported for this batch", lambda: exported(True), None),
    ("compiled", lambda: torch.compile(sequential().eval(), backend="eager"), None),
    ("DataParallel", lambda: nn.DataParallel(sequential()), None),
    ("transformer", Transformer, None),
    ("quantised, scales of the batch", lambda: quantised("dynamic"), "rest of the batch"),
    ("quantised", lambda: quantised("static"), None),
    ("float64", lambda: sequential().double(), None),
    ("members in a ModuleList", lambda: Listed("modules"), None),
    *(
        (f"members in a {kind}", partial(Listed, kind), "keeps weights")
        for kind in ("list", "tuple", "dict", "object", "closure", "partial")
    ),
    ("plain tensor", Plain, None),
    ("plain float64 tensor", lambda: Plain(torch.float64), "forward pass"),
    ("lock", Lock, "cannot be copied"),
    ("ties", lambda: Around(lambda x, z: z.round()), None),
    ("saturated", lambda: Around(saturated), None),
    ("one answer", lambda: Around(lambda x, z: torch.zeros_like(z)), None),
    ("hard votes", lambda: Around(lambda x, z: F.one_hot(z.argmax(1), CLASSES)), None),
    ("infinity", lambda: Around(lambda x, z: torch.where(z > 0.3, math.inf, z)), None),
    ("nothing but -inf in some rows", lambda: Around(lambda x, z: z.masked_fill(x[:, :1] > 0.5, -math.inf)), None),
    ("NaN in some rows", lambda: Around(lambda x, z: z.masked_fill(x[:, :1] > 0.5, math.nan)), None),
    ("an object", lambda: Around(lambda x, z: SimpleNamespace(logits=z)), "wrong shape.*return output.logits"),
    ("a dictionary", lambda: Around(lambda x, z: {"logits": z}), "wrong shape.*return output.logits"),
    ("complex numbers", lambda: Around(lambda x, z: z.to(torch.complex64)), "wrong shape"),
    ("one row for the batch", lambda: Around(lambda x, z: z.mean(0)), "wrong shape"),
    ("too many classes", lambda: Around(lambda x, z: z, 5), "wrong shape"),
    (".cuda() in the forward pass", lambda: Around(lambda x, z: z.cuda()), "forward pass.*x.device"),
    (
        "gradients in the forward pass",
        lambda: Around(lambda x, z: torch.autograd.grad(z.sum(), x)[0][:, :4]),
        "forward pass.*gradients",
    ),
    ("an exception", lambda: Says(KeyError("head")), "forward pass of network 'net' failed.*KeyError.*head"),
    ("an exception without words", lambda: Says(AssertionError()), "AssertionError: no message"),
    ("no memory", lambda: Says(RuntimeError("DefaultCPUAllocator: can't allocate memory")), "ran out of memory"),
    ("no memory at all", lambda: Says(MemoryError()), "ran out of memory"),
]


def _run(module: nn.Module) -> nn.Module:
    module(torch.rand(2, *SHAPE))
    return module


def votes(module: nn.Module, classes: int = CLASSES, n: int = 240, **execution: Any) -> list[int]:
    model = VoteModel("net", module, 0.5, ("net",), (classes,), "digest")
    engine = Engine([model], SHAPE, seed=0, execution=Execution(**{"batch": BATCH, **execution}))
    x = torch.full((1, *SHAPE), 0.5)
    counts = engine.run(x, [b"x"], [VoteRequest(0, "net", "estimate", 0, n)])[0]["net"]
    engine.check_again()
    return counts.tolist()


class Votes(nn.Module):
    """The module's votes, alone with each row, as logits of a plain network."""

    def __init__(self, module: nn.Module, whole: bool, classes: int) -> None:
        super().__init__()
        self.call, self.whole, self.classes = [lambda x: module(x)], whole, classes

    def forward(self, x: Tensor) -> Tensor:
        (call,) = self.call
        x = x.clone()
        logits = call(x).float() if self.whole else torch.cat([call(row[None]).float() for row in x])
        cast = [self.classes if not (z < math.inf).all() or not (z > -math.inf).any() else int(z.argmax()) for z in logits]
        out = F.one_hot(torch.tensor(cast), self.classes + 1).float()
        return out[:, :-1].masked_fill(out[:, -1:] == 1, math.nan)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "reason"), [pytest.param(m, r, id=name) for name, m, r in ZOO])
def test_every_module_is_certified_as_it_is_or_refused(make: Callable[[], nn.Module], reason: str | None) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make()
    if reason is not None:
        with pytest.raises(NetworkError, match=reason) as refused:
            votes(module)
        assert all((refused.value.expected, refused.value.received, refused.value.remedy))
        return
    counts = votes(module)
    assert sum(counts) == 240
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = module if isinstance(module, torch.fx.GraphModule) else module.eval().float()
        assert counts == _alone(plain)


def _alone(module: nn.Module) -> list[int]:
    """Votes of the module called on one row after the other, or, where it takes one size of batch alone, on whole batches."""
    with torch.no_grad():
        try:
            module(torch.rand(1, *SHAPE))
            whole = False
        except Exception:
            whole = True
        return votes(_Frozen(Votes(module, whole, CLASSES)), fold=False, channels_last=False)


class _Frozen(nn.Module):
    """Keeps what it holds out of the engine's copy: the reference is the user's own module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        _Frozen.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        held: nn.Module = _Frozen.__dict__["inner"]
        return held.forward(x)


@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_any_number_of_classes(classes: int) -> None:
    torch.manual_seed(0)
    counts = votes(nn.Sequential(nn.Flatten(), linear(classes)), classes)
    assert len(counts) == classes + 1
    assert sum(counts) == 240


@pytest.mark.parametrize("columns", [slice(None), 0])
def test_one_logit_says_how_to_make_two(columns: Any) -> None:
    with pytest.raises(NetworkError, match=r"torch.cat\(\[torch.zeros_like\(z\), z\], 1\)"):
        votes(Around(lambda x, z: z[:, columns], 1), 2)


def test_the_zoo_is_large() -> None:
    assert len(ZOO) >= 30
    assert len({name for name, _, _ in ZOO}) == len(ZOO)
