"""A classifier is prepared once: later calls cost what their votes cost, and still refuse whatever was changed meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rsrouter import Expert, ExpertPool, FixedPlan, FlatRouter, RoutedSmooth, Smooth, Terms
from rsrouter.core.errors import NetworkError
from rsrouter.core.requests import VoteRequest
from rsrouter.sampling import Engine, Execution, VoteModel
from rsrouter.sampling import engine as engine_module

SHAPE = (1, 4, 4)
X = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
TERMS = Terms(FixedPlan(20, 60), alpha=0.1, seed=1)
FACTOR = 1.0


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(8, 3)
        self.shift, self.function = 0, scaled
        self.register_buffer("offset", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.function(self.fc(self.bn(self.conv(x)).flatten(1))) + self.offset).roll(self.shift, 1)


def by_numpy(net: Any) -> None:
    net.fc.weight.detach().numpy()[0, 0] += 1.0


def by_data(net: Any) -> None:
    net.conv.weight.data[0, 0, 0, 0] = torch.nextafter(net.conv.weight.data[0, 0, 0, 0], torch.tensor(9.0))


def in_a_buffer(net: Any) -> None:
    net.bn.running_var.mul_(2.0)


def in_a_hidden_buffer(net: Any) -> None:
    net.offset += 1.0


def by_a_number(net: Any) -> None:
    net.shift = 1


def by_a_hook(net: Any) -> None:
    net.fc.register_forward_hook(lambda module, args, out: -out)


def by_a_function(net: Any) -> None:
    net.function = torch.neg


def by_a_part(net: Any) -> None:
    net.fc = nn.Linear(8, 3)


CHANGES = [by_numpy, by_data, in_a_buffer, in_a_hidden_buffer, by_a_number, by_a_hook, by_a_function, by_a_part]


def expert(module: nn.Module, **more: Any) -> Expert:
    return Expert(module, **{"sigma": 0.5, "num_classes": 3, "input_shape": SHAPE, **more})


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use", ["certify", "predict"])
def test_a_network_that_is_changed_between_two_calls_is_refused(change: Callable[[Any], None], use: str) -> None:
    net = Net().eval()
    smooth = Smooth(expert(net))
    call = {"certify": lambda: smooth.certify(X, TERMS), "predict": lambda: smooth.predict(X, n=50, alpha=0.1, seed=1)}[use]
    before = call()
    assert str(call()) == str(before)
    change(net)
    for _ in range(2):
        with pytest.raises(NetworkError, match="changed after it was bound"):
            call()


def test_a_global_value_that_a_network_reads_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = Smooth(expert(Net().eval()))
    smooth.certify(X, TERMS)
    monkeypatch.setitem(globals(), "FACTOR", -1.0)
    with pytest.raises(NetworkError, match="changed after it was bound"):
        smooth.certify(X, TERMS)


def test_a_router_and_settings_that_are_changed_between_two_calls_are_refused() -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    pool = ExpertPool([expert(Net().eval()), expert(Net().eval(), sigma=1.0)])
    routed = RoutedSmooth(pool, FlatRouter(head, sigma=1.0))
    routed.certify(X, TERMS)
    with torch.no_grad():
        head[1].bias.numpy()[:] += 1.0
    with pytest.raises(NetworkError, match="router"):
        routed.certify(X, TERMS)
    other = Smooth(expert(Net().eval()))
    other.certify(X, TERMS)
    other.experts[0].mean = (0.5,)
    with pytest.raises(NetworkError, match="changed"):
        other.certify(X, TERMS)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    calls: list[Any] = []
    plain = getattr(engine_module, name)
    monkeypatch.setattr(engine_module, name, lambda *given, **more: calls.append(given) or plain(*given, **more))
    return calls


def test_a_later_call_prepares_and_checks_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, checks, again = (counted(monkeypatch, name) for name in ("prepare", "check_network", "check_again"))
    smooth = Smooth(expert(Net().eval()))
    first = smooth.certify(X, TERMS)
    assert (len(prepared), len(checks), len(again)) == (1, 1, 1)
    assert [smooth.certify(X, TERMS) for _ in range(3)] == [first] * 3
    smooth.certify(X, Terms(FixedPlan(20, 60), alpha=0.1, seed=2))
    smooth.predict(X, n=50, alpha=0.1)
    assert (len(prepared), len(checks)) == (1, 1)
    (runner,) = smooth.engine(1)._runners.values()
    assert len(again) == 1 or not runner.packs  # rows that must not be packed fill more batches
    smooth.certify(X, Terms(FixedPlan(20, 9_000), alpha=0.1))  # more batches than a look at the state is good for
    assert len(again) > 1
    assert Smooth(smooth.expert).certify(X, TERMS) == first


class Keeps(nn.Module):
    """Adds what `keep` says after so many forward passes; `opaque` holds it where it cannot be read."""

    def __init__(self, after: int, by: float, opaque: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.after, self.by = nn.Linear(16, 3), after, by
        self.count: Any = iter(range(10**9)) if opaque else 0

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.count, int):
            self.count += 1
            count = self.count
        else:
            count = next(self.count)
        return self.fc(x.flatten(1)) + (self.by if count > self.after else 0.0) * torch.eye(3)[0]


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("by", [1e-5, 3.0])
def test_a_network_that_becomes_another_between_two_small_calls_is_caught_by_the_second(opaque: bool, by: float) -> None:
    """Some eleven passes prepare and check it; it changes later, without a vote's bits being compared on the way."""
    changed = 0
    for after in range(6, 40, 3):
        smooth = Smooth(expert(Keeps(after, by, opaque)), execution=Execution(batch=50))
        answers = []
        with contextlib.suppress(NetworkError):
            for _ in range(12):
                answers.append(smooth.certify(X[:1], TERMS))
        changed += len(answers) < 12
        assert all(a == answers[0] for a in answers)  # no answer of another function was given
    assert changed == 12


def test_a_counter_that_decides_nothing_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    again = counted(monkeypatch, "check_again")
    smooth = Smooth(expert(Keeps(10**9, 0.0, opaque=False)))
    for _ in range(3):
        smooth.certify(X, TERMS)
    assert len(again) == 3  # its state is another every time, so its bits are compared


class Sized(nn.Module):
    """Rounds otherwise in small batches, or takes none."""

    def __init__(self, refuses: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.refuses = nn.Linear(16, 3), refuses

    def forward(self, x: Tensor) -> Tensor:
        if self.refuses and len(x) != 200:
            raise ValueError("batches of 200")
        return self.fc(x.flatten(1)) * (1.0 + 1e-6 * (len(x) == 200))


@pytest.mark.parametrize("refuses", [False, True])
def test_small_batches_are_used_only_where_rows_keep_their_bits(refuses: bool) -> None:
    def engine(module: nn.Module, batch: int) -> Engine:
        return Engine([VoteModel("n", module, 0.5, ("n",), (3,), "d")], SHAPE, seed=0, execution=Execution(batch=batch))

    def votes(drawing: Engine, *parts: tuple[int, int]) -> list[int]:
        requests = [VoteRequest(0, "n", "estimate", start, stop - start) for start, stop in parts]
        return sum(drawing.run(X, [b"a", b"b"], [r])[0]["n"] for r in requests).tolist()  # type: ignore[attr-defined]

    odd = engine(Sized(refuses), 200)
    votes(odd, (0, 30))
    assert odd.runner("n").rows(30) == 200
    plain = engine(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 200)
    parts = [(0, 30), (30, 100), (100, 310), (310, 400)]
    whole = votes(plain, (0, 400))
    assert votes(plain, *parts) == whole
    expected = [50, 50, 100, 100, 200, 200] if plain.runner("n").packs else [200] * 6  # as the processor's kernels are
    assert [plain.runner("n").rows(n) for n in (1, 50, 51, 100, 101, 200)] == expected


def test_devices_are_prepared_apart_and_none_travels() -> None:
    import pickle

    smooth = Smooth(expert(nn.Sequential(nn.Flatten(), nn.Linear(16, 3))))
    one = smooth.certify(X, TERMS)
    assert smooth.engine(1)._runners is smooth.engine(2, None)._runners
    assert smooth.engine(1, "cpu")._runners is not smooth.engine(1)._runners or smooth.certify(X, TERMS, device="cpu") == one
    assert smooth.with_execution(Execution(batch=25)).engine(1)._runners == {}
    assert pickle.loads(pickle.dumps(smooth)).certify(X, TERMS) == one
