"""From the command line alone: a denoiser and a classifier of the Hub, wrapped, labelled, trained on, certified, published,
loaded elsewhere and audited, for each kind of denoiser."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from rsrouter import RoutedSmooth
from rsrouter.cli import main
from rsrouter.experts import build_architecture, loaders
from rsrouter.sampling import execution
from tests.helpers.hub_server import HubServer
from tests.helpers.library_models import transformers_folder

TINY = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": []}
IMPROVED = {**TINY, "channel_mult": [1], "learn_sigma": True}
GUIDED = {**TINY, "channel_mult": [1, 1], "resblock_updown": True, "num_head_channels": 16, "use_new_attention_order": True}
COSINE = {"schedule": "cosine", "steps": 4000, "rescale_timesteps": True}
LINEAR = {"schedule": "linear", "steps": 1000, "rescale_timesteps": False}
#: what `wrap` is told of a plain file; diffusers' folders say it themselves
OPENAI = {"improved-diffusion": (IMPROVED, COSINE), "guided-diffusion": (GUIDED, LINEAR)}
DIFFUSERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {}),
    "cosine": ({}, {"beta_schedule": "squaredcos_cap_v2"}),
    "v": ({}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "learned variance": ({"out_channels": 6}, {"variance_type": "learned_range"}),
}
#: images of 32 x 32, a denoiser of that size, and a classifier of transformers that sees 224 x 224
LARGE = "linear, before a classifier at 224"


def cli(*words: object) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command in this process."""
    out, err, before, status = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["rsrouter", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as exit:
        status = int(exit.code or 0)
    finally:
        sys.argv = before
    return status, out.getvalue(), err.getvalue()


def done(*words: object) -> str:
    status, out, err = cli(*words)
    assert status == 0, f"{words}: {err}"
    return out


def pictures(count: int, seed: int, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit images of three classes, told apart by the channel that is bright, more or less so."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(60, 120, (count, 3, side, side))
    images[np.arange(count), labels] += rng.integers(3, 90, count)[:, None, None]
    return torch.from_numpy(images).to(torch.uint8), torch.from_numpy(labels)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images, labels = pictures(18, 0)
    np.savez(tmp_path / "data.npz", images=images.numpy(), labels=labels.numpy())
    return tmp_path / "data.npz"


def fitted(net: nn.Module, side: int, logits: Callable[[Any], torch.Tensor] = lambda found: found) -> nn.Module:
    """A network that tells the classes apart under noise."""
    images, labels = pictures(120, 1, side)
    optimiser = torch.optim.Adam(net.train().parameters(), 0.02)
    for _ in range(40):
        noisy = (images / 255 + 0.3 * torch.randn(images.shape)).clamp(0, 1)
        loss = nn.functional.cross_entropy(logits(net((noisy - 0.5) / 0.25)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


@pytest.fixture(scope="module")
def classifier() -> dict[str, bytes]:
    """Files of a small network that tells the classes apart."""
    torch.manual_seed(0)
    kwargs = {"in_channels": 3, "width": 8, "blocks": [[8, 2]]}
    net = fitted(build_architecture("small_resnet", 3, kwargs), 8)
    config = {"architecture": "small_resnet", "kwargs": kwargs, "num_classes": 3, "input_shape": [3, 8, 8], "mean": [0.5] * 3}
    told = json.dumps({**config, "std": [0.25] * 3, "licence": "mit", "labels": ["red", "green", "blue"]}).encode()
    return {"model.safetensors": save(net.state_dict()), "config.json": told}


def classifier_at_224(folder: Path) -> dict[str, bytes]:
    """Files of a ResNet of transformers whose processor makes images of 224 x 224."""
    from transformers import AutoModelForImageClassification

    transformers_folder(folder, "resnet", side=224, labels=("red", "green", "blue"))
    net = AutoModelForImageClassification.from_pretrained(folder)
    fitted(net, 32, lambda found: found.logits).save_pretrained(folder)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def put_denoiser(hub: HubServer, row: str, scratch: Path) -> list[str]:
    """Puts a denoiser on the Hub; what the command is told about it."""
    torch.manual_seed(1)
    if row in OPENAI:
        kwargs, diffusion = OPENAI[row]
        net = build_architecture("openai_unet", None, kwargs)
        nn.init.normal_(net.out[2].weight, std=0.05)
        hub.put("org/denoiser", {"unet.safetensors": save({k: v.half() for k, v in net.state_dict().items()})}, tag="v1")
        told = ["--denoiser-filename", "unet.safetensors", "--denoiser-architecture", "openai_unet"]
        return [*told, "--denoiser-kwargs", json.dumps(kwargs), "--diffusion", json.dumps(diffusion)]
    from tests.experts.test_diffusers import save as save_pipeline

    unet, scheduler = ({"sample_size": 32}, {}) if row == LARGE else DIFFUSERS[row]
    folder = save_pipeline(scratch / "pipeline", unet=unet, scheduler=scheduler)
    hub.put(
        "org/denoiser", {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}, tag="v1"
    )
    return []


def trip(hub: HubServer, row: str, folder: Path, data: Path, classifier: dict[str, bytes]) -> dict[str, Any]:
    """Everything up to the published router; the pool's content."""
    hub.put("org/classifier", classifier, tag="v1")
    told = put_denoiser(hub, row, folder)
    refs = ("--denoiser", "hf-hub:org/denoiser@v1", "--classifier", "hf-hub:org/classifier@v1", "--sigma", "0.25,0.5")
    said = done("wrap", *refs, *told, "--data", data, "--images", 6, "--out", folder / "pool.json")
    assert "denoiser, t = " in said
    pool = json.loads((folder / "pool.json").read_text())
    assert [[part["role"] for part in e["provenance"]["parts"]] for e in pool["experts"]] == [["denoiser", "classifier"]] * 2
    done("label", folder / "pool.json", "--data", data, "--n", 10, "--out", folder / "labels.npz")
    reading = ("--data", data, "--radii", "0,0.25", "--n", 100)
    done("train", folder / "pool.json", *reading, "--kind", "flat", "--labels", folder / "labels.npz", "--out", folder / "flat")
    votes = ("--n", 90, "--n0", 10, "--plan", "fixed", "--count", 2)
    done("certify", folder / "flat", "--data", data, *votes, "--out", folder / "flat.tsv")
    done("publish", folder / "flat", "org/flat", "--certificates", folder / "flat.tsv")
    card = hub.files("org/flat")["README.md"].decode()
    assert "| denoiser, t = " in card
    assert "| classifier |" in card
    assert "Carlini et al. 2023" in card
    assert ("Nichol and Dhariwal 2021" in card) == (row == "improved-diffusion")
    needs = json.loads(hub.files("org/flat")["config.json"])["needs"]
    assert set(needs) == ({"diffusers", "transformers"} if row == LARGE else {"diffusers"} if row in DIFFUSERS else set())
    return dict(pool)


def test_one_cell_of_the_matrix(
    hub: HubServer, tmp_path: Path, data: Path, classifier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(execution.BATCH_BYTES, "cpu", 2**15)  # 25 rows
    pool = trip(hub, "improved-diffusion", tmp_path, data, classifier)
    monkeypatch.setattr(loaders, "_MODULES", {})
    loaded = RoutedSmooth.from_pretrained("org/flat", cache_dir=tmp_path / "empty")
    assert [e.digest for e in loaded.pool] == [e["digest"] for e in pool["experts"]]
    assert loaded.pool[0].module.denoiser is loaded.pool[1].module.denoiser
    assert loaded.pool[0].module.classifier[1] is loaded.pool[1].module.classifier[1]
    assert "denoiser, t = 1158 of 4000, fed as 289.5" in loaded.describe()
    other = ("--denoiser", "hf-hub:org/denoiser@v1", "--classifier", "hf-hub:org/classifier@v1", "--sigma", "0.5")
    status, _, err = cli("wrap", *other, "--out", tmp_path / "not.json")
    assert status != 0
    assert "architecture is not known" in err
    assert not (tmp_path / "not.json").exists()


@pytest.mark.libraries
@pytest.mark.usefixtures("real_figure", "real_load")
@pytest.mark.parametrize("row", [*DIFFUSERS, *OPENAI, LARGE])
def test_every_kind_of_denoiser(hub: HubServer, tmp_path: Path, data: Path, classifier: dict[str, bytes], row: str) -> None:
    if row not in OPENAI:
        pytest.importorskip("diffusers")
    if row == LARGE:
        pytest.importorskip("transformers")
        classifier = classifier_at_224(tmp_path / "resnet")
        images, labels = pictures(18, 0, 32)
        np.savez(data, images=images.numpy(), labels=labels.numpy())
    pool = trip(hub, row, tmp_path, data, classifier)
    side = 32 if row == LARGE else 8
    assert {tuple(e["input_shape"]) for e in pool["experts"]} == {(3, side, side)}
    reading = ("--data", data, "--radii", "0,0.25", "--n", 100, "--execution-batch", 100)
    done("train", tmp_path / "pool.json", *reading, "--kind", "deferral", "--recipe", "quick", "--out", tmp_path / "deferral")
    votes = ("--n", 90, "--n0", 10, "--plan", "fixed", "--count", 2)
    done("certify", tmp_path / "deferral", "--data", data, *votes, "--out", tmp_path / "deferral.tsv")
    done("publish", tmp_path / "deferral", "org/deferral", "--certificates", tmp_path / "deferral.tsv")
    for kind in ("flat", "deferral"):
        words = [
            "rsrouter",
            "audit",
            f"org/{kind}",
            "--data",
            str(data),
            "--rows",
            "2",
            "--fresh-votes",
            "200",
            "--attack-steps",
            "2",
        ]
        code = f"import sys; sys.argv = {words!r}; from rsrouter.cli import main; main()"
        ran = hub.run(code, HF_HOME=str(tmp_path / f"empty {kind}"))
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_what_wrap_refuses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(build_architecture("small_unet", None, {"width": 8}).state_dict(), tmp_path / "u.safetensors")
    denoiser, both = ("--denoiser", tmp_path / "u.safetensors"), ("--classifier", tmp_path / "u.safetensors")
    for words, match in (
        ((), "Nothing to wrap"),
        (denoiser, "go together"),
        (("x.safetensors", *denoiser, *both), "go together"),
        (both, "go together"),
        ((*denoiser, *both), "needs its sigma"),
        ((*denoiser, *both, "--sigma", "0.5", "--diffusion", "{"), "is not JSON"),
        ((*denoiser, *both, "--sigma", "0.5", "--timestep", "last", "--denoiser-architecture", "small_unet"), "last"),
    ):
        status, _, err = cli("wrap", *words, "--out", tmp_path / "pool.json")
        assert status != 0, words
        assert match in err or words[-1] == "small_unet", err
        assert not (tmp_path / "pool.json").exists()


def test_a_repository_that_is_refused_leaves_nothing(hub: HubServer, tmp_path: Path, classifier: dict[str, bytes]) -> None:
    from tests.experts.test_schedule import DDPM, pipeline

    def put(name: str, folder: Path) -> str:
        hub.put(name, {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
        return f"hf-hub:{name}"

    hub.put("org/classifier", classifier)
    own = json.dumps({"model_type": "vit", "auto_map": {"AutoModelForImageClassification": "own.Own"}}).encode()
    hub.put("org/own", {"config.json": own, "own.py": b"raise SystemExit('this code ran')"})
    good = put("org/unet", pipeline(tmp_path / "a"))
    gated = put("org/gated", tmp_path / "a")
    hub.gated.add("org/gated")
    pickled = put("org/pickled", pipeline(tmp_path / "b", weights="diffusion_pytorch_model.bin"))
    told = {}
    for name, kwargs in (("grey", {"width": 8}), ("plain", {"width": 8, "image_channels": 3})):
        hub.put(f"org/{name}", {"d.safetensors": save(build_architecture("small_unet", None, kwargs).state_dict())})
        words = ("--denoiser-filename", "d.safetensors", "--denoiser-architecture", "small_unet", "--denoiser-kwargs")
        told[name] = (*words, json.dumps(kwargs), "--diffusion", json.dumps(LINEAR))
    flow = put("org/flow", pipeline(tmp_path / "d", scheduler={**DDPM, "prediction_type": "flow"}))
    net = "hf-hub:org/classifier"
    for words, match in (
        ((gated, net), "gated"),
        ((good, net, "--diffusion", '{"prediction": "v_prediction"}'), "contradicts the prediction that was given"),
        ((good, net, "--diffusion", '{"schedule": "cosine"}'), "contradicts the schedule that was given"),
        ((pickled, net), "no UNet weights as safetensors"),
        ((flow, net), "prediction one of"),
        (("hf-hub:org/grey", net, *told["grey"]), "different images"),
        (("hf-hub:org/plain", "hf-hub:org/own", *told["plain"]), "its own code"),
        (("hf-hub:org/plain", "hf-hub:org/none", *told["plain"]), "does not exist"),
    ):
        out = tmp_path / "out" / "pool.json"
        out.parent.mkdir(exist_ok=True)
        status, _, err = cli("wrap", "--denoiser", words[0], "--classifier", words[1], "--sigma", "0.5", *words[2:], "--out", out)
        assert status != 0, words
        assert re.search(match, err.replace("\n", " ")), err
        assert "do: " in err
        assert list(out.parent.iterdir()) == []
