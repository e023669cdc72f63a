"""`rsrouter bench --peers`: every way certifies the same image, and what is not installed is named. No time is asserted."""

from __future__ import annotations

import json
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from rsrouter import Expert, FixedPlan, Smooth
from rsrouter.bench import peers
from rsrouter.bench.peers import (
    art_certify,
    art_smoothed,
    compare_peers,
    missing,
    one_thread,
    papers_certify,
    peer_costs,
)
from rsrouter.cli.bench import show_peers

CPU = torch.device("cpu")
IMAGES = torch.rand((2, 1, 6, 6), generator=torch.Generator().manual_seed(0))


def expert(bias: float = 0.0) -> Expert:
    torch.manual_seed(0)
    linear = nn.Linear(36, 3)
    linear.bias.data[1] += bias
    return Expert(nn.Sequential(nn.Flatten(), linear), sigma=0.5, num_classes=3, input_shape=(1, 6, 6), name="small")


class FakeART:
    """What `PyTorchRandomizedSmoothing` is called with, and how it answers."""

    made: ClassVar[list[dict[str, object]]] = []

    def __init__(self, **settings: object) -> None:
        self.made.append(settings)

    def certify(self, x: np.ndarray, n: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        assert x.shape == (1, 1, 6, 6)
        self.made.append({"n": n, "batch_size": batch_size})
        return np.array([1]), np.array([0.25])


@pytest.fixture
def fake_art(monkeypatch: pytest.MonkeyPatch) -> type[FakeART]:
    module = types.ModuleType("randomized_smoothing")
    module.PyTorchRandomizedSmoothing = FakeART
    for name in ("art", "art.estimators", "art.estimators.certification", "art.estimators.certification.randomized_smoothing"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(FakeART, "made", [])
    return FakeART


def test_art_gets_the_same_certificate_to_make(fake_art: type[FakeART]) -> None:
    rows = peer_costs(expert(), IMAGES, CPU, n=100, n0=20, repeats=2)
    ways = [row.way for row in rows]
    assert ways[:3] == ["engine, fixed", "engine, adaptive", "papers' loop, batches of 1000"]
    assert "ART, batches of 32" in ways
    settings = fake_art.made[0]
    assert (settings["scale"], settings["alpha"], settings["sample_size"], settings["nb_classes"]) == (0.5, 0.001, 20, 3)
    assert (settings["input_shape"], settings["device_type"]) == ((1, 6, 6), "cpu")
    assert {entry["n"] for entry in fake_art.made[1:]} == {100}
    assert next(row.radius for row in rows if row.way == "ART, batches of 32") == 0.25
    assert rows[0].ratio == rows[0].low == rows[0].high == 1.0
    assert missing(rows) == ""


def test_without_art_the_rest_is_measured_and_it_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "art", None)
    monkeypatch.setattr(peers, "random_expert", lambda *_: expert())
    monkeypatch.setattr(peers, "DRAWN", IMAGES)
    rows = compare_peers(expert(), IMAGES, CPU, n=100, repeats=1)
    assert not any(row.way.startswith("ART") for row in rows)
    assert "pip install adversarial-robustness-toolbox" in missing(rows)
    found = {"n": 100, "peers": [vars(row) for row in rows], "missing": missing(rows)}
    assert json.loads(json.dumps(found)) == found
    show_peers(found)
    printed = capsys.readouterr().out
    assert "papers' loop, batches of 1000" in printed
    assert "pip install" in printed


def test_the_papers_certificate_is_cohens() -> None:
    """A class that wins nearly always: both certify the largest radius of so many votes."""
    sure = expert(bias=50.0)
    found = papers_certify(sure.network().eval(), sure, 200, 20, 1000)(IMAGES[0])
    (ours,) = Smooth(sure).certify(IMAGES[:1], FixedPlan(20, 200))
    assert found == (ours.predict, pytest.approx(ours.radius))
    torn = papers_certify(nn.Sequential(nn.Flatten(), Torn()), sure, 200, 20, 1000)(IMAGES[0])
    assert torn == (-1, 0.0)


class Torn(nn.Module):
    """Votes for three classes, a third each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot((x.sum(1) * 1000).long() % 3, 3).float()


def test_one_thread_is_given_back() -> None:
    before = torch.get_num_threads()
    seen = []

    def fails() -> None:
        with one_thread():
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_the_real_art_certifies_as_we_do() -> None:
    pytest.importorskip("art.estimators.certification.randomized_smoothing")
    sure = expert(bias=50.0)
    smoothed = art_smoothed(sure.network().eval(), sure, 20, CPU)
    (ours,) = Smooth(sure).certify(IMAGES[:1], FixedPlan(20, 200))
    assert art_certify(smoothed, 200, 32)(IMAGES[0]) == (ours.predict, pytest.approx(ours.radius))
