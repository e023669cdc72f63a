"""How the tests are spread over processes, and fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # read when torch is imported, and by the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from rsrouter.sampling import execution
from tests.helpers.hub_server import HubServer

#: The most processes that `-n auto` starts: each holds torch and the networks of its tests, about 1.5 GB.
MOST = 8


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core, for the whole of the fast tests; none to start for tests that are named or marked."""
    whole = [Path(a).resolve() for a in config.args] == [Path(__file__).resolve().parent] and not config.option.keyword
    fast = "not slow" in config.option.markexpr
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, cores) if whole and fast else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a card are skipped where torch sees none."""
    if any(item.get_closest_marker("gpu") for item in items) and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the rows per forward pass where none are chosen: what is padded to them takes an eighth of the time."""
    monkeypatch.setitem(execution.BATCH_BYTES, "cpu", 2**17)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback; the huggingface_hub client of this process talks to it, with an empty cache."""
    with HubServer(tmp_path / "hub") as server:
        server.attach(monkeypatch)
        yield server
