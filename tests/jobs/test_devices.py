"""Jobs on several cards, which are not there: lists of devices, cards of two kinds, and cards that go away while they work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rsrouter.core.errors import DeviceError, InputError, WorkerError
from rsrouter.jobs import devices
from rsrouter.jobs.devices import device_names, first_device, job_threads, local_resources
from rsrouter.jobs.driver import make_executor
from rsrouter.jobs.workers import serve
from rsrouter.results import read_table
from rsrouter.sampling import Execution
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.fake_work import COUNT, FakeWorker, pool, run


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch):
    """Says which cards there are; those that are not there are refused as torch does."""

    def put(*names: str) -> None:
        FakeCuda(monkeypatch, names)

        def resolve(device: str | None) -> torch.device:
            found = torch.device(device or "cpu")
            if found.type == "cuda" and (found.index or 0) >= len(names):
                raise DeviceError("The device cannot be used", received=str(device))
            return found

        monkeypatch.setattr(devices, "resolve_device", resolve)

    return put


def test_lists_of_devices() -> None:
    assert device_names("cuda:0, cuda:2") == ("cuda:0", "cuda:2")
    assert device_names("cuda") == ("cuda",)
    assert first_device("cuda:3,cuda:1") == "cuda:3"
    assert first_device(None) is None
    for wrong in ("cuda:0,cuda:0", "cuda,cuda:1", "cpu,cuda:0", "cuda:0,", "cpu,cpu"):
        with pytest.raises(InputError, match="device"):
            device_names(wrong)


def test_a_worker_for_each_card_that_is_named(cards) -> None:
    cards("A", "A", "A")
    assert local_resources("auto", "cuda", None).devices == ("cuda:0", "cuda:1", "cuda:2")
    assert local_resources("auto", "cuda:0,cuda:2", None).devices == ("cuda:0", "cuda:2")
    assert local_resources(1, "cuda:2,cuda:0", None).devices == ("cuda:2",)
    assert make_executor(None, None, "cuda:0,cuda:2", None).slots == 2
    with pytest.raises(InputError, match="fewer GPUs than workers"):
        local_resources(3, "cuda:0,cuda:2", None)
    with pytest.raises(DeviceError, match="cannot be used"):
        local_resources("auto", "cuda:0,cuda:3", None)


def test_cards_of_two_kinds_never_share_a_table(cards) -> None:
    cards("A", "B", "A")
    with pytest.raises(InputError, match="cards differ") as caught:
        local_resources("auto", "cuda", None)
    assert "cuda:0,cuda:2" in caught.value.remedy
    assert local_resources("auto", "cuda:0,cuda:2", None).devices == ("cuda:0", "cuda:2")
    assert local_resources(1, "cuda", None).devices == ("cuda:0",)


class LosesCard(FakeWorker):
    """The card of one device stops in the middle of its first task, and is gone from then on."""

    def open(self, device: str | None) -> None:
        mark = Path(self.marks) / "gone"
        if device == "cpu:1" and mark.exists():
            raise DeviceError("The device cannot be used", received=str(device))
        self.device = device
        super().open(device)

    def run(self, task, emit) -> None:
        if self.device == "cpu:1":
            (Path(self.marks) / "gone").touch()
            raise DeviceError("The device cpu:1 stopped working", received="GPU is lost")
        super().run(task, emit)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers fork here")
@pytest.mark.parametrize("left", [True, False])
def test_a_card_that_goes_away_leaves_its_work_to_the_others(tmp_path: Path, left: bool) -> None:
    torch.set_num_threads(1)
    executor = pool(2 if left else 1, "fork")
    executor._devices = ("cpu", "cpu:1") if left else ("cpu:1",)
    worker = LosesCard(str(tmp_path), seconds=0.05)
    if left:
        run(tmp_path / "t.tsv", executor, worker)
        assert (tmp_path / "gone").exists()
    else:
        with pytest.raises(WorkerError, match="again and again") as caught:
            run(tmp_path / "t.tsv", executor, worker)
        assert "cannot be used" in caught.value.received
        run(tmp_path / "t.tsv")
    assert len(read_table(tmp_path / "t.tsv")) == COUNT


def test_a_lost_device_loses_its_worker_and_no_more() -> None:
    told: list[object] = []

    def unpack() -> FakeWorker:
        raise DeviceError("The device cuda:0 stopped working")

    serve(unpack, None, None, lambda: None, told.append)  # type: ignore[arg-type, return-value]
    assert [type(event).__name__ for event in told] == ["Lost"]


def test_lanes_leave_a_workers_threads_free(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"info": {"threads": 1}}')
    assert job_threads(tmp_path / "t.tsv", "cpu", None, Execution()) == 1
    assert job_threads(tmp_path / "t.tsv", "cpu", None, Execution(threads=1)) is None
    assert job_threads(tmp_path / "t.tsv", "cpu", 4, Execution(threads=1)) == 4
