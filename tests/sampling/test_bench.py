"""`rsrouter bench`: every figure is there, in JSON and as a table; its loops count what they should. No time is asserted."""

from __future__ import annotations

import json
import math
import mmap

import numpy as np
import torch
from torch import nn

from rsrouter import CascadeRouter, Expert, ExpertPool
from rsrouter.bench import Figure, reference_loop, run_bench
from rsrouter.bench.run import QUICK
from rsrouter.bench.timing import figure, in_turn, peak_growth
from rsrouter.cli.bench import show

CPU = torch.device("cpu")


def expert(sigma):
    torch.manual_seed(0)
    return Expert(
        nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), sigma=sigma, num_classes=3, input_shape=(1, 6, 6), name=f"s{sigma}"
    )


def test_every_figure_in_json_and_as_a_table(capsys):
    pool = ExpertPool([expert(0.25), expert(0.5)])
    images = torch.rand((3, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    said = []
    result = run_bench(
        pool, images, router=CascadeRouter((0.6,)), **{**QUICK, "n": 50, "n_max": 200}, radii=(0, 0.25), say=said.append
    )
    assert json.loads(json.dumps(result)) == result
    names = [f["name"] for f in result["figures"]]
    assert len(set(names)) == len(names)
    for text in (
        "float32: engine / pure forward",
        "bfloat16: engine / pure forward",
        "float32: engine / reference loop",
        "bfloat16: engine / reference loop",
        "sound noise / Gaussian noise",
        "one stream shared",
        "share of the fixed plan's 300",
        "seconds per routed certificate, adaptive",
        "reference loop fixed / adaptive, seconds",
        "bfloat16 moves",
        "images certified by the fixed plan alone",
    ):
        assert any(text in name for name in names), text
    assert all(math.isfinite(f["value"]) and f["low"] <= f["value"] <= f["high"] for f in result["figures"])
    assert [(row["network"], row["n"], row["images"]) for row in result["scaling"]] == [("linear", 1000, 1)]
    assert [row["n"] for row in result["calls"]] == [100, 1000]
    assert all(row[key] > 0 for row in result["calls"] for key in ("first", "certify", "loop", "ratio"))
    assert len(said) == 6
    show(result)
    printed = capsys.readouterr().out
    assert "engine / pure forward" in printed
    assert "cost against work" in printed
    assert "one image a call" in printed


def test_the_reference_loop_counts_n_votes():
    x = torch.zeros(1, 6, 6)
    counts = reference_loop(expert(0.5).network().eval(), x, 0.5, 250, 3, batch=100)
    assert counts.sum() == 250
    assert np.count_nonzero(counts) > 1


def test_a_figure_knows_whether_it_is_where_it_is_meant_to_be():
    assert figure("a", [3.0, 1.0, 2.0], least=2.0) == Figure("a", 2.0, 1.0, 3.0, "", 2.0, None)
    assert figure("a", [2.0], least=2.0).met is True
    assert figure("a", [1.9], least=2.0).met is False
    assert figure("a", [1.1], most=1.0).met is False
    assert figure("a", [float("nan")], most=1.0).met is False
    assert figure("a", [1.9]).met is None


def test_work_is_timed_in_turn_after_one_round():
    calls = []
    times = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, CPU)
    assert calls == ["a", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_memory_growth_sees_the_peak():
    def work() -> None:  # mapped anew: a freed tensor's memory may still be there from another test
        with mmap.mmap(-1, 2**27) as memory:
            for _ in range(2**27 // 2**20):
                memory.write(bytes(2**20))

    grown = peak_growth(work, CPU)  # 128 MB, gone again at the end
    assert math.isnan(grown) or grown > 100
