"""That a library still means what it meant when an expert was wrapped: caught beyond rounding, and only then."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rsrouter.core.errors import IntegrityError, NetworkError
from rsrouter.experts import Expert, ExpertPool, build_architecture, load_expert, register_architecture, save_expert
from rsrouter.experts.probe import allowed, check_probe, probe_batch, take_probe, versions


def vit() -> nn.Module:
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}
    network = build_architecture("vit_tiny_patch16_224", 10, kwargs).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.weight *= 2  # fresh weights are so small that any activation is nearly linear
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "vit": (vit, (3, 32, 32)),
    "resnet": (lambda: build_architecture("cifar_resnet20", 10).eval(), (3, 32, 32)),
    "small": (lambda: build_architecture("small_resnet", 10).eval(), (1, 28, 28)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_other_orders_of_summation_pass(name: str) -> None:
    """Memory layout, threads and batches change the order of sums, as another processor does."""
    build, shape = NETWORKS[name]
    network = build()
    probe = take_probe(network, shape)
    assert probe is not None
    assert probe.error is not None
    assert 0 < probe.error < 1e-5
    check_probe(copy.deepcopy(network).to(memory_format=torch.channels_last), shape, probe, "it")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        check_probe(network, shape, probe, "it")
    finally:
        torch.set_num_threads(threads)

    class OneByOne(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([network(row[None]) for row in x])

    check_probe(OneByOne(), shape, probe, "it")
    exact = copy.deepcopy(network).double()

    class InDouble(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return exact(x.double())

    check_probe(InDouble(), shape, probe, "it")


def swap(network: nn.Module, old: type[nn.Module], new: Callable[[], nn.Module]) -> nn.Module:
    changed = copy.deepcopy(network)
    for module in list(changed.modules()):
        for name, child in module.named_children():
            if isinstance(child, old):
                setattr(module, name, new())
    return changed


class Before(nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor], network: nn.Module) -> None:
        super().__init__()
        self.change, self.network = change, network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(self.change(x))


def resized(mode: str, antialias: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(x: torch.Tensor) -> torch.Tensor:
        half = nn.functional.interpolate(x, scale_factor=0.5, mode=mode, antialias=antialias)
        return nn.functional.interpolate(half, scale_factor=2.0)

    return change


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "gelu": lambda n: swap(n, nn.GELU, lambda: nn.GELU("tanh")),
    "eps": lambda n: swap(n, nn.LayerNorm, lambda: nn.LayerNorm(48, eps=1e-3)),
    "normalisation": lambda n: Before(lambda x: (x - 0.5) / 0.5, n),
    "255 levels": lambda n: Before(lambda x: (x * 255).floor() / 255, n),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_function_is_caught(change: str) -> None:
    network = vit()
    probe = take_probe(network, (3, 32, 32))
    assert probe is not None
    check_probe(network, (3, 32, 32), probe, "it")
    with pytest.raises(IntegrityError, match="no longer computes"):
        check_probe(CHANGES[change](network), (3, 32, 32), probe, "it")


@pytest.mark.parametrize("other", [("bicubic", False), ("bilinear", True), ("bicubic", True)])
def test_another_resize_is_caught(other: tuple[str, bool]) -> None:
    network = vit()
    probe = take_probe(Before(resized("bilinear", False), network), (3, 32, 32))
    assert probe is not None
    with pytest.raises(IntegrityError, match="no longer computes"):
        check_probe(Before(resized(*other), network), (3, 32, 32), probe, "it")


class Act(nn.Module):
    """What a registered class means is up to its release."""

    act: Callable[[torch.Tensor], torch.Tensor] = staticmethod(torch.relu)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(type(self).act(self.a(x.flatten(1))))


def test_loading_names_the_versions_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_architecture("tests_act", Act)
    torch.manual_seed(0)
    made = Expert(build_architecture("tests_act", 3), sigma=0.5, num_classes=3, input_shape=(1, 4, 4))
    pool = ExpertPool([load_expert(save_expert(made, tmp_path / "e"))])
    pool.save(tmp_path)
    assert ExpertPool.load(tmp_path)[0].probe == pool[0].probe
    monkeypatch.setattr(Act, "act", staticmethod(torch.nn.functional.elu))
    with pytest.raises(IntegrityError, match="versions are the same"):
        ExpertPool.load(tmp_path)
    content = json.loads((tmp_path / "pool.json").read_text())
    content["experts"][0]["probe"]["versions"]["timm"] = "0.9.0"
    (tmp_path / "pool.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=rf"timm 0\.9\.0 then, {versions()['timm']} now"):
        ExpertPool.load(tmp_path)
    with pytest.raises(IntegrityError, match="no longer computes"):
        ExpertPool.load(tmp_path, lazy=True)[0].module  # noqa: B018


def test_networks_that_answer_otherwise_each_time_have_no_probe() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) + torch.randn(len(x), 4)

    assert take_probe(Noisy(), (1, 2, 2)) is None


def test_logits_that_are_not_finite() -> None:
    class Diverged(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) / torch.tensor([0.0, 1.0, 1.0, 1.0])

    probe = take_probe(Diverged(), (1, 2, 2))
    assert probe is not None
    assert probe.logits[0][0] is None
    check_probe(Diverged(), (1, 2, 2), probe, "it")
    with pytest.raises(IntegrityError, match="not finite"):
        check_probe(nn.Flatten(), (1, 2, 2), probe, "it")


def test_networks_that_give_no_logits() -> None:
    for network, match in ((nn.Linear(5, 2), "RuntimeError"), (nn.Identity(), r"shape \(4, 1, 2, 2\)")):
        with pytest.raises(NetworkError, match=match):
            take_probe(network, (1, 2, 2))


def test_what_the_process_has_set_does_not_matter() -> None:
    network = NETWORKS["resnet"][0]()
    probe = take_probe(network, (3, 32, 32))
    assert probe is not None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check_probe(network, (3, 32, 32), probe, "it")
        check_probe(network.train(), (3, 32, 32), probe, "it")
    finally:
        torch.set_float32_matmul_precision(before)
    assert network.training
    assert allowed(probe) < 1e-4


def test_the_batch_is_what_it_was() -> None:
    """Stored logits hang on it."""
    batch = probe_batch((3, 5, 7))
    assert batch.shape == (4, 3, 5, 7)
    assert float(batch.min()) >= 0
    assert float(batch.max()) <= 1
    assert float(batch.double().sum()) == pytest.approx(213.3447688, abs=1e-5)
