"""The layers around a classifier: resizing inside the certified function, the order of classes, features through it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from rsrouter import ExpertPool, FixedPlan, InputError, Smooth, load_expert
from rsrouter.core.errors import CheckpointError, IntegrityError
from rsrouter.experts import Expert, Resize, denoised, ensemble, map_labels
from rsrouter.experts.preprocessing import Resized, has_trunk
from rsrouter.experts.registry import build_architecture
from rsrouter.experts.wrap import wrap
from rsrouter.router.trunk import Trunk

NAMES = ("cat", "dog", "bird")


def timm_folder(folder: Path, *, shards: int = 1, labels: tuple[str, ...] | None = None, **cfg: object) -> Path:
    """A small timm network as `timm.models.save_for_hf` leaves it, in one file or in shards with their index."""
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    told = {"input_size": [3, 40, 40], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "crop_pct": 0.8, **cfg}
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": told, "label_names": labels}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(state))}
    for shard in set(where.values()):
        save_file({n: state[n] for n, at in where.items() if at == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize(("mode", "size"), [("center", (32, 32)), ("squash", (30, 44)), ("center", (30, 44))])
def test_timm_at_another_size_sees_what_its_transform_makes(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    expert = load_expert(timm_folder(tmp_path / "m", crop_mode=mode), sigma=0.25, input_size=size)
    assert expert.input_shape == (3, *size)
    assert expert.resize is not None
    assert expert.resize.output == (40, 40)
    steps = timm.data.create_transform((3, 40, 40), interpolation="bicubic", crop_pct=0.8, crop_mode=mode, mean=(0.5,) * 3)
    x = torch.randn(2, 3, *size) * 0.3 + 0.5  # noisy pixels are not clamped
    seen = x
    for step in steps.transforms:
        if type(step).__name__ in ("Resize", "CenterCrop"):
            seen = step(seen)
    assert torch.allclose(Resized(expert.resize)(x), seen, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(expert.network()(x), expert.module((seen - 0.5) / 0.25), atol=1e-4)


def test_a_size_is_part_of_an_expert_and_comes_back(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m")
    native, small = load_expert(folder, sigma=0.25), load_expert(folder, sigma=0.25, input_size=(32, 32))
    assert (native.input_shape, native.resize) == ((3, 40, 40), None)
    assert native.digest != small.digest
    assert native.module is small.module
    stretched = load_expert(folder, sigma=0.25, input_size=(32, 32), resize={"size": [40, 40], "interpolation": "bilinear"})
    assert stretched.digest != small.digest
    again = ExpertPool.load(ExpertPool([small]).save(tmp_path / "pool.json"))[0]
    assert (again.digest, again.resize) == (small.digest, small.resize)
    assert len(Smooth(again).certify(torch.rand(1, 3, 32, 32), FixedPlan(10, 100))) == 1  # its guards pass
    pair = ensemble([small, small.with_settings(name="b")], sigma=0.25, name="pair")
    back = ExpertPool.load(ExpertPool([pair]).save(tmp_path / "pair.json"))[0]
    assert back.digest == pair.digest
    weights = tmp_path / "plain.safetensors"
    save_file({k: v.contiguous() for k, v in build_architecture("small_resnet", 3).state_dict().items()}, weights)
    told = {"architecture": "small_resnet", "input_shape": (3, 40, 40), "normalisation": "none", "sigma": 1}
    with pytest.raises(InputError, match="how images of another size are resized"):
        load_expert(weights, input_size=(32, 32), **told)
    with pytest.raises(CheckpointError, match="no counterpart"):
        load_expert(timm_folder(tmp_path / "border", crop_mode="border"), sigma=0.25, input_size=(32, 32))


def test_shards_are_the_file_they_were_cut_from(tmp_path: Path) -> None:
    whole = load_expert(timm_folder(tmp_path / "whole"), sigma=0.25)
    cut = load_expert(timm_folder(tmp_path / "cut", shards=3), sigma=0.25)
    assert cut.digest == whole.digest
    pool = ExpertPool([cut]).save(tmp_path / "cut" / "pool.json")
    assert ExpertPool.load(pool)[0].digest == whole.digest
    shard = tmp_path / "cut" / "model-1.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match="shards"):
        ExpertPool.load(pool)
    shard.unlink()
    with pytest.raises(CheckpointError):
        load_expert(tmp_path / "cut", sigma=0.25)


def test_torchvisions_names(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    model = squeezenet1_1(num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    told = {"architecture": "torchvision:squeezenet1_1", "sigma": 0.5, "input_shape": (3, 32, 32), "normalisation": "imagenet"}
    expert = load_expert(tmp_path / "m.pth", num_classes=3, **told)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(expert.module(x), model(x))
    assert not has_trunk(expert.module)


def linear(name: str, labels: tuple[str, ...] | None, seed: int = 0) -> Expert:
    torch.manual_seed(seed)
    return Expert(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), sigma=1, num_classes=3, input_shape=(3, 2, 2), name=name, labels=labels
    )


def test_classes_are_reordered_by_name() -> None:
    first, other = linear("a", NAMES), linear("b", ("Vogel", "cat", "dog"))
    with pytest.raises(InputError, match="names of the classes"):
        ExpertPool([first, other])
    with pytest.raises(InputError, match="has different classes") as caught:
        map_labels([first, other])
    assert "Vogel" in caught.value.received
    mapped = map_labels([first, other], names={"Vogel": "bird"})
    assert ExpertPool(mapped).labels == NAMES
    assert mapped[1].order == (1, 2, 0)
    x = torch.rand(4, 3, 2, 2)
    assert torch.equal(mapped[1].network()(x), other.network()(x)[:, [1, 2, 0]])
    assert mapped[0] is first
    assert mapped[1].digest != other.digest
    back = map_labels(mapped[1:], order=("bird", "cat", "dog"))[0]
    assert back.order == (0, 1, 2)
    with pytest.raises(InputError, match="does not say"):
        map_labels([first, linear("c", None)])


def test_a_label_map_in_the_spec_of_a_pool(tmp_path: Path) -> None:
    for name, labels in (("a", NAMES), ("b", NAMES[::-1])):
        timm_folder(tmp_path / name, labels=labels)
    spec = [{"source": str(tmp_path / name), "sigma": sigma} for name, sigma in (("a", 0.25), ("b", 0.5))]
    with pytest.raises(InputError, match="--label-map"):
        wrap(spec)
    pool = wrap(spec, label_map={}).pool
    again = ExpertPool.load(pool.save(tmp_path / "pool.json"))
    assert again.labels == NAMES
    x = torch.rand(2, 3, 40, 40)
    with torch.inference_mode():
        assert torch.equal(again[1].network()(x), again[0].network()(x)[:, [2, 1, 0]])  # the same weights
        assert torch.allclose(Trunk(again[1])(x)[1], again[1].network()(x), atol=1e-6)


def test_features_through_what_stands_around_them(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "m")
    classifier = load_expert(folder, sigma=0.25, input_size=(32, 32))
    members = [classifier, classifier.with_settings(name="b"), linear_like(classifier)]
    experts = [
        denoised(nn.Identity(), classifier, sigma=0.25),
        ensemble(members, name="mean"),
        ensemble(members, consensus=2, name="consensus"),
    ]
    x = torch.rand(8, 3, 32, 32)
    for expert in experts:
        assert has_trunk(expert.module)
        with torch.inference_mode():
            features, logits = Trunk(expert)(x)
            assert torch.allclose(logits, expert.network()(x), atol=1e-5)
        assert features.ndim == 2
        with pytest.raises(InputError, match="feature map"):
            Trunk(experts[1], grid=2)(x)
    blind = denoised(nn.Identity(), linear("plain", None), sigma=0.25)
    assert not has_trunk(blind.module)


def linear_like(expert: Expert) -> Expert:
    """Another network of the same kind, for a consensus that is not always reached."""
    torch.manual_seed(1)
    module = timm.create_model("test_resnet", num_classes=3).eval()
    return Expert(
        module, sigma=0.25, num_classes=3, input_shape=expert.input_shape, mean=expert.mean, std=expert.std, resize=expert.resize
    ).with_settings(name="other")


def test_a_resize_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="larger"):
        Resize(size=(4, 4), crop=(8, 8))
