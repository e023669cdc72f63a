"""Legacy layouts load with the source's own logits; anything else is refused with a remedy, and nothing is ever run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rsrouter.core.errors import CheckpointError, InputError
from rsrouter.experts import Expert, build_architecture, load_expert, register_architecture
from rsrouter.experts.denoisers import DnCNN
from rsrouter.experts.fitting import nearest_architecture
from tests.helpers.legacy import MEAN, STD, NormalizeLayer, PaperResNet, save_like_cohen, scramble

CIFAR = {"sigma": 0.25, "normalisation": "cifar10"}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def same(expert: object, source: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        ours, theirs = expert.network()(x), source.eval()(x)  # type: ignore[attr-defined]
    assert float(theirs.std()) > 1e-3  # a dead network would agree with anything
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [20, 110])
@pytest.mark.parametrize("zipped", [True, False])
def test_cohen_cifar(tmp_path: Path, x: torch.Tensor, depth: int, zipped: bool) -> None:
    source = nn.Sequential(NormalizeLayer(MEAN, STD), scramble(PaperResNet(depth)))
    assert all(key.startswith("1.") for key in source.state_dict())
    path = save_like_cohen(source, tmp_path / "checkpoint.pth.tar", f"cifar_resnet{depth}", _use_new_zipfile_serialization=zipped)
    expert = load_expert(path, **CIFAR)  # the architecture stands in the file
    same(expert, source, x)
    assert expert.provenance is not None
    assert expert.provenance.architecture == f"cifar_resnet{depth}"
    assert expert.num_classes == 10


def test_a_router_head_can_stand_on_a_cifar_resnet():
    from rsrouter.router.trunk import Trunk

    torch.manual_seed(0)
    expert = Expert(build_architecture("cifar_resnet20", 10), sigma=0.5, num_classes=10, input_shape=(3, 32, 32))
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        features, logits = Trunk(expert).eval()(x)
        assert features.shape == (4, expert.module.num_features)
        torch.testing.assert_close(logits, expert.network()(x))


def test_cohen_imagenet_data_parallel(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    source = nn.Sequential(NormalizeLayer(mean, std), nn.DataParallel(scramble(torchvision.models.resnet50(num_classes=10))))
    assert all(key.startswith("1.module.") for key in source.state_dict())
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 90, "arch": "resnet50", "state_dict": source.state_dict(), "optimizer": {}}, path)
    expert = load_expert(path, sigma=0.5, normalisation="imagenet", input_shape=(3, 224, 224))
    same(expert, nn.Sequential(source[0], source[1].module), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


def test_smoothadv_centring_layer(tmp_path: Path, x: torch.Tensor) -> None:
    source = nn.Sequential(NormalizeLayer(MEAN, (1.0, 1.0, 1.0)), scramble(PaperResNet(20)))
    path = save_like_cohen(source, tmp_path / "checkpoint.pth.tar", "cifar_resnet20")
    same(load_expert(path, sigma=0.5, normalisation="cifar10_centred"), source, x)
    same(load_expert(path, sigma=0.5, mean=MEAN, std=(1, 1, 1)), source, x)


def test_macer_net_and_epoch(tmp_path: Path, x: torch.Tensor) -> None:
    source = scramble(PaperResNet(20))
    path = tmp_path / "440.pth"
    torch.save({"net": source.state_dict(), "epoch": 440}, path)
    same(load_expert(path, architecture="cifar_resnet20", sigma=0.25, normalisation="none"), source, x)


@pytest.mark.parametrize("prefix", ["", "module.", "1.", "1.module."])
@pytest.mark.parametrize("old", [True, False])
def test_bare_state_dicts(tmp_path: Path, x: torch.Tensor, prefix: str, old: bool) -> None:
    source = scramble(PaperResNet(20))
    state = {prefix + k: v for k, v in source.state_dict().items() if not (old and k.endswith("num_batches_tracked"))}
    torch.save(state, tmp_path / "model.pt")
    save_file(state, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        same(load_expert(tmp_path / name, architecture="cifar_resnet20", sigma=0.25, normalisation="none"), source, x)


def test_denoised_smoothing_denoiser_keys(tmp_path: Path) -> None:
    from rsrouter.experts import load_denoiser

    source = scramble(DnCNN(depth=4, n_channels=8))
    assert all(key.startswith("dncnn.") for key in source.state_dict())
    path = save_like_cohen(source, tmp_path / "checkpoint.pth.tar", "cifar_dncnn")
    loaded = load_denoiser(path, architecture="dncnn", kwargs={"depth": 4, "n_channels": 8})
    z = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(z), z - source.dncnn(z))


def test_local_timm_checkpoint_needs_only_sigma(tmp_path: Path) -> None:
    import json

    timm = pytest.importorskip("timm")
    source = scramble(timm.create_model("resnet18", num_classes=7, pretrained=False))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "resnet18",
                "num_classes": 7,
                "num_features": 512,
                "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "license": "mit"},
            }
        )
    )
    with pytest.raises(InputError, match="sigma"):
        load_expert(tmp_path)
    expert = load_expert(tmp_path, sigma=0.5)
    assert (expert.mean, expert.std, expert.input_shape) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (3, 64, 64))
    assert expert.provenance is not None
    assert expert.provenance.licence == "mit"
    same(expert, nn.Sequential(NormalizeLayer(expert.mean, expert.std), source), torch.rand(2, 3, 64, 64))


def test_own_architecture_in_one_line(tmp_path: Path) -> None:
    class Mine(nn.Module):
        def __init__(self, num_classes: int, width: int = 4) -> None:
            super().__init__()
            self.a = nn.Linear(12, width)
            self.head = nn.Linear(width, num_classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.a(x.flatten(1)).relu())

    register_architecture("tests_mine", Mine)
    source = Mine(3)
    torch.save(source.state_dict(), tmp_path / "mine.pt")
    expert = load_expert(tmp_path / "mine.pt", architecture="tests_mine", sigma=1, input_shape=(3, 2, 2), normalisation="none")
    same(expert, source, torch.rand(5, 3, 2, 2))
    with pytest.raises(CheckpointError, match="taken"):
        register_architecture("tests_mine", nn.Linear)


# -- refused -------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it would make a folder: harmless, and visible."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("kind", ["torch", "torch_old", "raw", "beside_weights"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    target, path = tmp_path / "owned", tmp_path / "checkpoint.pth.tar"
    weights = {k: v.clone() for k, v in PaperResNet(20).state_dict().items()}
    if kind == "raw":
        path.write_bytes(pickle.dumps(Bomb(target)))
    else:
        content = {"state_dict": weights, "extra": Bomb(target)} if kind == "beside_weights" else {"state_dict": Bomb(target)}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "torch_old")
    with pytest.raises(CheckpointError, match="refused") as caught:
        load_expert(path, architecture="cifar_resnet20", **CIFAR)
    assert not target.exists()
    assert "state_dict" in caught.value.remedy
    pickle.loads(pickle.dumps(Bomb(target)))  # the bomb is live: a plain unpickler sets it off
    assert target.exists()


def test_malicious_pickle_named_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match="safetensors"):
        load_expert(path, architecture="cifar_resnet20", **CIFAR)
    assert not (tmp_path / "owned").exists()


def test_whole_module_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(PaperResNet(20), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="refused") as caught:
        load_expert(tmp_path / "model.pt", architecture="cifar_resnet20", **CIFAR)
    assert "PaperResNet" in caught.value.received
    assert "state_dict" in caught.value.remedy


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    state = PaperResNet(20).state_dict()
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError) as caught:
        load_expert(path, architecture="cifar_resnet20", **CIFAR)
    assert caught.value.remedy


def test_keys_that_do_not_fit_name_the_nearest_architecture(tmp_path: Path) -> None:
    torch.save(PaperResNet(110).state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        load_expert(tmp_path / "model.pt", architecture="cifar_resnet20", **CIFAR)
    assert "left over: layer1.3.conv1.weight" in caught.value.received
    assert "cifar_resnet110" in caught.value.remedy
    torch.save({f"1.{k}": v for k, v in PaperResNet(56, 100).state_dict().items()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        load_expert(tmp_path / "model.pt", architecture="cifar_resnet56", num_classes=10, **CIFAR)
    assert "fc.weight (100, 64) instead of (10, 64)" in caught.value.received
    assert "num_classes=100" in caught.value.remedy


def test_nearest_architecture_of_something_else() -> None:
    found = nearest_architecture({"lstm.weight_ih_l0": torch.zeros(4, 4)})
    assert found is not None
    assert found[1] == 0.0


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"epoch": 3}, "no state dict"),
        ([1, 2], "no state dict"),
        ({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, "does not fit"),
        (torch.ones(3), "no state dict"),
        ({}, "no state dict"),
    ],
)
def test_unknown_containers(tmp_path: Path, content: object, match: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=match):
        load_expert(tmp_path / "model.pt", architecture="cifar_resnet20", num_classes=10, **CIFAR)


def test_weights_that_diverged(tmp_path: Path) -> None:
    state = PaperResNet(20).state_dict()
    state["fc.weight"][0, 0] = torch.nan
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="not finite"):
        load_expert(tmp_path / "model.pt", architecture="cifar_resnet20", **CIFAR)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "sigma, normalisation"),
        ({"normalisation": "cifar10"}, "sigma"),
        ({"sigma": 0.25}, "mean"),
        ({"sigma": 0.25, "mean": MEAN}, "half a normalisation"),
        ({"sigma": -0.25, "normalisation": "none"}, "no usable sigma"),
        ({"sigma": 0, "normalisation": "none"}, "no usable sigma"),
        ({"sigma": float("nan"), "normalisation": "none"}, "no usable sigma"),
        ({"sigma": 63.75, "normalisation": "none"}, "sigma=0.25"),
        ({"sigma": "0.25", "normalisation": "none"}, "no usable sigma"),
        ({"sigma": 0.25, "normalisation": "cifar"}, "Unknown normalisation"),
        ({"sigma": 0.25, "normalisation": "cifar10", "mean": MEAN}, "Two statements"),
        ({"sigma": 0.25, "normalisation": "mnist"}, "3 finite values"),
        ({"sigma": 0.25, "normalisation": "none", "sigmas": 1}, "Unknown settings"),
    ],
)
def test_what_the_file_cannot_tell_is_asked_for(tmp_path: Path, settings: dict[str, object], match: str) -> None:
    torch.save(PaperResNet(20).state_dict(), tmp_path / "model.pt")
    with pytest.raises(InputError, match=match) as caught:
        load_expert(tmp_path / "model.pt", architecture="cifar_resnet20", **settings)
    assert caught.value.remedy


def test_timm_may_not_be_told_to_read_other_files() -> None:
    with pytest.raises(CheckpointError, match="may not set"):
        build_architecture("resnet18", 10, {"checkpoint_path": "evil.pth"})
    with pytest.raises(CheckpointError, match="Unknown architecture"):
        build_architecture("hf-hub:org/evil", 10)
    with pytest.raises(CheckpointError, match="does not take"):
        build_architecture("cifar_resnet20", 10, {"no_such": 1})


def test_missing_file_and_ambiguous_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such checkpoint"):
        load_expert(tmp_path / "none.pt")
    for name in ("a.pt", "b.pt"):
        torch.save(PaperResNet(20).state_dict(), tmp_path / name)
    with pytest.raises(CheckpointError, match="told apart"):
        load_expert(tmp_path, architecture="cifar_resnet20", **CIFAR)
    assert load_expert(tmp_path, filename="a.pt", architecture="cifar_resnet20", **CIFAR).sigma == 0.25
    with pytest.raises(InputError, match="outside its folder"):
        load_expert(tmp_path, filename="../a.pt", architecture="cifar_resnet20", **CIFAR)


@pytest.mark.slow
def test_import_time_of_a_resnet110_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure, not a limit: run with -s."""
    import time

    source = nn.Sequential(NormalizeLayer(MEAN, STD), PaperResNet(110))
    path = save_like_cohen(source, tmp_path / "checkpoint.pth.tar", "cifar_resnet110")
    start = time.perf_counter()
    expert = load_expert(path, **CIFAR)
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\nResNet-110 checkpoint of {path.stat().st_size / 1e6:.1f} MB imported in {seconds:.3f} s")
    assert expert.num_classes == 10
