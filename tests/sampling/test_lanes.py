"""Batches side by side on a CPU: the same bits whatever the number of lanes, and one lane for networks that need it."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from torch import nn

from rsrouter.core import NetworkError
from rsrouter.sampling import Engine, Execution
from rsrouter.sampling.lanes import twin
from rsrouter.sampling.threads import lane_pool
from tests.sampling.test_engine import SHAPE, images, model, network, requests, votes


@pytest.fixture
def threads():
    """torch has three threads, as many as lanes of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def engine(module, **execution):
    return Engine([model(module)], SHAPE, seed=0, execution=Execution(batch=25, threads=1, **execution))


@pytest.mark.parametrize("stream", ["chunks", "counters"])
def test_the_number_of_lanes_changes_no_vote(threads, stream):
    x, wanted = images(3), requests(range(3), 333, start=41)
    many = engine(network(), stream=stream)
    found = votes(many, x, wanted)
    assert len(many.runner("net").lanes.prepared) == 3
    assert many.describe()["threads"] == 1
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    one = engine(network(), stream=stream)
    assert all((a == b).all() for a, b in zip(found, votes(one, x, wanted), strict=True))
    assert one.runner("net").lanes is None
    many.check_again()


def test_lanes_share_weights_and_nothing_else(threads):
    net = network()
    runner = engine(net).runner("net")
    first, *others = (p.module for p in runner.lanes.prepared)
    for other in others:
        assert other is not first
        assert all(a is b for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert not {id(p) for p in first.parameters()} & {id(p) for p in net.parameters()}


class Notes(nn.Module):
    """Keeps its last input."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, 0

    def forward(self, x):
        self.seen += 1
        return self.inner(x)


def hooked():
    net = network()
    net.fc.register_forward_hook(lambda module, args, output: None)
    return net


def test_networks_with_hooks_or_a_state_run_in_one_lane(threads):
    x, wanted = images(1), requests([0], 100)
    for net in (hooked(), Notes(network())):
        running = engine(net, fold=False)
        assert votes(running, x, wanted)[0].sum() == 100
        assert running.runner("net").lanes is None
    assert twin(torch.jit.trace(nn.Flatten(), torch.zeros(1, 2, 2))) is None


class Breaks(nn.Module):
    """Fails in threads other than the main one, once it is told to."""

    armed: tuple = ()

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if self.armed and threading.current_thread() is not threading.main_thread():
            raise self.armed[0]("broken in a lane")
        return self.inner(x)


@pytest.mark.parametrize(("kind", "said"), [(ValueError, "broken in a lane"), (torch.OutOfMemoryError, "ran out of memory")])
def test_an_error_in_a_lane_is_the_error_of_the_round(threads, monkeypatch, kind, said):
    running = engine(Breaks(network()), fold=False)
    assert running.runner("net").lanes is not None
    monkeypatch.setattr(Breaks, "armed", (kind,))
    with pytest.raises(NetworkError, match=said):
        votes(running, images(1), requests([0], 500))
    monkeypatch.setattr(Breaks, "armed", ())
    assert votes(running, images(1), requests([0], 500))[0].sum() == 500


def test_a_network_that_only_runs_in_the_main_thread_has_one_lane(threads, monkeypatch):
    monkeypatch.setattr(Breaks, "armed", (RuntimeError,))
    running = engine(Breaks(network()), fold=False)
    assert votes(running, images(1), requests([0], 100))[0].sum() == 100
    assert running.runner("net").lanes is None


@pytest.mark.parametrize("of_the_process", [2, 3])
def test_a_lane_has_its_own_number_of_threads(of_the_process):
    before = torch.get_num_threads()
    torch.set_num_threads(of_the_process)
    try:
        pool = lane_pool.__wrapped__(2, 1)
        seen = [pool.submit(lambda: (torch.rand(100_000).log(), torch.get_num_threads())[1]) for _ in range(8)]
        assert {s.result() for s in seen} == {1}
        assert torch.get_num_threads() == of_the_process
        pool.shutdown()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_starts_lanes_of_its_own():
    assert lane_pool(2, 1).submit(int).result() == 0
    child = os.fork()
    if child == 0:
        worked = lane_pool(2, 1).submit(int)
        try:
            os._exit(worked.result(timeout=20))
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
