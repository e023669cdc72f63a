"""How networks run: recorded, the same for every vote, and refused where it would not be."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from rsrouter import CascadeRouter, RoutedSmooth, Smooth
from rsrouter.core import NetworkError, VoteRequest
from rsrouter.core.errors import InputError
from rsrouter.experts import Expert, ExpertPool
from rsrouter.experts.preprocessing import Resize, Resized
from rsrouter.experts.small_resnet import SmallResNet
from rsrouter.jobs.certify import settled_batch
from rsrouter.process import KERNELS, fixed_kernels
from rsrouter.sampling import Engine, Execution, VoteModel, image_identity
from rsrouter.sampling.calibrate import DTYPES, calibrate
from rsrouter.sampling.engine import CHECK_EVERY
from rsrouter.sampling.execution import default_batch, instructions, native_dtype

SHAPE = (1, 6, 6)
LOW = ("bfloat16", "float16")


class Flat(nn.Module):
    """A linear layer on pixels."""

    def __init__(self, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(36, classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


def model(module, classes=4, digest="digest"):
    return VoteModel("net", module, 0.5, ("net",), (classes,), digest)


def draw(engine, n=200, image=None, start=0):
    x = torch.full((1, *SHAPE), 0.5) if image is None else image
    return engine.run(x, [image_identity(x[0])], [VoteRequest(0, "net", "estimate", start, n)])[0]["net"]


def engine(module, classes=4, **execution):
    return Engine([model(module, classes)], SHAPE, seed=0, execution=Execution(**execution))


def test_an_execution_is_a_file_and_every_record_of_one_can_be_read(tmp_path):
    chosen = Execution(batch=64, dtype="bfloat16", channels_last=False)
    assert Execution.load(chosen.save(tmp_path / "execution.json", measured=[1, 2])) == chosen
    (tmp_path / "table.json").write_text(json.dumps({"kind": "rsrouter-certificates", "execution": chosen.to_dict()}))
    assert Execution.load(tmp_path / "table.json") == chosen


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        '{"execution": 3}',
        '{"execution": {"turbo": true}}',
        '{"execution": {"batch": "64"}}',
        '{"execution": {"fold": 1}}',
        '{"execution": {"dtype": "int4"}}',
        '{"execution": {"batch": -1}}',
    ],
)
def test_a_file_that_is_no_execution_is_refused(tmp_path, text):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(InputError):
        Execution.load(tmp_path / "e.json")


def test_a_missing_execution_is_refused(tmp_path):
    with pytest.raises(InputError, match="No execution"):
        Execution.load(tmp_path / "nothing.json")


class Tied(nn.Module):
    """Two logits that float32 tells apart and bfloat16 does not."""

    def forward(self, x):
        one = x.flatten(1)[:, :1] * 0 + 1.0
        return torch.cat([one, one + 1e-4, one - 1.0], 1)


def test_tied_logits_vote_for_the_first():
    assert draw(engine(Tied(), 3, fold=False)).tolist() == [0, 200, 0, 0]
    assert draw(engine(Tied(), 3, fold=False, dtype="bfloat16")).tolist() == [200, 0, 0, 0]


class Overflows(nn.Module):
    """Logits that are too large for float16, or NaN, where a pixel is bright."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        flat = x.flatten(1)
        logits = torch.stack([flat[:, 0], -flat[:, 0]], 1)
        return torch.where((flat[:, 1] > 0.5)[:, None], torch.ones_like(logits) * self.value, logits)


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", float("nan")), ("float16", float("nan")), ("float16", 1e6)])
def test_what_a_small_dtype_cannot_hold_is_an_invalid_vote(dtype, value):
    row = draw(engine(Overflows(value), 2, dtype=dtype, fold=False), 2000)
    assert row.sum() == 2000
    assert abs(row[2] - 1000) < 5 * np.sqrt(500)


class Leans(Flat):
    """Depends on its batch by less than bfloat16 can tell from rounding."""

    def forward(self, x):
        logits = super().forward(x)
        return logits + 0.03 * (logits.mean(0, keepdim=True))


@pytest.mark.parametrize("dtype", ["float32", *LOW])
def test_rounding_hides_no_dependence_on_the_batch(dtype):
    with pytest.raises(NetworkError, match="rest of the batch"):
        draw(engine(Leans(), dtype=dtype, fold=False))


def test_low_precision_votes_are_about_the_float32_votes():
    torch.manual_seed(0)
    net = SmallResNet(4, 1, width=8, blocks=((8, 2),)).eval()
    x = torch.rand((1, *SHAPE), generator=torch.Generator().manual_seed(1))
    plain, small = (draw(engine(net, dtype=d), 2000, x) for d in ("float32", "bfloat16"))
    assert np.abs(plain - small).sum() / 2 < 0.05 * 2000  # the same noise: only votes near a border move


class Seen(Flat):
    """Notes the precision in force when it runs."""

    seen = None

    def forward(self, x):
        Seen.seen = (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
        return super().forward(x)


def test_reduced_float32_of_the_process_never_reaches_a_vote_and_is_put_back():
    expected = draw(engine(Flat()))
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.benchmark
    try:
        torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.benchmark = "bf16", True
        running = engine(Seen(), fold=False)
        assert (draw(running) == expected).all()
        assert Seen.seen == ("ieee", "ieee")
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert torch.backends.cudnn.benchmark
        with fixed_kernels(), fixed_kernels():  # several threads may draw at once
            pass
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.benchmark = before
    assert running.describe()["kernels"] == KERNELS


class Drifts(Flat):
    """Another function after some calls."""

    def __init__(self, after):
        super().__init__()
        self.calls, self.after = 0, after

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + (self.calls > self.after) * torch.tensor([0.0, 0.0, 1e-5, 0.0])


def test_a_network_that_changes_while_it_votes_is_refused():
    running = engine(Drifts(10), batch=10, fold=False)
    with pytest.raises(NetworkError, match="changed while it was voting"):
        draw(running, 10 * CHECK_EVERY)
    late = engine(Drifts(10), batch=10, fold=False)
    draw(late, 100)
    with pytest.raises(NetworkError, match="'net' changed"):
        late.check_again()
    steady = engine(Drifts(10**9), batch=10, fold=False)
    assert draw(steady, 10 * CHECK_EVERY).sum() == 10 * CHECK_EVERY
    steady.check_again()


def test_a_network_that_changes_ends_certify_and_predict():
    from rsrouter import Expert, FixedPlan, Smooth

    def smooth():
        expert = Expert(Drifts(6), sigma=0.5, num_classes=4, input_shape=SHAPE, name="e")
        return Smooth(expert, execution=Execution(batch=50, fold=False))

    x = torch.full((1, *SHAPE), 0.5)
    with pytest.raises(NetworkError, match="changed while it was voting"):
        smooth().certify(x, FixedPlan(50, 500))
    with pytest.raises(NetworkError, match="changed while it was voting"):
        smooth().predict(x, n=500)


def test_networks_changed_in_place_are_refused(tmp_path):
    """Digests, seeds and tables would stand for the weights that were."""
    from rsrouter import Expert, FixedPlan, Smooth
    from rsrouter.jobs import certify_table

    x, plan = torch.full((1, *SHAPE), 0.5), FixedPlan(50, 100)
    module = Flat()
    expert = Expert(module, sigma=0.5, num_classes=4, input_shape=SHAPE, name="e")
    smooth = Smooth(expert)
    before = smooth.certify(x, plan)
    old = module.fc.bias.data.clone()
    module.fc.bias.data += 1.0  # which no version counter sees
    table = tmp_path / "t.tsv"
    for use in (
        lambda: smooth.certify(x, plan),
        lambda: smooth.predict(x, n=50),
        lambda: certify_table(smooth, [(x[0], 1)], table, plan),
    ):
        with pytest.raises(NetworkError, match="'e' was changed after it was bound"):
            use()
    assert not table.exists()
    with pytest.raises(NetworkError, match="'e' was changed after it was wrapped"):
        Smooth(expert)
    module.fc.bias.data.copy_(old)
    assert smooth.certify(x, plan) == before


class OutOfMemory(Flat):
    """Runs out of memory above `limit` rows, or, where `after` is given, after so many calls."""

    def __init__(self, limit, after=None):
        super().__init__()
        self.limit, self.after, self.calls = limit, after, 0

    def forward(self, x):
        self.calls += 1
        if len(x) > self.limit and (self.after is None or self.calls > self.after):
            raise torch.OutOfMemoryError("too many rows")
        return super().forward(x)


def test_out_of_memory_halves_the_default_batch_before_the_first_vote_and_says_so():
    running = engine(OutOfMemory(40), fold=False)
    with pytest.warns(RuntimeWarning, match="ran out of memory"):
        assert draw(running).sum() == 200
    batch = running.describe()["execution"]["net"]["batch"]
    assert batch <= 40 < 2 * batch
    assert (draw(running) == draw(engine(Flat(), batch=batch))).all()
    with pytest.raises(NetworkError, match="ran out of memory"):
        draw(engine(OutOfMemory(0), fold=False))


def test_out_of_memory_at_a_recorded_batch_or_between_votes_is_an_error():
    with pytest.raises(NetworkError, match=r"ran out of memory.*--execution-batch"):
        draw(engine(OutOfMemory(40), batch=128, fold=False))
    running = engine(OutOfMemory(40, after=10**9), fold=False, channels_last=False)
    draw(running, 100)
    running.runner("net").prepared.module.after = 0
    with pytest.raises(NetworkError, match="which this run is recorded with"):
        draw(running, 5000)


def test_calibration_measures_what_it_may_choose_from():
    networks = [model(Flat()), VoteModel("other", Flat(), 0.25, ("other",), (4,), "digest")]
    best, timings = calibrate(networks, SHAPE, dtypes=DTYPES, batches=(20, 40), repeats=1)
    assert [(t.execution.dtype, t.execution.batch) for t in timings] == [(d, b) for d in DTYPES for b in (20, 40)]
    assert best == max(timings, key=lambda t: t.rows_per_second).execution
    assert all(t.rows_per_second > 0 for t in timings)
    only, _ = calibrate(networks[:1], SHAPE, base=Execution(channels_last=False), batches=(8,), repeats=1)
    assert only == Execution(batch=8, channels_last=False)
    assert default_batch(3 * 224 * 224, torch.device("cpu")) == 10


def test_the_default_batch_is_about_the_pixels_that_a_network_sees():
    large = nn.Sequential(Resized(Resize(size=(128, 128))), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    small, device = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), torch.device("cpu")
    told = {"sigma": 0.25, "num_classes": 3, "input_shape": SHAPE}
    experts = [Expert(large, name="large", **told), Expert(small, name="small", **told)]
    alone = Smooth(experts[1])
    both = RoutedSmooth(ExpertPool(experts), CascadeRouter([0.6]))
    for smoothed, numel in ((alone, 36), (both, 128 * 128)):
        expected = default_batch(numel, device)
        running = Engine(smoothed.routed.models, SHAPE, seed=0)
        assert settled_batch(smoothed, None) == running.forward_batch == expected
        assert {running.runner(name).batch for name in running.models} == {expected}  # one for all of a classifier's networks
    assert default_batch(36, device) > default_batch(128 * 128, device)


def test_calibration_stops_at_what_fits():
    best, timings = calibrate([model(OutOfMemory(30))], SHAPE, base=Execution(fold=False), batches=(10, 20, 40), repeats=1)
    assert [t.execution.batch for t in timings] == [10, 20]
    assert best.batch in (10, 20)
    with pytest.raises(InputError, match="No batch fits"):
        calibrate([model(OutOfMemory(5))], SHAPE, base=Execution(fold=False), batches=(10,), repeats=1)
    with pytest.raises(NetworkError, match="rest of the batch"):
        calibrate([model(Leans())], SHAPE, base=Execution(fold=False), batches=(10,), repeats=1)


def test_calibrate_stores_an_execution_that_certify_reads_and_a_table_keeps(tmp_path):
    from typer.testing import CliRunner

    from rsrouter import RoutedSmooth
    from rsrouter.cli import app
    from rsrouter.cli.execution import choose_execution
    from rsrouter.core.errors import ResultsError
    from rsrouter.experts import ExpertPool
    from tests.helpers import small_router as small

    pool = ExpertPool([small.expert(0.25), small.expert(0.5, tilt=0.01)])
    small.routed(pool).save_pretrained(tmp_path / "router")
    digest = RoutedSmooth.from_pretrained(tmp_path / "router").digest

    def rsrouter(*words):
        return CliRunner().invoke(app, [str(w) for w in words])

    out = tmp_path / "execution.json"
    done = rsrouter("calibrate", tmp_path / "router", "--dtype", "bfloat16", "--out", out, "--save", "--repeats", 1)
    assert done.exit_code == 0, done.output
    chosen = Execution.load(out)
    assert chosen.dtype == "bfloat16"
    assert chosen.batch > 0
    stored = RoutedSmooth.from_pretrained(tmp_path / "router")
    assert (stored.execution, stored.digest) == (chosen, digest)
    assert choose_execution(Execution(), out, None, 8) == Execution(**{**chosen.to_dict(), "batch": 8})
    again = rsrouter("calibrate", tmp_path / "router", "--out", out)
    assert isinstance(again.exception, InputError)

    np.savez(tmp_path / "data.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.zeros(2, np.int64))
    job = ["certify", tmp_path / "router", "--data", tmp_path / "data.npz", "--plan", "fixed", "--n", 100, "--radii", 0]
    table = tmp_path / "run" / "certificates.tsv"
    assert rsrouter(*job, "--out", table, "--execution-batch", 40).exit_code == 0
    metadata = json.loads(table.with_suffix(".json").read_text())
    assert (metadata["execution"]["dtype"], metadata["execution"]["batch"]) == ("bfloat16", 40)
    assert metadata["kernels"] == KERNELS
    other = rsrouter(*job, "--out", table, "--execution-batch", 40, "--dtype", "float32")
    assert isinstance(other.exception, ResultsError)
    assert "execution.dtype" in str(other.exception)
    assert rsrouter(*job, "--out", table, "--execution", table.with_suffix(".json")).exit_code == 0
    answers = rsrouter("predict", tmp_path / "router", "--data", tmp_path / "data.npz", "--n", 50, "--execution", out)
    assert answers.exit_code == 0
    assert isinstance(rsrouter("calibrate", tmp_path / "no.json", "--save").exception, InputError)


def test_the_native_dtype_is_a_fact_of_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False}, raising=False)
    assert native_dtype() == native_dtype("cpu") == "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    assert native_dtype() == "float32"
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert native_dtype() == "float32"
    with pytest.raises(InputError):
        native_dtype("nonsense")


def test_instructions_tell_processors_of_other_kernels_apart(monkeypatch):
    capability = torch.backends.cpu.get_cpu_capability()
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    told = []
    for flags in ({}, {"avx512_bf16": True}, {"avx512_bf16": True, "amx_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        told.append(instructions())
    assert told == [capability, f"{capability} BF16", f"{capability} BF16 AMX-BF16"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert instructions() == f"{capability} BF16 AMX-BF16 oneDNN<=AVX2"
