"""int8: exact whole numbers, the same bits in every batch, recorded ranges; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from rsrouter import Execution, ExpertPool, FixedPlan, InputError, NetworkError, ResultsError, RoutedSmooth, Smooth
from rsrouter.cli import app
from rsrouter.demo import load_pool, load_slice
from rsrouter.jobs import certify_table, transfer_table
from rsrouter.results import read_table, require_sound
from rsrouter.router.base import vote_model
from rsrouter.sampling.calibrate import measure_ranges
from rsrouter.sampling.engine import VoteModel
from rsrouter.sampling.execution import prepare
from rsrouter.sampling.int8 import MOST_SUMMANDS, Int8Layer, Ranges, fingerprint, quantisable, quantise, watched_ranges
from tests.helpers import small_router as small

CPU = torch.device("cpu")
RANGES = Ranges.of({"0" * 16: {"0": (-1.0, 1.0)}})


def routed() -> RoutedSmooth:
    return small.routed(ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)]))


def in_int8(smoothed: RoutedSmooth, seed: int = 0) -> Execution:
    return measure_ranges(smoothed.routed.models, small.images(6, seed=3).batch(range(6))[0], seed=seed)


LAYERS = {
    "3x3": nn.Conv2d(3, 8, 3, padding=1),
    "stride, no bias": nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
    "dilation": nn.Conv2d(3, 8, 3, dilation=2, padding=(2, 1)),
    "groups": nn.Conv2d(3, 6, 3, groups=3),
    "1x1": nn.Conv2d(3, 8, 1),
    "linear": nn.Linear(9, 5),
    "linear of tokens": nn.Linear(9, 5, bias=False),
}


@pytest.mark.parametrize("kind", LAYERS)
@torch.inference_mode()
def test_a_layer_is_exact_and_a_row_has_its_bits_in_every_batch(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = {"linear": (9,), "linear of tokens": (4, 9)}.get(kind, (3, 9, 9))
    x = 2 * torch.randn((50, *shape), generator=generator)
    layer = Int8Layer(LAYERS[kind], -5.0, 7.0)
    found = layer(x)
    rows = x if layer.convolution is not None else x.reshape(-1, 9)
    exact = layer.exact(layer.whole(rows)).reshape(found.shape)
    assert float((found - exact).abs().max()) <= 1e-6 * float(exact.abs().max())
    plain = LAYERS[kind](x.clamp(-5.0, 7.0))
    assert float((found - plain).abs().mean()) < 0.05 * float(plain.abs().mean())
    for size in (1, 3, 25):
        assert torch.equal(layer(x[:size]), found[:size])
    if x.dim() == 4:
        last = layer(x.contiguous(memory_format=torch.channels_last))
        assert torch.equal(last, found)
        assert found.is_contiguous()
    layer.check(x, kind)


@torch.inference_mode()
def test_the_largest_sums_do_not_saturate() -> None:
    """All inputs and weights at their limit: with eight bits of input vpmaddubsw would cut pairs off at 32,767."""
    conv = nn.Conv2d(64, 4, 3, bias=False)
    conv.weight.fill_(1.0)
    layer = Int8Layer(conv, 0.0, 1.0)
    assert layer(torch.ones(2, 64, 3, 3)).flatten().tolist() == pytest.approx([576.0] * 8, rel=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(392, 100), (100, 10), (8, 1), (3072, 10), (5000, 4)])
def test_a_row_of_a_linear_layer_is_the_same_in_every_batch(shape: tuple[int, int]) -> None:
    """With AMX, oneDNN takes other kernels for a few rows, which round differently, also the sums that float32 cannot hold."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(*shape)
    linear.weight.copy_(0.5 + 0.5 * torch.rand(shape[1], shape[0], generator=generator))  # of one sign: the sums are large
    layer = Int8Layer(linear, -0.5, 1.0)
    levels = layer.whole(torch.rand(80, shape[0], generator=generator) * 1.5 - 0.5)
    whole = layer.multiply(levels)
    assert all(torch.equal(whole[:rows], layer.multiply(levels[:rows].clone())) for rows in range(1, 80))
    sums = (levels.double() - layer.zero) @ layer.levels.double().T
    if shape[0] <= MOST_SUMMANDS:
        assert torch.equal(whole, sums.float() * layer.scales + layer.shift)
    assert whole.double().numpy() == pytest.approx((sums * layer.scales.double() + layer.shift).numpy(), rel=1e-6, abs=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("layer", [nn.Conv2d(64, 64, 1), nn.Conv2d(256, 16, 3), nn.Conv2d(32, 32, 3, groups=8)])
def test_a_row_of_a_convolution_is_the_same_in_every_batch(layer: nn.Conv2d) -> None:
    """On maps of few pixels a convolution is a product of matrices of few rows."""
    made = Int8Layer(layer, -0.5, 1.0)
    side = layer.kernel_size[0]
    x = torch.rand(40, layer.in_channels, side, side, generator=torch.Generator().manual_seed(0)) * 1.5 - 0.5
    for last in (False, True):
        levels = made.whole(x.contiguous(memory_format=torch.channels_last) if last else x)
        whole = made.multiply(levels)
        assert all(torch.equal(whole[:rows], made.multiply(levels[:rows].clone())) for rows in range(1, 40))
        made.check(x, "it")


def test_grouped_convolutions_of_many_summands_stay_float32() -> None:
    assert quantisable(nn.Conv2d(230, 4, 3, groups=2))
    assert not quantisable(nn.Conv2d(232, 4, 3, groups=2))
    assert quantisable(nn.Conv2d(512, 4, 3))


def test_layers_may_be_called_by_the_name_of_their_input() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.f(input=x.flatten(1))
            return found

    found: dict[str, tuple[float, float]] = {}
    net, x = Named(), torch.rand(8, 1, 2, 2)
    with torch.no_grad(), watched_ranges(net, found):
        expected = net(x)
    made = quantise(net, found, x, "net")
    assert made(x).detach().numpy() == pytest.approx(expected.numpy(), abs=0.05)


@pytest.mark.parametrize(("wrong", "said"), [("saturates", "do not multiply exactly"), ("batch", "batches of another size")])
def test_kernels_that_are_not_exact_are_refused(monkeypatch: pytest.MonkeyPatch, wrong: str, said: str) -> None:
    right = Int8Layer.multiply

    def kernel(self: Int8Layer, levels: torch.Tensor) -> torch.Tensor:
        found = right(self, levels)
        full = (levels == 127).all(1, keepdim=True)
        return torch.where(full, 0.9 * found, found) if wrong == "saturates" else found * (1 + 1e-6 * len(levels))

    monkeypatch.setattr(Int8Layer, "multiply", kernel)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(NetworkError, match=said):
        quantise(net, {"1": (-1.0, 1.0)}, torch.rand(8, 1, 4, 4), "net")


@torch.inference_mode()
def test_what_is_not_finite_stays_invalid() -> None:
    layer = Int8Layer(nn.Conv2d(1, 2, 3), -1.0, 1.0)
    x = torch.rand(5, 1, 4, 4)
    fine = layer(x)
    x[1, 0, 0, 0], x[3, 0, 3, 3] = torch.nan, torch.inf
    found = layer(x)
    assert found[[1, 3]].isnan().all()
    assert torch.equal(found[[0, 2, 4]], fine[[0, 2, 4]])


def test_the_demos_expert_mostly_votes_as_in_float32_and_packs() -> None:
    expert = load_pool()["sigma_0.5"]
    x = load_slice("train").batch(range(24))[0]
    execution = measure_ranges([vote_model(expert)], x[:12])
    plain, whole = (prepare(expert.network(), e.on(CPU), CPU, expert.input_shape, expert.name) for e in (Execution(), execution))
    assert sum(isinstance(m, Int8Layer) for m in whole.module.modules()) == 4
    noisy = x[12:].repeat_interleave(20, 0)
    noisy = noisy + expert.sigma * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        a, b = plain(noisy), whole(noisy)
        assert not torch.equal(a, b)
        assert float((a.argmax(1) == b.argmax(1)).float().mean()) > 0.95
        for size in (1, 7, 100):
            assert torch.equal(whole(noisy[:size]), b[:size])
    smooth = Smooth(expert, execution=execution)
    (one,) = smooth.certify(x[12:13], FixedPlan(20, 300))
    other = Smooth(expert, execution=replace(execution, batch=100)).certify(x[12:13], FixedPlan(20, 300))
    assert [one] == other  # the batch changes no bit
    assert smooth.engine(0).describe()["execution"][expert.name]["packs"]


def test_ranges_are_recorded_and_read_back(tmp_path: Path) -> None:
    execution = in_int8(routed())
    assert Execution.load(execution.save(tmp_path / "e.json")) == execution
    assert hash(execution) == hash(Execution.load(tmp_path / "e.json"))
    assert "ranges" not in Execution().to_dict()
    assert execution.with_numbers("bfloat16") == Execution(dtype="bfloat16")
    stored = json.loads((tmp_path / "e.json").read_text())["execution"]["ranges"]
    assert len(stored) == 3
    for layers in stored.values():
        low, high = layers["1"]
        assert low <= 0.0 < high


@pytest.mark.parametrize(
    "ranges",
    [
        {"a": {}},
        {"a": {"0": [0.5, 1.0]}},
        {"a": {"0": [-1.0, 1.0, 2.0]}},
        {"a": {"0": [-1.0, float("nan")]}},
        {"a": {"0": [0.0, 0.0]}},
        {"a": {"0": [-1, 1]}},
        {"a": 3},
        {},
        "x",
    ],
)
def test_ranges_that_are_none(ranges: object) -> None:
    with pytest.raises(InputError):
        Execution.from_dict({**Execution().to_dict(), "dtype": "int8", "ranges": ranges})


def test_int8_is_calibrated_and_runs_on_a_cpu_as_it_is() -> None:
    for make in (
        lambda: Execution(dtype="int8"),
        lambda: Execution().with_numbers("int8"),
        lambda: Execution(dtype="int8", ranges=RANGES, compile=True),
    ):
        with pytest.raises(InputError, match="calibrate"):
            make()
    with pytest.raises(InputError, match="does not run on cuda"):
        Execution(dtype="int8", ranges=RANGES).on(torch.device("cuda"))


def test_other_networks_and_other_layers_are_refused() -> None:
    with pytest.raises(InputError, match="has no int8 ranges"):
        Smooth(small.expert(0.25), execution=Execution(dtype="int8", ranges=RANGES)).certify(
            small.images(1).batch([0])[0], FixedPlan(10, 100)
        )
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(InputError, match="of other layers"):
        quantise(net, {"2": (-1.0, 1.0)}, torch.rand(2, 1, 4, 4), "net")
    assert fingerprint(net) != fingerprint(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))


class Reads(nn.Module):
    """Reads the weight of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1)) * self.fc.weight.norm()


def test_a_network_that_reads_weights_is_refused() -> None:
    with pytest.raises(NetworkError, match="cannot run in int8"):
        quantise(Reads(), {"fc": (-1.0, 1.0)}, torch.rand(4, 1, 4, 4), "net")


def test_nothing_to_measure() -> None:
    model = VoteModel("flat", nn.Flatten(), 0.5, ("flat",), (16,), "d")
    with pytest.raises(InputError, match="nothing that runs in int8"):
        measure_ranges([model], torch.rand(2, 1, 4, 4))
    with pytest.raises(InputError, match="needs images"):
        measure_ranges(routed().routed.models, torch.rand(0, 1, 4, 4))


def test_a_table_is_resumed_with_its_own_ranges_only(tmp_path: Path) -> None:
    whole, data = routed(), small.images(4)
    execution = in_int8(whole)
    table = tmp_path / "t.tsv"
    certify_table(whole.with_execution(execution), data, table, small.PLAN, indices=range(2), threads=1)
    full = certify_table(whole.with_execution(execution), data, tmp_path / "u.tsv", small.PLAN, threads=1)
    again = certify_table(whole.with_execution(execution), data, table, small.PLAN, indices=range(2), threads=1)
    assert again.counts_text.tolist() == full.counts_text.tolist()[:2]
    assert require_sound(read_table(table)).about.execution["ranges"] == execution.ranges.to_dict()
    other = in_int8(whole, seed=1)
    assert other != execution
    for wrong in (other, Execution()):
        with pytest.raises(ResultsError):
            certify_table(whole.with_execution(wrong), data, table, small.PLAN, indices=range(2), threads=1)


def test_a_float32_table_is_transferred(tmp_path: Path) -> None:
    whole, data = routed(), small.images(4)
    before = certify_table(whole, data, tmp_path / "a.tsv", small.PLAN)
    after = transfer_table(whole, data, tmp_path / "a.tsv", tmp_path / "b.tsv", in_int8(whole), votes=500)
    assert require_sound(after).about.transfer.execution["dtype"] == "int8"
    assert (after.radius <= before.radius).all()
    assert np.count_nonzero(after.radius) > 0


@pytest.mark.usefixtures("small_batches")
def test_calibrate_measures_ranges_on_data_and_refuses_to_guess(tmp_path: Path) -> None:
    load = load_pool()
    ExpertPool([load["sigma_0.5"]]).save(tmp_path / "pool.json")
    words = ["calibrate", str(tmp_path / "pool.json"), "--dtype", "int8", "--repeats", "1", "--out", str(tmp_path / "e.json")]
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, InputError)
    assert "--data" in str(refused.exception)
    done = CliRunner().invoke(app, [*words, "--data", "demo", "--count", "8", "--format", "json"])
    assert done.exit_code == 0, done.exception
    execution = Execution.load(tmp_path / "e.json")
    assert execution.dtype == "int8"
    assert {m["dtype"] for m in json.loads(done.stdout)["measured"]} == {"float32", "int8"}
    Smooth(load["sigma_0.5"], execution=replace(execution, batch=50)).certify(load_slice("test").batch([0])[0], FixedPlan(10, 50))
