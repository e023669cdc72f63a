"""Guards around the votes: what a user sets, what layout a module takes, what is compared, and whom an error names."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rsrouter import Execution, Expert, FixedPlan, Smooth, Terms
from rsrouter.core import NetworkError, VoteRequest
from rsrouter.core.errors import InputError
from rsrouter.experts.small_resnet import SmallResNet
from rsrouter.process import KERNELS, disturbed, fixed_kernels, usual_settings
from rsrouter.sampling import Engine, VoteModel
from rsrouter.sampling.execution import prepare
from rsrouter.sampling.logits import moved, votes_of

SHAPE = (1, 8, 8)
X = torch.rand((2, *SHAPE), generator=torch.Generator().manual_seed(1))


class Everything(nn.Module):
    """Convolutions, attention, and tensors made in the forward pass, in the default dtype and on the default device."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallResNet(8, 1, width=8, blocks=((8, 1),))
        self.register_buffer("usual", torch.zeros(4))
        self.layer, self.fc = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([self.net(x), self.net(x.flip(2))], 1) * torch.arange(2)[:, None].add(1).div(3)
        return self.fc(self.layer(tokens + torch.linspace(0, 1, 8)).mean(1)) - self.usual


def everything() -> Everything:
    """With logits around zero, so that votes are close."""
    module = Everything().eval()
    with torch.no_grad():
        noisy = X[:1] + 0.5 * torch.randn((400, *SHAPE), generator=torch.Generator().manual_seed(0))
        module.usual += module(noisy).mean(0)
    return module


def engine(module: nn.Module, **execution: Any) -> Engine:
    model = VoteModel("net", module, 0.5, ("net",), (4,), "digest")
    return Engine([model], SHAPE, seed=0, execution=Execution(**{"batch": 40, **execution}))


def votes(running: Engine, n: int = 400) -> list[list[int]]:
    requests = [VoteRequest(i, "net", "estimate", 0, n) for i in range(2)]
    return [r["net"].tolist() for r in running.run(X, [b"a", b"b"], requests)]


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def medium() -> Iterator[None]:
    b: Any = torch.backends
    knobs = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.conv, b.mkldnn.matmul, b.mkldnn.rnn]
    before = [knob.fp32_precision for knob in knobs]
    torch.set_float32_matmul_precision("medium")
    b.mkldnn.conv.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value


@contextlib.contextmanager
def other_kernels() -> Iterator[None]:
    b: Any = torch.backends
    b.cudnn.benchmark, b.mha.set_fastpath_enabled(False), b.cuda.enable_flash_sdp(False)
    b.mkldnn.enabled = False
    try:
        yield
    finally:
        b.mha.set_fastpath_enabled(True)
        b.cuda.enable_flash_sdp(True)
        b.mkldnn.enabled = True


@contextlib.contextmanager
def no_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


AROUND: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
    "gradients off": torch.no_grad,
    "gradients on": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "deterministic algorithms": deterministic,
    "medium precision": medium,
    "other kernels": other_kernels,
    "denormals flushed": no_denormals,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("when", ["throughout", "while it votes"])
def test_what_is_set_around_the_call_changes_no_vote(around: str, when: str) -> None:
    module = everything()
    expected, running = votes(engine(module)), engine(module)
    assert sorted(expected[0])[-1] < 300  # close, so that rounding would show
    if when == "while it votes":
        votes(running, 3)
    with AROUND[around]():
        before = {name: read() for name, (read, _) in _knobs().items()}
        got = votes(engine(module) if when == "throughout" else running)
        assert {name: read() for name, (read, _) in _knobs().items()} == before
    assert got == expected


def _knobs() -> dict[str, Any]:
    from rsrouter import process

    return process._KNOBS


@pytest.mark.parametrize("around", ["autocast", "default dtype", "default device", "inference mode", "gradients off"])
def test_certificates_do_not_depend_on_it_either(around: str) -> None:
    module = everything()

    def certify() -> list[Any]:
        expert = Expert(module, sigma=0.5, num_classes=4, input_shape=SHAPE, name="e")
        return Smooth(expert).certify(X, Terms(FixedPlan(50, 300), seed=1))

    expected = certify()
    with AROUND[around]():
        assert certify() == expected


def test_the_demo_votes_the_same_under_autocast() -> None:
    from rsrouter.demo import load_pool, load_slice

    expert = load_pool()[0]
    x, _ = load_slice("test").batch(range(40, 48))
    x = 0.5 * x + 0.5 * x.flip(0)
    plain = Smooth(expert).certify(x, Terms(FixedPlan(50, 500), seed=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Smooth(expert).certify(x, Terms(FixedPlan(50, 500), seed=1)) == plain


def test_training_mode_set_by_another_thread_reaches_no_vote() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(64, 4)).eval()
    expected, running, stop = votes(engine(module)), engine(module), threading.Event()

    def toggle() -> None:
        while not stop.is_set():
            module.train()
            module.eval()

    beside = threading.Thread(target=toggle)
    beside.start()
    try:
        assert [votes(running) for _ in range(3)] == [expected] * 3
        assert votes(engine(module)) == expected
    finally:
        stop.set()
        beside.join()


class Sets(nn.Module):
    """Changes a setting of the process in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        return self.fc(x.flatten(1))


def test_settings_that_change_while_votes_are_drawn_are_noticed() -> None:
    try:
        with pytest.raises(NetworkError, match=r"Settings of the process changed.*float32\.mkldnn\.matmul"):
            votes(engine(Sets()))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"


def test_settings_inside_settings_are_those_outside() -> None:
    """Whoever comes later, under the same settings, reads and writes none of them, and leaves them as they are."""
    torch.use_deterministic_algorithms(True)
    try:
        with fixed_kernels():
            assert not torch.are_deterministic_algorithms_enabled()
            with fixed_kernels():
                assert not torch.are_deterministic_algorithms_enabled()
                torch.backends.cudnn.enabled = not torch.backends.cudnn.enabled  # somebody else's, from here on
            assert disturbed() == ["cudnn"]
            torch.backends.cudnn.enabled = not torch.backends.cudnn.enabled
            assert disturbed() == []
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_settings_are_put_back_by_the_last_thread_and_left_where_someone_else_sets_them() -> None:
    with default_dtype():
        with fixed_kernels():
            with usual_settings():
                assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_dtype() == torch.float32
            assert disturbed() == []
        assert torch.get_default_dtype() == torch.float64
        with fixed_kernels():
            torch.set_default_dtype(torch.float16)
            assert disturbed() == ["default_dtype"]
        assert torch.get_default_dtype() == torch.float16
    assert engine(Everything()).describe()["kernels"] == KERNELS


class CachesTensor(nn.Module):
    """Takes the same tensor for the same content; engines write the next batch into it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.key, self.value = nn.Linear(64, 4), 0, None

    def forward(self, x: Tensor) -> Tensor:
        if self.key != x.data_ptr() or self.value is None:
            self.key, self.value = x.data_ptr(), self.fc(x.flatten(1))
        return self.value


def test_a_cache_by_address_is_noticed() -> None:
    with pytest.raises(NetworkError, match=r"rest of the batch|changed"):
        votes(engine(CachesTensor(), channels_last=False))


def test_what_only_real_votes_show_is_noticed_while_they_are_drawn() -> None:
    """Batch statistics that act on images of a kind that no check makes up: here, with one pixel of a certain value."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x.flatten(1))
            real = ((x.mean((1, 2, 3)) - 20.0).abs() < 1.0)[:, None]
            return torch.where(real, z - 2.0 * z.mean(0), z)

    model = VoteModel("net", Odd(), 0.5, ("net",), (4,), "digest")
    running = Engine([model], SHAPE, seed=0, execution=Execution(batch=40))
    running.runner("net")
    with pytest.raises(NetworkError, match="rest of the batch"):
        running.run(torch.full((1, *SHAPE), 20.0), [b"a"], [VoteRequest(0, "net", "estimate", 0, 100)])


class Flat(nn.Module):
    """`.view` after a convolution, on a map larger than 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).view(x.size(0), -1))


def test_a_layout_that_a_module_does_not_take_is_not_used_and_that_is_recorded() -> None:
    running, plain = engine(Flat()), engine(Flat(), channels_last=False)
    assert votes(running) == votes(plain)
    ran = running.describe()["execution"]["net"]
    assert (ran["channels_last"], ran["fold"], ran["batch"]) == (False, True, 40)
    folded = engine(SmallResNet(4, 1, width=8, blocks=((8, 1),)).eval())
    votes(folded)
    assert {**folded.describe()["execution"]["net"], "packs": True} == {
        **Execution(batch=40).on(torch.device("cpu")).to_dict(),
        "packs": True,
    }


def test_windows_of_a_swin_transformer_are_certified() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=4, depths=(1, 1, 2, 1), embed_dim=8, num_heads=(1, 1, 1, 1), img_size=112
    )
    expert = Expert(net.eval(), sigma=0.5, num_classes=4, input_shape=(3, 112, 112))
    x = torch.rand(1, 3, 112, 112)
    terms, answers = Terms(FixedPlan(4, 8), alpha=0.5, seed=0), []
    for fold, last in ((True, True), (True, False), (False, True)):
        smooth = Smooth(expert, execution=Execution(batch=4, fold=fold, channels_last=last))
        answers += smooth.certify(x, terms)
    assert len({a.predict for a in answers}) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_plain_tensors_of_another_dtype_are_refused_where_they_would_stay(dtype: str) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    module.offset = [torch.zeros(3)]  # type: ignore[assignment]
    with pytest.raises(NetworkError, match=r"keeps weights outside parameters.*'offset'.*register_buffer"):
        votes(engine(module, dtype=dtype))
    assert sum(votes(engine(module))[0]) == 400


def test_errors_of_a_forward_pass_name_the_network() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise IndexError("of what")

    expert = Expert(Wrong(), sigma=0.5, num_classes=4, input_shape=SHAPE, name="broken")
    for use in (lambda s: s.certify(X, FixedPlan(5, 50)), lambda s: s.predict(X, n=10)):
        with pytest.raises(NetworkError, match=r"network 'broken' failed.*IndexError: of what") as refused:
            use(Smooth(expert))
        assert isinstance(refused.value.__cause__, IndexError)


def test_a_network_that_fails_later_is_named_too() -> None:
    class Late(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            Late.calls += 1
            if Late.calls > 12:
                raise RuntimeError("no more")
            return self.fc(x.flatten(1))

    with pytest.raises(NetworkError, match=r"network 'net' failed.*no more"):
        votes(engine(Late()), 4000)


def test_numbers_of_numpy_are_numbers() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    expert = Expert(module, sigma=np.float32(0.5), num_classes=np.int64(4), input_shape=np.array(SHAPE))
    plain = Expert(module, sigma=0.5, num_classes=4, input_shape=SHAPE)
    assert (expert.sigma, expert.num_classes, expert.input_shape) == (plain.sigma, plain.num_classes, plain.input_shape)
    assert expert.digest == plain.digest
    assert Execution(batch=np.int32(40)) == Execution(batch=40)
    assert type(Execution(batch=np.int32(40)).batch) is int


def test_one_logit_is_told_how_to_become_two() -> None:
    with pytest.raises(InputError, match=r"one logit.*torch\.cat\(\[torch\.zeros_like\(z\), z\], 1\)"):
        Expert(nn.Linear(1, 1), sigma=0.5, num_classes=1, input_shape=SHAPE)


def test_lazy_modules_are_refused_before_anything_reads_them() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(4)
    with pytest.raises(NetworkError, match=r"without values.*run the module once"):
        Expert(lazy, sigma=0.5, num_classes=4, input_shape=SHAPE)


def rows(*rows: list[float]) -> tuple[Tensor]:
    return (torch.tensor(rows),)


BASE = [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 3.0, 0.5], [0.3, 0.1, 0.2]]


@pytest.mark.parametrize("mask", [None, -1e3, -1e4, -1e9, -3e38, -math.inf])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_no_mask_scale_or_shift_hides_a_difference(mask: float | None, scale: float, shift: float) -> None:
    u = (torch.tensor(BASE) + shift) * scale
    step, ulps = torch.tensor([[0.05, 0.0, -0.05]]) * scale, (1 + 1e-7 * torch.tensor([[1.0, -1.0, 1.0]]))
    masked = [u, u + step, u * ulps]
    if mask is not None:
        masked = [torch.cat([m, torch.full((4, 1), mask)], 1) for m in masked]
    plain, other, rounded = masked
    assert not moved((plain,), (other,)).is_rounding("float32")
    assert moved((plain,), (rounded,)).is_rounding("float32")
    assert not moved((plain,), (plain.flip(0),)).is_rounding("float32")
    assert moved((plain,), (plain.clone(),)).equal


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_a_number_in_one_run_alone_is_a_difference(value: float) -> None:
    plain = torch.tensor(BASE)
    other = plain.clone()
    other[1, 0] = value
    assert moved((plain,), (other,)).pattern
    assert moved((other,), (other.clone(),)).equal
    assert not moved((plain,), (other,), "bfloat16").is_rounding("bfloat16")


def test_every_head_counts() -> None:
    plain = torch.tensor(BASE)
    found = moved((1e6 * plain, plain), (1e6 * plain, plain.roll(1, 0)))
    assert not found.is_rounding("float32")
    assert found.flips > 0


def test_close_rows_do_not_make_a_usual_gap_small() -> None:
    """A check moves up to half of its rows to where two classes tie; rounding of large logits is no other function there."""
    generator = torch.Generator().manual_seed(0)
    first = 60.0 + torch.randn(40, 10, generator=generator, dtype=torch.float64)
    close = first[::2].topk(2, 1)
    first[::2] = first[::2].scatter(1, close.indices[:, :1], close.values[:, 1:] + 1e-3)
    rounding = 60.0 * 1e-6 * (2 * torch.rand(40, 10, generator=generator) - 1)
    assert moved((first,), (first + rounding,)).is_rounding("float32")
    assert not moved((first,), (first + 100 * rounding,)).is_rounding("float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_few_bits_is_rounding(dtype: str) -> None:
    x = torch.randn((64, 10), generator=torch.Generator().manual_seed(0)).double()
    low = x.to(getattr(torch, dtype)).float()
    assert moved((x.float(),), (low,), dtype).is_rounding(dtype)
    assert not moved((x.float(),), (low + 0.3 * x.roll(1, 0).float(),), dtype).is_rounding(dtype)
    # next to the largest number of the dtype, rounding makes infinity
    top = torch.tensor([[torch.finfo(getattr(torch, dtype)).max * 0.9, 1.0], [2.0, 1.0]])
    over = top.clone()
    over[0, 0] = math.inf
    assert not moved((top,), (over,), dtype).pattern


def test_a_masked_class_gets_no_vote_and_spoils_none() -> None:
    z = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    masked = z.clone()
    masked[:, 1] = -math.inf
    assert (votes_of(masked) == z[:, [0, 2, 3]].argmax(1).apply_(lambda i: [0, 2, 3][i])).all()


def test_preparing_names_the_network() -> None:
    with pytest.raises(NetworkError, match="'deep' has parameters without values"):
        prepare(nn.Linear(2, 2).to("meta"), Execution(), torch.device("cpu"), SHAPE, "deep")
