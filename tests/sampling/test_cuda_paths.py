"""What runs on CUDA alone, with stand-ins for a device: streams that wait, graphs that are left, cards that go."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from rsrouter.core import NetworkError
from rsrouter.core.errors import DeviceError, InputError
from rsrouter.process import KERNELS, disturbed, fixed_kernels, kernels
from rsrouter.sampling import Engine, Execution, graphs, rounds
from rsrouter.sampling.execution import prepare, resolve_device
from rsrouter.sampling.graphs import Replayed, replayed
from rsrouter.sampling.logits import lost_device, outputs
from rsrouter.sampling.noise import CounterNoise
from tests.helpers.fake_cuda import FakeCuda
from tests.sampling.test_engine import SHAPE, images, model, network, requests, votes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_an_execution_knows_what_each_device_does():
    on_card, on_cpu = Execution().on(CUDA), Execution().on(CPU)
    assert (on_card.precision, on_card.graphs, on_card.stream) == ("tf32", True, "counters")
    assert (on_cpu.precision, on_cpu.graphs, on_cpu.stream) == ("ieee", False, "chunks")
    assert Execution(dtype="bfloat16", precision="tf32").on(CUDA).precision == "ieee"  # nothing is multiplied in float32
    assert (on_card.rounding, on_cpu.rounding) == ("tf32", "float32")
    with pytest.raises(InputError, match="no TF32 on cpu"):
        on_card.on(CPU)
    near = on_card.nearest(CPU)
    assert (near.precision, near.graphs, near.stream) == ("ieee", False, "counters")
    assert near == near.on(CPU)
    assert Execution.recorded({"batch": 10}, "cpu").stream == "chunks"
    assert Execution.recorded({"batch": 10}, "Card A").stream == "counters"


@pytest.mark.parametrize(("name", "value"), [("precision", "tf31"), ("stream", "random"), ("threads", -1), ("threads", True)])
def test_settings_that_are_none_are_refused(name, value):
    with pytest.raises(InputError, match=r"Unknown|whole number"):
        Execution(**{name: value})
    assert Execution(threads=np.int64(2)).threads == 2


def test_float32_precision_is_set_for_the_votes_alone():
    knobs = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [k.fp32_precision for k in knobs]
    with fixed_kernels():
        assert [k.fp32_precision for k in knobs] == ["ieee", "ieee"]
        with fixed_kernels("tf32"):  # a network on a card, while one on a CPU takes any
            assert [k.fp32_precision for k in knobs] == ["tf32", "tf32"]
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert not disturbed()
            with fixed_kernels():
                assert [k.fp32_precision for k in knobs] == ["tf32", "tf32"]
            knobs[0].fp32_precision = "ieee"
            assert disturbed() == ["float32.cuda.matmul"]
            knobs[0].fp32_precision = "tf32"
        assert [k.fp32_precision for k in knobs] == ["ieee", "ieee"]
    assert [k.fp32_precision for k in knobs] == before
    assert kernels("tf32") == {**KERNELS, "float32": "tf32"}


def test_threads_of_two_precisions_take_turns():
    seen = []

    def other():
        with fixed_kernels("ieee"):
            seen.append(torch.backends.cudnn.conv.fp32_precision)

    with fixed_kernels("tf32"):
        with pytest.raises(InputError, match="one float32 precision at a time"), fixed_kernels("ieee"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        assert (seen, thread.is_alive()) == ([], True)
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    thread.join(10)
    assert seen == ["ieee"]


@pytest.fixture
def cuda(monkeypatch):
    """Streams on the CPU."""
    fake = FakeCuda(monkeypatch)
    monkeypatch.setattr(rounds, "has_streams", lambda device: True)
    return fake


class Noted(nn.Module):
    """A network whose passes are noted."""

    def __init__(self, inner, fake):
        super().__init__()
        self.inner, self.fake, self.passes = inner, [fake], 0

    def forward(self, x):
        self.fake[0].work(f"pass {self.passes}")
        self.passes += 1
        return self.inner(x)


def drawn(prepared, noise, count=170, batch=50):
    x, wanted = images(), requests(range(6), count)
    asked = rounds.Round(x, range(6), wanted, [bytes([i]) for i in range(6)], 0.5, (4,), "net", batch)
    return rounds.draw(asked, rounds.lay_out(wanted, batch, True), noise, prepared)[0][:-1]


def test_noise_is_made_beside_the_pass_before_and_never_into_a_batch_that_is_read(cuda, monkeypatch):
    prepared = prepare(network(), Execution(batch=50, stream="counters"), CPU, SHAPE)
    monkeypatch.setattr(rounds, "has_streams", lambda device: False)
    plain = drawn(prepared, CounterNoise(SHAPE, CPU, "gaussian"))
    monkeypatch.setattr(rounds, "has_streams", lambda device: True)
    made = 0

    class NotedNoise(CounterNoise):
        def fill(self, *arguments):
            nonlocal made
            cuda.work(f"noise {made}")
            made += 1
            return super().fill(*arguments)

    noted = Noted(prepared.module, cuda)
    found = drawn(replace(prepared, module=noted), NotedNoise(SHAPE, CPU, "gaussian"))
    assert (found == plain).all()
    before = dict(cuda.log)
    passes = noted.passes
    assert passes == made == -(-6 * 170 // 50)
    for k in range(passes):
        assert f"noise {k}" in before[f"pass {k}"]
        if k >= 2:
            assert f"pass {k - 2}" in before[f"noise {k}"]  # it reads the buffer
        if k >= 1:
            assert f"pass {k - 1}" not in before[f"noise {k}"]  # or nothing would run side by side


def test_rows_are_described_in_tables_of_bounded_size(monkeypatch):
    prepared = prepare(network(), Execution(batch=50), CPU, SHAPE)
    noise = CounterNoise(SHAPE, CPU, "gaussian")
    whole = drawn(prepared, noise)
    monkeypatch.setattr(rounds, "TABLE_ROWS", 120)
    sizes = []
    sent = rounds._sent
    monkeypatch.setattr(rounds, "_sent", lambda array, device: sizes.append(len(array)) or sent(array, device))
    assert (drawn(prepared, noise) == whole).all()
    assert max(sizes) <= 120


class FakeGraph:
    """Runs what was captured again, into the tensors that it wrote then."""

    captured: ClassVar[list] = []

    def replay(self):
        module, x, out = FakeGraph.captured[-1]
        out.copy_(module(x))


@pytest.fixture
def capturing(cuda, monkeypatch):
    """Captures, of modules that write nothing else."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    start = Replayed.__init__

    def init(self, *arguments):
        start(self, *arguments)
        FakeGraph.captured.append((self.module, self.input, self.output))

    monkeypatch.setattr(Replayed, "__init__", init)
    return cuda


def prepared_and_rows():
    prepared = prepare(network(), Execution(batch=8).nearest(CUDA), CPU, SHAPE)
    rows = torch.rand(8, *SHAPE)
    with torch.inference_mode():
        return prepared, rows, outputs(prepared(rows))


def test_a_replayed_pass_is_used_where_its_bits_are_the_same(capturing):
    prepared, rows, logits = prepared_and_rows()
    captured = replayed(prepared, rows, logits, CPU, "net")
    assert isinstance(captured.module, Replayed)
    assert captured.execution.graphs
    with torch.inference_mode():
        again = captured(rows.flip(0))
        assert torch.equal(again, prepared(rows.flip(0)))
        assert torch.equal(captured(rows[:3]), prepared(rows[:3]))  # of another size: as it is


def test_a_pass_that_cannot_be_captured_or_is_another_one_runs_as_it_is(capturing, monkeypatch):
    prepared, rows, logits = prepared_and_rows()
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: gaps"):
        assert not replayed(prepared, rows, tuple(z + torch.rand_like(z) for z in logits), CPU, "net").execution.graphs

    def raises(error):
        def graph(graph):
            raise error

        monkeypatch.setattr(torch.cuda, "graph", graph)

    raises(torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"))
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: AcceleratorError"):
        left = replayed(prepared, rows, logits, CPU, "net")
    assert left.module is prepared.module
    assert not left.execution.graphs
    raises(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    with pytest.raises(DeviceError, match="stopped working"):
        replayed(prepared, rows, logits, CPU, "net")
    raises(torch.OutOfMemoryError("no room"))
    with pytest.raises(torch.OutOfMemoryError):
        replayed(prepared, rows, logits, CPU, "net")
    assert graphs.WARM_UP > 0


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Torch not compiled with CUDA enabled", "install a CUDA build"),
        ("Found no NVIDIA driver on your system.", "install the NVIDIA driver"),
        ("The NVIDIA driver on your system is too old (found version 11040).", "update the NVIDIA driver"),
        ("CUDA error: invalid device ordinal", "nvidia-smi -L"),
        ("CUDA error: no kernel image is available for execution on the device", "another build of torch"),
        ("something else", "pick another device"),
    ],
)
def test_a_device_that_cannot_be_used_says_what_helps(monkeypatch, said, remedy):
    def empty(*size, device):
        raise (AssertionError if "compiled" in said else RuntimeError)(said)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(DeviceError, match=remedy):
        resolve_device("cuda:0")
    with pytest.raises(DeviceError, match="cannot be used"):
        resolve_device("meta")


def test_errors_of_a_lost_device_are_told_from_those_of_a_network():
    assert lost_device(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "cuda:0")
    assert lost_device(RuntimeError("CUDA error: device-side assert triggered"), "cuda:0")
    assert lost_device(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "cuda:0") is None
    assert lost_device(torch.OutOfMemoryError("CUDA out of memory"), "cuda:0") is None


class SometimesFull(nn.Module):
    """Runs out of memory in the passes that are named."""

    def __init__(self, inner, full):
        super().__init__()
        self.inner, self.full, self.calls = inner, set(full), [0]

    def forward(self, x):
        self.calls[0] += 1
        if self.calls[0] in self.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(x)


@pytest.mark.parametrize(("full", "survives"), [((40,), True), ((40, 41), False)])
def test_a_card_that_is_full_for_a_moment_draws_the_same_votes_again(monkeypatch, full, survives):
    x, execution = images(2), Execution(batch=25, stream="counters", fold=False, channels_last=False)
    expected = votes(Engine([model(network())], SHAPE, seed=0, execution=execution), x, requests(range(2), 600))
    engine = Engine([model(SometimesFull(network(), ()))], SHAPE, seed=0, execution=execution)
    runner = engine.runner("net")
    votes(engine, x, requests(range(2), 20))
    FakeCuda(monkeypatch)
    runner.device = CUDA  # what is asked of the device afterwards is patched
    runner.prepared.module.calls[0], runner.prepared.module.full = 0, set(full)
    if survives:
        assert all((a == b).all() for a, b in zip(votes(engine, x, requests(range(2), 600)), expected, strict=True))
    else:
        with pytest.raises(NetworkError, match="ran out of memory"):
            votes(engine, x, requests(range(2), 600))


def test_a_card_that_goes_away_in_a_round_is_named(monkeypatch):
    engine = Engine([model(network())], SHAPE, seed=0, execution=Execution(batch=25))
    runner = engine.runner("net")
    runner.device = CUDA

    def gone(*arguments):
        raise torch.AcceleratorError("CUDA error: GPU is lost")

    monkeypatch.setattr(runner, "enqueue", gone)
    with pytest.raises(DeviceError, match=r"cuda stopped working.*GPU is lost.*finished rows are kept"):
        votes(engine, images(1), requests([0]))
