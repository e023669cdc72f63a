"""The script for whoever has a card: says where there is none, goes on where it stood, and can be rehearsed on a CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from rsrouter.core.errors import DeviceError
from rsrouter.results import read_table

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "gpu_day.py"


def load():
    spec = importlib.util.spec_from_file_location("example_gpu_day", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gpu_day = load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_without_a_card_it_says_so(tmp_path, capsys):
    assert gpu_day.main(["--out", str(tmp_path / "out")]) == gpu_day.NO_DEVICE == 2
    assert "There is no cuda here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_steps_are_done_once_and_failures_do_not_stop_the_others(tmp_path, monkeypatch):
    calls, broken = [], [True]

    def step(name):
        def work():
            calls.append(name)
            if name == "b" and broken[0]:
                raise RuntimeError("not today")
            return {"found": name}

        return work

    monkeypatch.setattr(gpu_day.Day, "steps", lambda self: {name: step(name) for name in "abc"})
    command = ["--device", "cpu", "--out", str(tmp_path)]
    assert gpu_day.main([*command, "--minutes", "0"]) == gpu_day.TIME_UP
    assert calls == []
    assert gpu_day.main(command) == gpu_day.FAILED
    assert calls == ["a", "b", "c"]
    assert "not today" in (tmp_path / "cpu" / "b.error.txt").read_text()
    broken[0] = False
    assert gpu_day.main(command) == gpu_day.DONE
    assert calls == ["a", "b", "c", "b"]
    assert json.loads((tmp_path / "cpu" / "b.json").read_text())["found"] == "b"
    assert not (tmp_path / "cpu" / "b.error.txt").exists()


def test_a_lost_card_ends_it(tmp_path, monkeypatch):
    calls = []

    def lost():
        raise DeviceError("The device cuda stopped working")

    monkeypatch.setattr(gpu_day.Day, "steps", lambda self: {"a": lost, "b": lambda: calls.append("b") or {}})
    assert gpu_day.main(["--device", "cpu", "--out", str(tmp_path)]) == gpu_day.FAILED
    assert calls == []


def test_the_table_is_a_table_and_stops_when_the_time_is_up(tmp_path):
    size = gpu_day.Size(50, 1, 200, 2, False)
    day = gpu_day.Day(torch.device("cpu"), tmp_path, time.monotonic() - 1.0, size)
    with pytest.raises(gpu_day.TimeUp):
        day.table()
    day.end = time.monotonic() + 600.0
    assert day.table()["rows"] == 2
    assert len(read_table(tmp_path / "table" / "certificates.tsv")) == 2


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "REHEARSAL", gpu_day.Size(50, 1, 200, 1, False))
    assert gpu_day.main(["--device", "cpu", "--minutes", "20", "--out", str(tmp_path)]) == gpu_day.DONE
    names = {p.name for p in (tmp_path / "cpu").iterdir()}
    assert {"facts.json", "tests.json", "redraw.json", "bench-demo.json", "calibrate.json", "table-cost.json"} <= names
    assert json.loads((tmp_path / "cpu" / "redraw.json").read_text())["moved at least"] == 0
    assert "aten" in (tmp_path / "cpu" / "profile-demo.txt").read_text()
