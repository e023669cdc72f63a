"""UNets of diffusers: what they predict is what their own scheduler makes of it, at every sigma, schedule and prediction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rsrouter.core.errors import CheckpointError
from rsrouter.experts import Expert, denoised, load_denoiser, loaders
from tests.helpers.hub_server import HubServer

pytestmark = pytest.mark.libraries
pytest.importorskip("diffusers")

SHAPE = (3, 8, 8)
BLOCKS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
ENDS = {"beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear, other ends": {"beta_schedule": "linear", "beta_start": 2.5e-5, "beta_end": 0.005, "num_train_timesteps": 4000},
    "scaled_linear": {"beta_schedule": "scaled_linear", **ENDS},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "trained": {"trained_betas": torch.linspace(0.001, 0.2, 60).tolist(), "num_train_timesteps": 60},
    "zero SNR": {"rescale_betas_zero_snr": True},
    "no clip": {"clip_sample": False},
    "wide clip": {"clip_sample_range": 2.5},
}


def save(folder: Path, *, unet: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None) -> Path:
    """A pipeline's folder, written by diffusers itself."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(**{**BLOCKS, **(unet or {})})
    nn.init.normal_(network.conv_out.weight, std=0.2)
    DDPMPipeline(network, DDPMScheduler(**(scheduler or {}))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("diffusers") / "pipeline")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "learned"
    return save(folder, unet={"out_channels": 6}, scheduler={"variance_type": "learned_range"})


def classifier() -> Expert:
    return Expert(nn.Flatten(), sigma=0.5, num_classes=192, input_shape=SHAPE)


def noisy() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, *SHAPE, generator=generator) + 0.5 * torch.randn(3, *SHAPE, generator=generator)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_x0_is_that_of_the_scheduler(base: Path, tmp_path: Path, schedule: str, prediction: str) -> None:
    from diffusers import DDPMScheduler

    shutil.copytree(base, tmp_path / "p")
    scheduler = DDPMScheduler(**SCHEDULES[schedule], prediction_type=prediction)
    scheduler.save_pretrained(tmp_path / "p" / "scheduler")
    compare(tmp_path / "p", scheduler)


def compare(folder: Path, scheduler: Any) -> None:
    loaded, z = load_denoiser(folder), noisy()
    for sigma in (0.12, 0.25, 0.5, 1.0, 1.5):
        module = denoised(loaded, classifier(), sigma=sigma).module
        bars = scheduler.alphas_cumprod.double()
        t = int((((1 - bars) / bars).sqrt() >= 2 * sigma).nonzero()[0])
        assert module.t == t
        with torch.inference_mode():
            x_t = bars[t].sqrt().float() * (2 * z - 1)
            expected = scheduler.step(loaded.module(x_t, torch.tensor(t)).sample, t, x_t).pred_original_sample
            torch.testing.assert_close(2 * module.denoise(z) - 1, expected, rtol=0, atol=1e-5)


def test_learned_variances_are_left_out(learned: Path) -> None:
    from diffusers import DDPMScheduler

    assert load_denoiser(learned).diffusion.learned_variance
    compare(learned, DDPMScheduler(variance_type="learned_range"))


def test_a_class_is_fed_where_one_is_stated(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", unet={"num_class_embeds": 4})
    with pytest.raises(CheckpointError, match="class-conditional"):
        load_denoiser(folder)
    loaded, z = load_denoiser(folder, diffusion={"null_class": 3, "clip": 1.0}), noisy()
    module = denoised(loaded, classifier(), sigma=0.25).module
    with torch.inference_mode():
        x_t = module.abar**0.5 * (2 * z - 1)
        noise = loaded.module(x_t, torch.tensor(module.t), torch.tensor([3, 3, 3])).sample
        expected = ((x_t - (1 - module.abar) ** 0.5 * noise) / module.abar**0.5).clamp(-1, 1)
        torch.testing.assert_close(2 * module.denoise(z) - 1, expected, rtol=0, atol=1e-5)


def test_every_layout_is_the_same_denoiser(base: Path, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline, the folder inside it, its file, the old flat layout, a repository, float16, and names of before 0.12."""
    reference = load_denoiser(base)
    digest = denoised(reference, classifier_file(tmp_path), sigma=0.5).digest
    flat = tmp_path / "flat"
    shutil.copytree(base / "unet", flat)
    shutil.copy(base / "scheduler" / "scheduler_config.json", flat)
    old = tmp_path / "old"
    shutil.copytree(base, old)
    new_names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    for now, then in new_names.items():
        state = {name.replace(now, then): tensor for name, tensor in state.items()}
    assert any(".query." in name for name in state)
    save_file(state, old / "unet" / "diffusion_pytorch_model.safetensors")
    files = {p.relative_to(base).as_posix(): p.read_bytes() for p in base.rglob("*") if p.is_file()}
    commit = hub.put("org/ddpm", files, tag="v1")
    monkeypatch.setattr(loaders, "_MODULES", {})
    for source in (base / "unet", base / "unet" / "diffusion_pytorch_model.safetensors", flat, old, "hf-hub:org/ddpm@v1"):
        found = load_denoiser(source)
        expert = denoised(found, classifier_file(tmp_path), sigma=0.5)
        assert expert.digest == digest
        assert torch.equal(expert.module.denoise(noisy()), denoised(reference, classifier(), sigma=0.5).module.denoise(noisy()))
    assert found.provenance is not None
    assert (found.provenance.revision, found.provenance.filename) == (commit, "unet/diffusion_pytorch_model.safetensors")


def classifier_file(folder: Path) -> Expert:
    from rsrouter.experts import build_architecture, load_expert

    path = folder / "net.safetensors"
    if not path.exists():
        save_file(build_architecture("small_cnn", 3, {"in_channels": 3, "hidden": 8}).state_dict(), path)
    settings = {"architecture": "small_cnn", "kwargs": {"in_channels": 3, "hidden": 8}, "num_classes": 3, "input_shape": SHAPE}
    return load_expert(path, sigma=0.5, normalisation="none", **settings)


def test_arguments_that_diffusers_does_not_know(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "p")
    config = tmp_path / "p" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "of_a_newer_release": True}))
    with pytest.raises(CheckpointError, match="does not take these arguments"):
        load_denoiser(tmp_path / "p")
