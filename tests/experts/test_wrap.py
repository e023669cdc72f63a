"""Spec to pinned pool, the check of the normalisation on real images, conversion for the Hub, and the three verbs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from rsrouter.core.errors import CheckpointError, HubError, InputError, IntegrityError, RSRouterError
from rsrouter.data import load_data
from rsrouter.experts import (
    Diffusion,
    ExpertPool,
    NoisyCheck,
    build_architecture,
    check_expert,
    convert,
    denoised,
    load_expert,
    save_expert,
    wrap,
)
from rsrouter.experts.expert import Expert
from rsrouter.experts.places import ASSETS
from tests.helpers.hub_server import HubServer
from tests.helpers.legacy import MEAN, STD, NormalizeLayer, PaperResNet, save_like_cohen, scramble

EXPERT = ASSETS / "experts" / "sigma_0.50"


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, torch.Tensor]:
    """300 Fashion-MNIST test images."""
    return load_data(ASSETS / "images" / "test.npz").batch(range(300))


@pytest.fixture
def cohen(tmp_path: Path) -> Path:
    for i, name in enumerate(("a", "b", "c")):
        source = nn.Sequential(NormalizeLayer(MEAN, STD), scramble(PaperResNet(20), i))
        save_like_cohen(source, tmp_path / f"{name}.pth.tar", "cifar_resnet20")
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -- spec ----------------------------------------------------------------------------------------------------------


def test_spec_of_every_kind(cohen: Path) -> None:
    save_file(build_architecture("small_unet", 2, {"image_channels": 3, "width": 8}).state_dict(), cohen / "unet.safetensors")
    spec = write(
        cohen / "pool.toml",
        """
        [defaults]
        normalisation = "cifar10"
        licence = "mit"
        [[expert]]
        source = "a.pth.tar"
        sigma = 0.25
        [[expert]]
        source = "b.pth.tar"
        name = "b"
        sigma = [0.5, 1.0]
        normalisation = "none"
        [[expert]]
        kind = "ensemble"
        sigma = 0.5
        consensus = 2
        members = [{ source = "a.pth.tar" }, { source = "b.pth.tar" }, { source = "c.pth.tar" }]
        [[expert]]
        kind = "denoised"
        sigma = [0.25, 0.5]
        denoiser = { source = "unet.safetensors", architecture = "small_unet", kwargs = { image_channels = 3, width = 8 } }
        classifier = { source = "c.pth.tar" }
        diffusion = { schedule = "cosine", steps = 1000 }
    """,
    )
    pool = ExpertPool(spec)
    assert pool.names == ("denoised_0.25", "sigma_0.25", "b_at_0.5", "denoised_0.5", "ensemble_0.5", "b_at_1")
    assert pool["b_at_0.5"].mean is None
    assert pool["sigma_0.25"].mean == MEAN
    members = pool["ensemble_0.5"].module.members  # type: ignore[union-attr]
    assert members[0][1] is pool["sigma_0.25"].module  # type: ignore[index]
    assert all(e.provenance is not None for e in pool)
    assert pool["sigma_0.25"].provenance.licence == "mit"  # type: ignore[union-attr]
    pool.save(cohen / "pool.json")
    assert ExpertPool.load(cohen / "pool.json").digest == pool.digest


def test_yaml_spec_is_the_same_pool(cohen: Path) -> None:
    toml = write(cohen / "s.toml", '[[expert]]\nsource = "a.pth.tar"\nsigma = 0.25\nnormalisation = "cifar10"\n')
    yaml = write(cohen / "s.yaml", "expert:\n  - source: a.pth.tar\n    sigma: 0.25\n    normalisation: cifar10\n")
    assert wrap(toml).pool.digest == wrap(yaml).pool.digest
    listed = [{"source": str(cohen / "a.pth.tar"), "sigma": 0.25, "normalisation": "cifar10"}]
    assert wrap(listed).pool.digest == wrap(toml).pool.digest


def test_spec_pins_the_commit_a_tag_means(hub: HubServer, cohen: Path, tmp_path: Path) -> None:
    commit = hub.put("org/cohen", {"checkpoint.pth.tar": (cohen / "a.pth.tar").read_bytes()}, tag="v1")
    spec = write(tmp_path / "s.toml", '[[expert]]\nsource = "hf-hub:org/cohen@v1"\nsigma = 0.25\nnormalisation = "cifar10"\n')
    pool = wrap(spec).pool
    pool.save(tmp_path / "pool.json")
    entry = json.loads((tmp_path / "pool.json").read_text())["experts"][0]["provenance"]
    assert (entry["location"], entry["revision"], entry["filename"]) == ("org/cohen", commit, "checkpoint.pth.tar")
    with pytest.raises(HubError, match="no revision"):
        wrap([{"source": "hf-hub:org/cohen@v2", "sigma": 0.25}])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[[expert]]\nsource = 'a.pth.tar'\n", "sigma, normalisation"),
        ("[[expert]]\nsource = 'a.pth.tar'\nsigma = 0.25\n", "mean"),
        ("[[expert]]\nsource = 'a.pth.tar'\nnormalisation = 'none'\n", "sigma"),
        ("[[expert]]\nsource = 'a.pth.tar'\nnormalisation = 'none'\nsigma = 64\n", "/255"),
        ("[[expert]]\nsource = 'a.pth.tar'\nnormalisation = 'none'\nsigma = []\n", "sigma"),
        ("[[expert]]\nsource = 'a.pth.tar'\nnormalisation = 'none'\nsigma = 0.5\nsigmma = 1\n", "sigmma"),
        ("[[expert]]\nsource = 'missing.pth'\nnormalisation = 'none'\nsigma = 0.5\n", "No such checkpoint"),
        ("[[expert]]\nsigma = 0.5\n", "no source"),
        ("[[expert]]\nkind = 'other'\n", "Unknown kind"),
        ("[[expert]]\nkind = 'ensemble'\nmembers = [{source = 'a.pth.tar'}]\n", "needs its sigma"),
        ("[[expert]]\nkind = 'ensemble'\nsigma = 0.5\n", "needs members"),
        ("[[expert]]\nkind = 'denoised'\nsigma = 0.5\nclassifier = {source = 'a.pth.tar'}\n", "needs denoiser"),
        (
            "[[expert]]\nkind = 'denoised'\nsigma = 0.5\nclassifier = {source = 'a.pth.tar'}\n"
            "denoiser = {source = 'b.pth.tar'}\n",
            "architecture",
        ),
        ("[[experts]]\nsource = 'a.pth.tar'\n[other]\n", "other"),
        ("", "no experts"),
        ("[[expert]\n", "does not parse"),
    ],
)
def test_specs_that_are_refused(cohen: Path, text: str, match: str) -> None:
    with pytest.raises(RSRouterError, match=match) as caught:
        wrap(write(cohen / "s.toml", text))
    assert caught.value.remedy


def test_experts_of_one_pool_must_agree(cohen: Path) -> None:
    torch.save(PaperResNet(20, 100).state_dict(), cohen / "cifar100.pt")
    entries = [
        {"source": "a.pth.tar", "sigma": 0.25, "normalisation": "cifar10"},
        {"source": "cifar100.pt", "architecture": "cifar_resnet20", "sigma": 0.5, "normalisation": "cifar100"},
    ]
    with pytest.raises(InputError, match="num_classes"):
        wrap(entries, folder=cohen)


def test_a_changed_file_is_not_the_pool(cohen: Path) -> None:
    wrap([{"source": "a.pth.tar", "sigma": 0.25, "normalisation": "cifar10"}], folder=cohen).pool.save(cohen)
    (cohen / "a.pth.tar").write_bytes((cohen / "b.pth.tar").read_bytes())
    with pytest.raises(IntegrityError, match="pinned"):
        ExpertPool.load(cohen)


# -- noisy accuracy, on real images and a real expert ----------------------------------------------------------------


def test_right_normalisation_passes(real: tuple[torch.Tensor, torch.Tensor]) -> None:
    wrapped = wrap([{"source": str(EXPERT)}], images=real[0], labels=real[1])
    assert wrapped.warnings == ()
    assert wrapped.checks[0].accuracy > 0.6
    assert wrapped.checks[0].images == 300


@pytest.mark.parametrize("wrong", [{"normalisation": "none"}, {"mean": [0.5], "std": [1.0]}, {"mean": [0.286], "std": [0.02]}])
def test_wrong_normalisation_is_named(real: tuple[torch.Tensor, torch.Tensor], wrong: dict[str, object]) -> None:
    wrapped = wrap([{"source": str(EXPERT), **wrong}], images=real[0], labels=real[1])
    check = wrapped.checks[0]
    assert check.better == "fashion_mnist"
    assert check.alternatives["fashion_mnist"] - check.accuracy >= 0.03
    assert "fashion_mnist" in wrapped.warnings[0]
    right = check_expert(load_expert(EXPERT), *real)
    assert right.accuracy == check.alternatives["fashion_mnist"]  # the same noise: the same figure


def test_double_normalisation_is_noticed(real: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A module that normalises inside, wrapped with its normalisation once more."""
    inner = load_expert(EXPERT)
    twice = Expert(inner.network(), sigma=0.5, num_classes=10, input_shape=(1, 28, 28), mean=inner.mean, std=inner.std)
    assert check_expert(twice, *real).better == "none"


def test_guessing_is_noticed(real: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(0)
    expert = Expert(build_architecture("small_resnet", 10).eval(), sigma=0.5, num_classes=10, input_shape=(1, 28, 28))
    check = check_expert(expert, *real)
    assert check.near_chance
    assert "guesses" in str(check.warning)
    assert not NoisyCheck("e", 0.5, 300, 0.6, 0.1).near_chance


def test_checking_changes_nothing(real: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A module in training mode would update its BatchNorm statistics."""
    torch.manual_seed(0)
    module = build_architecture("small_resnet", 10).train()
    expert = Expert(module, sigma=0.5, num_classes=10, input_shape=(1, 28, 28), mean=[0.5], std=[0.5])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    check_expert(expert, *real)
    assert module.training
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())


def test_images_that_do_not_fit(real: tuple[torch.Tensor, torch.Tensor]) -> None:
    expert = load_expert(EXPERT)
    with pytest.raises(InputError, match="images do not fit"):
        check_expert(expert, torch.rand(4, 3, 32, 32), real[1][:4])
    with pytest.raises(InputError, match="labels do not fit"):
        check_expert(expert, real[0], real[1] + 5)


# -- convert -------------------------------------------------------------------------------------------------------


def test_legacy_file_to_the_hub_and_back(hub: HubServer, cohen: Path, tmp_path: Path) -> None:
    from huggingface_hub import HfApi, ModelCard

    source = load_expert(cohen / "a.pth.tar", sigma=0.25, normalisation="cifar10")
    folder = convert(cohen / "a.pth.tar", tmp_path / "out", sigma=0.25, normalisation="cifar10", licence="mit")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "rsrouter"
    assert "randomized-smoothing" in card.data.tags
    assert source.provenance is not None
    assert source.provenance.sha256 in card.text
    HfApi().create_repo("me/cohen-0.25")
    HfApi().upload_folder(repo_id="me/cohen-0.25", folder_path=folder)
    fetched = load_expert("hf-hub:me/cohen-0.25")  # nothing needs to be given any more
    assert fetched.digest == source.digest
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(fetched.network()(x), source.network()(x))


def test_licence_is_never_filled_in(cohen: Path, tmp_path: Path) -> None:
    folder = convert(cohen / "a.pth.tar", tmp_path / "out", sigma=0.25, normalisation="none")
    assert json.loads((folder / "config.json").read_text())["licence"] is None
    text = (folder / "README.md").read_text()
    assert "license:" not in text
    assert "not stated" in text
    assert load_expert(folder).mean is None


def test_convert_refuses(cohen: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        convert(cohen / "a.pth.tar", tmp_path / "out", sigma=0.25, normalisation="none")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(CheckpointError, match="named architecture"):
        save_expert(Expert(nn.Flatten(), sigma=0.5, num_classes=784, input_shape=(1, 28, 28)), tmp_path / "flat")


# -- verbs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli() -> object:
    import typer

    from rsrouter.cli.experts import register

    app = typer.Typer()
    register(app)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


def test_wrap_verb(cli: object, tmp_path: Path) -> None:
    data = ASSETS / "images" / "test.npz"
    done = cli("wrap", EXPERT, "--out", tmp_path / "pool.json", "--data", data, "--format", "json")  # type: ignore[operator]
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["experts"][0]["noisy_accuracy"] > 0.6
    assert told["warnings"] == []
    assert told["digest"] == ExpertPool.load(tmp_path).digest
    again = cli("wrap", EXPERT, "--out", tmp_path / "pool.json")  # type: ignore[operator]
    assert isinstance(again.exception, InputError)
    bad = cli("wrap", EXPERT, "--out", tmp_path / "b.json", "--normalisation", "none", "--data", data)  # type: ignore[operator]
    assert "fashion_mnist" in bad.stderr


def test_wrap_verb_with_flags(cli: object, cohen: Path) -> None:
    done = cli(
        "wrap",
        cohen / "a.pth.tar",
        cohen / "b.pth.tar",
        "--sigma",
        "0.25,0.5",
        "--mean",
        "0.5,0.5,0.5",  # type: ignore[operator]
        "--std",
        "0.2,0.2,0.2",
        "--out",
        cohen / "pool.json",
    )
    assert done.exit_code == 0, done.output
    pool = ExpertPool.load(cohen)
    assert pool.sigmas == (0.25, 0.5)
    assert pool[0].mean == (0.5, 0.5, 0.5)
    missing = cli("wrap", cohen / "a.pth.tar", "--sigma", "0.25", "--out", cohen / "p.json")  # type: ignore[operator]
    assert isinstance(missing.exception, InputError)
    assert missing.exception.expected == "normalisation"
    assert missing.exception.remedy.startswith("normalisation: ")
    half = cli("wrap", cohen / "a.pth.tar", "--sigma", "0.25", "--std", "0.2,0.2,0.2", "--out", cohen / "p.json")  # type: ignore[operator]
    assert half.exception.expected == "mean"
    # a file that names an architecture nobody knows is told by that name
    source = nn.Sequential(NormalizeLayer(MEAN, STD), scramble(PaperResNet(20), 0))
    save_like_cohen(source, cohen / "lab.pth.tar", "lab_resnet")
    unknown = cli("wrap", cohen / "lab.pth.tar", "--sigma", "0.25", "--normalisation", "cifar10", "--out", cohen / "p.json")  # type: ignore[operator]
    assert unknown.exception.expected == "architecture, input_shape"
    assert "arch 'lab_resnet' is neither" in unknown.exception.received


def test_convert_verb(cli: object, cohen: Path) -> None:
    done = cli(
        "convert",
        cohen / "a.pth.tar",
        "--out",
        cohen / "hub",
        "--sigma",
        "0.25",  # type: ignore[operator]
        "--normalisation",
        "cifar10",
        "--licence",
        "mit",
    )
    assert done.exit_code == 0, done.output
    assert load_expert(cohen / "hub").sigma == 0.25


def test_select_verb(cli: object, tmp_path: Path) -> None:
    rows = {"a": [1.0, 1.0, 0.0], "b": [1.0, 0.9, 0.0], "c": [0.0, 0.0, 0.6]}
    for name, radii in rows.items():
        lines = ["idx\tlabel\tpredict\tradius\tcorrect\ttime"]
        lines += [f"{i}\t1\t{1 if r else 2}\t{r or 0.7}\t{int(r > 0)}\t0:00:01" for i, r in enumerate(radii)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    done = cli("select", *(tmp_path / f"{n}.tsv" for n in rows), "--k", 2, "--radii", "0,0.5", "--format", "json")  # type: ignore[operator]
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["chosen"] == ["a", "c"]
    assert told["oracle"] == [1.0, 1.0]
    assert np.allclose(told["values"], [2 / 3, 1.0])


@pytest.mark.slow
def test_denoised_expert_beats_the_plain_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Minutes: trains a small UNet and a classifier on the demo's images, see examples/train_denoiser.py."""
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [
            sys.executable,
            str(root / "examples" / "train_denoiser.py"),
            "--train",
            str(ASSETS / "images" / "train.npz"),
            "--test",
            str(ASSETS / "images" / "test.npz"),
            "--out",
            str(tmp_path),
            "--epochs",
            "3",
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    data = load_data(ASSETS / "images" / "test.npz").batch(range(500))
    classifier = load_expert(tmp_path / "classifier")
    from rsrouter.experts import load_denoiser

    denoiser = load_denoiser(tmp_path / "denoiser.safetensors", architecture="small_unet", kwargs={"width": 16})
    plain = check_expert(load_expert(tmp_path / "classifier", sigma=0.5), *data).accuracy
    with_denoiser = check_expert(denoised(denoiser, classifier, sigma=0.5, diffusion=Diffusion()), *data).accuracy
    with capsys.disabled():
        print(f"\nsigma 0.5: plain {plain:.3f}, denoised {with_denoiser:.3f}")
    assert with_denoiser > plain
