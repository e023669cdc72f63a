"""Weight files as people have them: which names are meant, whatever stands around them, and files that are no weights."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rsrouter.core.errors import CheckpointError
from rsrouter.experts import Expert, build_architecture, load_expert, register_architecture
from tests.helpers.legacy import scramble

SETTINGS: dict[str, Any] = {"architecture": "cifar_resnet20", "sigma": 0.25, "normalisation": "none"}


def network(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return scramble(build_architecture("cifar_resnet20", 10, kwargs), seed)


def load(path: Path, **settings: Any) -> Expert:
    return load_expert(path, **{**SETTINGS, **settings})


def holds(expert: Expert, source: nn.Module) -> bool:
    return all(torch.equal(v, source.state_dict()[k]) for k, v in expert.module.state_dict().items())


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "backbone.", "1.module.", "module._orig_mod.", "model.encoder.0.", "student.module.", "x.y.z."],
)
def test_any_prefix(tmp_path: Path, prefix: str) -> None:
    source = network()
    torch.save({prefix + k: v for k, v in source.state_dict().items()}, tmp_path / "m.pt")
    assert holds(load(tmp_path / "m.pt"), source)


def test_wrappers_inside_names(tmp_path: Path) -> None:
    source = network()
    torch.save({k.replace("layer2.", "layer2.module."): v for k, v in source.state_dict().items()}, tmp_path / "m.pt")
    assert holds(load(tmp_path / "m.pt"), source)


def test_what_stands_beside_is_left_and_said(tmp_path: Path) -> None:
    source = network()
    state = {f"1.{k}": v for k, v in source.state_dict().items()}
    beside = {"0.means": torch.rand(3), "criterion.centres": torch.rand(10, 64), "n_averaged": torch.tensor(3)}
    torch.save(
        {"state_dict": {**state, **beside}, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, tmp_path / "m.pt"
    )
    with pytest.warns(UserWarning, match=r"all \d+ names fit .* left over: 0.means, criterion.centres, n_averaged"):
        assert holds(load(tmp_path / "m.pt", num_classes=10), source)


def test_a_larger_network_is_not_cut_down(tmp_path: Path) -> None:
    torch.save(network().state_dict() | {"layer3.3.conv1.weight": torch.rand(64, 64, 3, 3)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"left over: layer3.3.conv1.weight"):
        load(tmp_path / "m.pt")


# -- several sets of weights -------------------------------------------------------------------------------------------


def test_averaged_weights_as_timm_loads_them(tmp_path: Path) -> None:
    raw, averaged = network(0), network(1)
    for keys in (("state_dict", "state_dict_ema"), ("model", "model_ema")):
        torch.save(dict(zip(keys, (raw.state_dict(), averaged.state_dict()), strict=True)), tmp_path / "m.pt")
        assert holds(load(tmp_path / "m.pt"), averaged)
        chosen = load(tmp_path / "m.pt", weights_key=keys[0])
        assert holds(chosen, raw)
        assert chosen.provenance is not None
        assert chosen.provenance.weights_key == keys[0]


@pytest.mark.parametrize(
    ("keys", "asked"),
    [(("net", "ema_net"), "net"), (("model", "swa"), "swa"), (("a.b", "a.c"), "a.c"), ((":student", ":teacher"), "student")],
)
def test_a_question_where_several_fit(tmp_path: Path, keys: tuple[str, str], asked: str) -> None:
    sources = [network(0), network(1)]
    content: dict[str, Any] = {}
    for key, source in zip(keys, sources, strict=True):
        outer, _, inner = key.partition(".")
        if key.startswith(":"):
            content |= {f"{key[1:]}.{k}": v for k, v in source.state_dict().items()}
        elif inner:
            content.setdefault(outer, {})[inner] = source.state_dict()
        else:
            content[key] = source.state_dict()
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="several sets") as caught:
        load(tmp_path / "m.pt")
    assert "--weights-key" in caught.value.remedy
    expert = load(tmp_path / "m.pt", weights_key=asked)
    assert holds(expert, sources[[k.lstrip(":") for k in keys].index(asked)])
    with pytest.raises(CheckpointError, match="no weights under"):
        load(tmp_path / "m.pt", weights_key="other")


def test_equal_copies_are_no_question(tmp_path: Path) -> None:
    source = network()
    torch.save({"model": source.state_dict(), "best": source.state_dict()}, tmp_path / "m.pt")
    assert holds(load(tmp_path / "m.pt"), source)


# -- not weights -------------------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"


def tar(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.pth.tar"])
@pytest.mark.parametrize(
    ("data", "match"),
    [
        (POINTER, "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"\n\n  <HTML><body>", "web page"),
        (gzip.compress(b"x" * 99, mtime=0), "gzip"),
        (gzip.compress(tar("model.pt", b"x" * 99), mtime=0), "a tar archive inside"),
        (tar("model.pt", b"x" * 99), "tar archive of model.pt"),
        (b'{"weight_map": {}}', "JSON"),
        (b"BZh91AY&SY", "bzip2"),
        (b"\x89HDF\r\n\x1a\n123", "HDF5"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (b"", "empty"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, name: str, data: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as caught:
        load(tmp_path / name)
    assert caught.value.remedy
    assert "torch.save(model.state_dict())" not in caught.value.remedy


@pytest.mark.parametrize("name", ["m.pth", "m.bin"])
def test_safetensors_under_another_name(tmp_path: Path, name: str) -> None:
    source = network()
    (tmp_path / name).write_bytes(save(source.state_dict()))
    assert holds(load(tmp_path / name), source)


def quantised(t: Tensor) -> Tensor:
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.to(torch.float8_e4m3fn), "float8"),
        (quantised, "quantised"),
        (lambda t: t.to("meta"), "meta"),
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: (t * 10).to(torch.int8), "another dtype"),
        (lambda t: t * torch.inf, "not finite"),
    ],
)
def test_tensors_that_cannot_be_used(tmp_path: Path, change: Any, match: str) -> None:
    state = network().state_dict()
    torch.save({**state, "fc.weight": change(state["fc.weight"])}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path / "m.pt", num_classes=10)


class Extra(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(4, num_classes)

    def get_extra_state(self) -> object:
        return {"scale": 1.0}

    def set_extra_state(self, state: object) -> None:
        pass


class Fixed(nn.Module):
    """A class made for one task: it takes no number of classes."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Linear(4, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)).relu())


def test_extra_state_is_refused_in_words(tmp_path: Path) -> None:
    register_architecture("tests_extra", Extra)
    torch.save({"fc.weight": torch.rand(3, 4), "fc.bias": torch.rand(3)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load(tmp_path / "m.pt", architecture="tests_extra", input_shape=(1, 2, 2))


def test_classes_without_num_classes(tmp_path: Path) -> None:
    register_architecture("tests_fixed", Fixed)
    source = Fixed(5)
    torch.save(source.state_dict(), tmp_path / "m.pt")
    expert = load(tmp_path / "m.pt", architecture="tests_fixed", kwargs={"width": 5}, input_shape=(1, 2, 2))
    assert expert.num_classes == 3
    x = torch.rand(4, 1, 2, 2)
    assert torch.equal(expert.network()(x), source(x))


# -- the other two networks of the papers ------------------------------------------------------------------------------


def lenet_by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    x = F.max_pool2d(F.conv2d(x, state["conv1.weight"], state["conv1.bias"]).relu(), 2, 2)
    x = F.max_pool2d(F.conv2d(x, state["conv2.weight"], state["conv2.bias"]).relu(), 2, 2).reshape(-1, 800)
    return (x @ state["fc1.weight"].T + state["fc1.bias"]).relu() @ state["fc2.weight"].T + state["fc2.bias"]


def test_lenet_of_macer_and_consistency(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) * 0.05
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.05
    torch.save({"net": state, "epoch": 440}, tmp_path / "440.pth")
    expert = load(tmp_path / "440.pth", architecture="lenet", num_classes=10)
    x = torch.rand(3, 1, 28, 28, generator=generator)
    torch.testing.assert_close(expert.network()(x), lenet_by_hand(state, x))


def densenet_by_hand(s: dict[str, Tensor], x: Tensor) -> Tensor:
    def brc(name: str, x: Tensor, padding: int) -> Tensor:
        norm = [s[f"{name}.norm.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.conv2d(F.batch_norm(x, *norm).relu(), s[f"{name}.conv.weight"], padding=padding)

    x = F.conv2d(x, s["features.conv0.weight"], padding=1)
    for block in (1, 2, 3):
        for layer in range(1, 7):
            name = f"features.block{block}.layer{layer}"
            x = torch.cat([x, brc(f"{name}.brc_2", brc(f"{name}.brc_1", x, 0), 1)], 1)
        x = F.avg_pool2d(x, 2) if block < 3 else x
    norm = [s[f"features.norm_last.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    return F.avg_pool2d(F.batch_norm(x, *norm).relu(), 8).flatten(1) @ s["classifier.weight"].T + s["classifier.bias"]


def test_densenet_40(tmp_path: Path) -> None:
    state: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=generator) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5

    def norm(name: str, channels: int) -> None:
        for key in ("running_mean", "running_var", "weight", "bias"):
            state[f"{name}.{key}"] = torch.rand(channels, generator=generator) + 0.5

    channels = 24
    add("features.conv0.weight", 24, 3, 3, 3)
    for block in (1, 2, 3):
        for layer in range(1, 7):
            name = f"features.block{block}.layer{layer}"
            norm(f"{name}.brc_1.norm", channels)
            add(f"{name}.brc_1.conv.weight", 48, channels, 1, 1)
            norm(f"{name}.brc_2.norm", 48)
            add(f"{name}.brc_2.conv.weight", 12, 48, 3, 3)
            channels += 12
    norm("features.norm_last", channels)
    add("classifier.weight", 10, channels)
    add("classifier.bias", 10)
    save_file(state, tmp_path / "m.safetensors")
    expert = load(tmp_path / "m.safetensors", architecture="densenet40")
    x = torch.rand(2, 3, 32, 32, generator=generator)
    torch.testing.assert_close(expert.network()(x), densenet_by_hand(state, x), rtol=1e-4, atol=1e-4)
