"""On a CUDA device: `python -m pytest -m gpu -n 0`. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rsrouter import Expert, FixedPlan, Smooth
from rsrouter.core import NetworkError
from rsrouter.jobs import certify_table
from rsrouter.process import disturbed
from rsrouter.results import read_table
from rsrouter.sampling import Engine, Execution, kernels, make_noise, rounds
from rsrouter.sampling.calibrate import calibrate
from rsrouter.sampling.graphs import Replayed
from rsrouter.sampling.noise import flat, unflat
from rsrouter.sampling.philox import normals, stream_words
from tests.sampling.test_engine import SHAPE, images, model, network, requests, votes

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
WAYS = [
    Execution(),
    Execution(precision="ieee"),
    Execution(dtype="bfloat16"),
    Execution(dtype="float16"),
    Execution(graphs=False),
    Execution(channels_last=False),
    Execution(batch=64, compile=True),
]


def engine(execution=None, module=None, **settings):
    return Engine([model(module or network())], SHAPE, seed=0, device="cuda", execution=execution, **settings)


@pytest.mark.parametrize("execution", WAYS, ids=str)
def test_votes_do_not_depend_on_order_company_or_cuts(execution):
    x = images()
    running = engine(execution)
    together = votes(running, x, requests(range(6), 1700))
    assert all(row.sum() == 1700 for row in together)
    shuffled = votes(running, x, requests([3, 1, 5, 0, 2, 4], 1700))
    assert all((shuffled[i] == together[j]).all() for i, j in enumerate([3, 1, 5, 0, 2, 4]))
    alone = votes(engine(execution), x[2:3], requests([0], 1700))
    assert (alone[0] == together[2]).all()
    first, rest = votes(running, x, requests(range(6), 613)), votes(running, x, requests(range(6), 1087, start=613))
    assert all((a + b == c).all() for a, b, c in zip(first, rest, together, strict=True))
    running.check_again()
    assert not disturbed()


def test_the_default_is_recorded_and_replayed():
    running = engine()
    votes(running, images(1), requests([0]))
    told = running.describe()
    assert told["kernels"]["float32"] == "tf32"
    assert told["stream"] == {"philox": "4x32-10"}
    assert told["execution"]["net"]["graphs"]
    assert isinstance(running.runner("net").prepared.module, Replayed)


@pytest.mark.parametrize("noise", ["gaussian", "sound", "gaussian-shared"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_draws_the_same_votes_to_rounding(noise, dtype):
    x, n = torch.round(images(2) * 255) / 255, 20_000
    card = votes(engine(Execution(dtype=dtype), noise=noise), x, requests(range(2), n))
    other = Engine([model(network())], SHAPE, seed=0, execution=Execution(stream="counters", dtype=dtype), noise=noise)
    for a, b in zip(card, votes(other, x, requests(range(2), n)), strict=True):
        assert np.abs(a - b).sum() / 2 <= 0.01 * n


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 224, 224)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_the_bits_that_a_cpu_gives(shape, dtype):
    x = torch.rand((1, *shape))
    names = torch.from_numpy(stream_words(b"card"))[None]
    rows = torch.stack([torch.zeros(8, dtype=torch.int64), torch.arange(8) * 12345, torch.zeros(8, dtype=torch.int64)], 1)
    expected = (x + unflat(normals(names.expand(8, 4), rows[:, 1], x.numel()), shape) * 0.5).to(dtype)
    for use in (True, False):
        if use and not kernels.usable(CUDA):
            continue
        out = torch.empty((8, *shape), dtype=dtype, device=CUDA).contiguous(memory_format=torch.channels_last)
        noise = make_noise("gaussian", shape, CUDA, "counters")
        arguments = flat(x).to(CUDA), names.to(CUDA), torch.zeros(1, dtype=torch.int64, device=CUDA), rows.to(CUDA), 0.5, out
        if use:
            noise.fill(*arguments)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "usable", lambda device: False)
                noise.fill(*arguments)
        assert torch.equal(out.cpu(), expected)


def test_two_streams_and_kernels_change_no_vote(monkeypatch):
    x, wanted = images(), requests(range(6), 3000)
    expected = votes(engine(Execution(batch=100)), x, wanted)
    monkeypatch.setattr(rounds, "has_streams", lambda device: False)
    assert all((a == b).all() for a, b in zip(votes(engine(Execution(batch=100)), x, wanted), expected, strict=True))
    monkeypatch.setattr(kernels, "usable", lambda device: False)
    assert all((a == b).all() for a, b in zip(votes(engine(Execution(batch=100)), x, wanted), expected, strict=True))


@pytest.mark.parametrize("noise", ["gaussian", "sound"])
def test_no_host_wait_inside_a_round(noise):
    running = engine(noise=noise)
    runner, x = running.runner("net"), (torch.round(images(1) * 255) / 255).to(CUDA)
    stream = make_noise(noise, SHAPE, CUDA, "counters")
    runner.enqueue(x, {0: 0}, requests([0], 100), [b"a"], stream)  # thresholds and kernels are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts = runner.enqueue(x, {0: 0}, requests([0], 5000), [b"a"], stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counts.sum().item() == 5000


class Reads(nn.Module):
    """Reads a value to the host, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x) if float(x.sum()) < 1e30 else x.flatten(1)[:, :4]


def test_what_cannot_be_captured_runs_as_it_is():
    running = engine(module=Reads())
    with pytest.warns(RuntimeWarning, match="without CUDA graphs"):
        found = votes(running, images(1), requests([0]))
    assert not running.describe()["execution"]["net"]["graphs"]
    assert (found[0] == votes(engine(Execution(graphs=False)), images(1), requests([0]))[0]).all()


class Full(nn.Module):
    """Asks for more than any card has."""

    def forward(self, x):
        return torch.empty(2**46, dtype=torch.uint8, device=x.device)


def test_no_memory_is_an_error_of_this_package_and_the_card_goes_on():
    with pytest.raises(NetworkError, match="ran out of memory"):
        votes(engine(Execution(batch=10, fold=False, channels_last=False), Full()), images(1), requests([0]))
    assert votes(engine(), images(1), requests([0]))[0].sum() == 170


def test_memory_does_not_grow_with_votes():
    running = engine()
    votes(running, images(1), requests([0], 10_000))
    peaks = []
    for n in (100_000, 1_000_000):
        torch.cuda.reset_peak_memory_stats()
        votes(running, images(1), requests([0], n))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.5 * peaks[0] + 2**26


def test_a_table_of_a_card_resumes_there_and_is_drawn_again_on_a_cpu(tmp_path):
    expert = Expert(network(), sigma=0.5, num_classes=4, input_shape=SHAPE, name="e")
    data = [(x, 0) for x in images(4)]
    whole = certify_table(Smooth(expert), data, tmp_path / "t.tsv", FixedPlan(100, 2000), device="cuda")
    certify_table(Smooth(expert), data, tmp_path / "u.tsv", FixedPlan(100, 2000), device="cuda", workers=1)
    again = read_table(tmp_path / "u.tsv")
    about = again.described()
    assert about.execution["precision"] == "tf32"
    assert about.device == torch.cuda.get_device_name(0)
    assert [whole.counts(i) for i in range(4)] == [again.counts(i) for i in range(4)]
    execution = Execution.recorded(about.execution, about.device).nearest(torch.device("cpu"))
    here = certify_table(Smooth(expert, execution=execution), data, tmp_path / "v.tsv", FixedPlan(100, 2000))
    for i in range(4):
        for a, b in zip(whole.counts(i)["estimate"]["e"], here.counts(i)["estimate"]["e"], strict=True):
            assert abs(a - b) <= 0.01 * 2000


def test_calibration_chooses_among_ways():
    best, timings = calibrate([model(network())], SHAPE, device="cuda", ways_too=True, batches=(100,), repeats=1)
    assert {(t.execution.precision, t.execution.graphs) for t in timings} == {
        (p, g) for p in ("tf32", "ieee") for g in (True, False)
    }
    assert best in [t.execution for t in timings]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_two_cards_write_what_one_writes(tmp_path):
    expert = Expert(network(), sigma=0.5, num_classes=4, input_shape=SHAPE, name="e")
    data = [(x, 0) for x in images(6)]
    one = certify_table(Smooth(expert), data, tmp_path / "one.tsv", FixedPlan(100, 1000), device="cuda:0")
    two = certify_table(Smooth(expert), data, tmp_path / "two.tsv", FixedPlan(100, 1000), device="cuda:0,cuda:1")
    assert [one.counts(i) for i in range(6)] == [two.counts(i) for i in range(6)]
