"""`rsrouter bench --memory`: a new process for each n; what it holds does not grow with n."""

from __future__ import annotations

import sys

import pytest

from rsrouter.bench import memory
from rsrouter.bench.memory import Peak, certify_once, memory_peaks
from rsrouter.core.errors import WorkerError


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_votes() -> None:
    few, many, most = memory_peaks()
    assert (few.n, many.n, most.n) == (10_000, 100_000, 1_000_000)
    # a hundred times the votes; kept, their noise alone would be 3 GB, and a byte for each 1 MB
    assert most.peak - few.peak < 20.0
    assert most.grown < 20.0
    assert few.peak > 50.0


def test_the_peak_is_that_of_this_process() -> None:
    found = certify_once(200)
    assert found.n == 200
    assert 0 < found.before <= found.peak
    held = bytearray(2 * 10**8)
    held[:] = b"x" * len(held)
    assert memory.held() >= 190
    assert Peak(1, 2.0, 5.0).grown == 3.0


def test_a_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerError, match="measures memory"):
        memory_peaks((10,))
