"""Noise schedules and time steps; OpenAI's denoisers against their own formulas; what diffusers' folders must say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rsrouter.core.errors import ArchitectureError, CheckpointError, HubError, InputError, NetworkError, RSRouterError
from rsrouter.experts import Diffusion, Expert, build_architecture, denoised, load_denoiser
from rsrouter.experts.schedule import make_diffusion
from tests.helpers.hub_server import HubServer

SHAPE = (3, 8, 8)
TINY = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1], "attention_resolutions": [4]}
CARLINI = {"schedule": "cosine", "steps": 4000, "rescale_timesteps": True}


def openai_betas(name: str, steps: int) -> np.ndarray:
    """`get_named_beta_schedule` of improved-diffusion (arXiv 2102.09672), restated from its formulas."""
    if name == "linear":
        return np.linspace(1000 / steps * 1e-4, 1000 / steps * 0.02, steps, dtype=np.float64)

    def bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)])


def openai_pred_xstart(net: nn.Module, betas: np.ndarray, sigma: float, z: torch.Tensor, rescale: bool) -> torch.Tensor:
    """`p_mean_variance(...)["pred_xstart"]` at the step that Carlini et al. take, with `clip_denoised=True`."""
    product = np.cumprod(1.0 - betas)
    t = 0
    while math.sqrt(1 - product[t]) / math.sqrt(product[t]) < 2 * sigma:
        t += 1
    x_t = math.sqrt(product[t]) * (2 * z - 1)
    time = torch.tensor([t] * len(z))
    out = net(x_t, time.float() * (1000.0 / len(betas)) if rescale else time)
    eps = torch.split(out, z.shape[1], dim=1)[0] if out.shape[1] == 2 * z.shape[1] else out
    recip, recipm1 = np.sqrt(1.0 / product)[t], np.sqrt(1.0 / product - 1)[t]
    return (recip * x_t - recipm1 * eps).clamp(-1, 1)


def classifier(shape: tuple[int, ...] = SHAPE) -> Expert:
    return Expert(nn.Flatten(), sigma=0.5, num_classes=math.prod(shape), input_shape=shape)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny UNet with learned variances, half of them in float16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("openai")
    net = build_architecture("openai_unet", None, {**TINY, "learn_sigma": True})
    nn.init.normal_(net.out[2].weight, std=0.1)
    save_file({k: v.half() for k, v in net.state_dict().items()}, folder / "unet.safetensors")
    return folder / "unet.safetensors"


@pytest.mark.parametrize(("name", "steps", "rescale"), [("cosine", 4000, True), ("linear", 1000, False), ("linear", 4000, True)])
def test_openai_denoisers_predict_what_their_code_does(file: Path, name: str, steps: int, rescale: bool) -> None:
    told: dict[str, Any] = {"schedule": name, "steps": steps, "rescale_timesteps": rescale}
    if steps != 1000 and name == "linear":
        with pytest.raises(InputError, match="needs its betas") as caught:
            load_denoiser(file, architecture="openai_unet", kwargs={**TINY, "learn_sigma": True}, diffusion=told)
        assert "2.5e-05 and 0.005" in caught.value.remedy
        told |= {"beta_start": 2.5e-5, "beta_end": 0.005}
    loaded = load_denoiser(file, architecture="openai_unet", kwargs={**TINY, "learn_sigma": True}, diffusion=told)
    z = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1)) + 0.5
    for sigma in (0.12, 0.25, 0.5, 1.0):
        expert = denoised(loaded, classifier(), sigma=sigma)
        with torch.inference_mode():
            x_0 = 2 * expert.module.denoise(z) - 1
            expected = openai_pred_xstart(loaded.module, openai_betas(name, steps), sigma, z, rescale)
            unscaled = openai_pred_xstart(loaded.module, openai_betas(name, steps), sigma, z, not rescale)
        torch.testing.assert_close(x_0, expected, rtol=0, atol=1e-5)
        assert steps == 1000 or not torch.allclose(unscaled, expected, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.05, 0.12, 0.25, 0.5, 1.0, 2.0])
def test_the_first_step_with_at_least_that_noise(sigma: float) -> None:
    linear = {"beta_start": 1e-3, "beta_end": 0.02}
    for told in (
        Diffusion(),
        Diffusion("cosine", 4000),
        Diffusion("scaled_linear", **linear),
        Diffusion("sigmoid", **linear),
        Diffusion("trained_betas", 50, trained_betas=tuple(np.linspace(0.001, 0.4, 50))),
        Diffusion(zero_snr=True),
    ):
        abar = told.alphas_cumprod().numpy()
        noise = np.sqrt((1 - abar) / np.maximum(abar, 1e-300))
        t, found = told.step_for(sigma)
        assert found == abar[t]
        assert noise[t] >= 2 * sigma
        assert t == 0 or noise[t - 1] < 2 * sigma
        nearest = Diffusion(**{**told.to_dict(), "timestep": "nearest"}).step_for(sigma)[0]
        assert nearest == np.abs(noise - 2 * sigma).argmin()


def test_the_time_step_is_part_of_the_identity(file: Path) -> None:
    loaded = load_denoiser(file, architecture="openai_unet", kwargs={**TINY, "learn_sigma": True}, diffusion=CARLINI)
    digests = set()
    for timestep in (None, "first", "nearest"):
        expert = denoised(loaded, classifier(), sigma=0.5, timestep=timestep)
        digests.add(expert.digest)
        assert f"t={expert.module.t}, fed as t * 0.25" in repr(expert.module)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"schedule": "laplace"}, "schedule one of"),
        ({"prediction": "x0"}, "prediction one of"),
        ({"timestep": "last"}, "timestep one of"),
        ({"steps": 1}, "steps"),
        ({"schedule": "cosine", "beta_start": 0.1, "beta_end": 0.2}, "has none"),
        ({"schedule": "scaled_linear"}, "needs its betas"),
        ({"beta_start": 0.2, "beta_end": 0.1}, "beta_start <= beta_end"),
        ({"schedule": "trained_betas", "steps": 3, "trained_betas": [0.1, 0.2]}, "3 trained_betas"),
        ({"trained_betas": [0.1]}, "for the schedule of that name"),
        ({"clip": 0}, "clip"),
        ({"null_class": -1}, "null_class"),
        ({"noise": "cosine"}, "Unknown"),
        ([], "Unknown"),
    ],
)
def test_settings_that_cannot_be(told: Any, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        make_diffusion(told)
    assert caught.value.remedy


def test_nothing_is_guessed_about_a_plain_file(file: Path) -> None:
    kwargs = {**TINY, "learn_sigma": True}
    with pytest.raises(InputError, match="rescale_timesteps") as caught:
        load_denoiser(file, architecture="openai_unet", kwargs=kwargs, diffusion={"schedule": "cosine", "steps": 4000})
    assert "improved-diffusion's scripts have it on" in caught.value.remedy
    with pytest.raises(InputError, match="learned variances"):
        load_denoiser(file, architecture="openai_unet", kwargs=kwargs, diffusion={**CARLINI, "learned_variance": False})
    with pytest.raises(CheckpointError, match="architecture is not known"):
        load_denoiser(file)
    loaded = load_denoiser(file, architecture="openai_unet", kwargs=kwargs)
    for late in (None, Diffusion("cosine", 4000)):
        with pytest.raises(InputError, match="how it was trained is not known"):
            denoised(loaded, classifier(), sigma=0.5, diffusion=late)
    known = load_denoiser(file, architecture="openai_unet", kwargs=kwargs, diffusion=CARLINI)
    with pytest.raises(InputError, match="trained on other images"):
        denoised(known, classifier(), sigma=0.5, input_shape=(3, 16, 16))
    with pytest.raises(InputError, match="Two statements"):
        denoised(known, classifier(), sigma=0.5, diffusion=Diffusion())
    with pytest.raises(InputError, match="different images"):
        denoised(known, classifier((1, 8, 8)), sigma=0.5)
    with pytest.raises(InputError, match="different images"):
        denoised(known, classifier((3, 12, 10)), sigma=0.5)


def test_class_conditional_files_need_a_null_class(tmp_path: Path) -> None:
    net = build_architecture("openai_unet", None, {**TINY, "class_cond": 5})
    nn.init.normal_(net.out[2].weight, std=0.1)
    save_file(net.state_dict(), tmp_path / "c.safetensors")
    load = lambda **more: load_denoiser(tmp_path / "c.safetensors", architecture="openai_unet", **more)  # noqa: E731
    with pytest.raises(CheckpointError, match="class-conditional"):
        load(kwargs=TINY, diffusion=CARLINI)
    for null in (None, 5):
        with pytest.raises(CheckpointError, match="class-conditional") as caught:
            load(kwargs={**TINY, "class_cond": 5}, diffusion={**CARLINI, "null_class": null})
        assert "null_class" in caught.value.expected
    z = torch.rand(2, *SHAPE)
    seen = []
    for null in (0, 4):
        found = load(kwargs={**TINY, "class_cond": 5}, diffusion={**CARLINI, "null_class": null})
        seen.append(denoised(found, classifier(), sigma=0.5).network()(z))
    assert not torch.equal(*seen)


def test_variances_that_were_not_announced() -> None:
    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x], 1)

    with pytest.raises(NetworkError, match="another number of channels"):
        denoised(Doubled(), classifier(), sigma=0.5, diffusion=Diffusion()).network()(torch.rand(1, *SHAPE))


# -- folders of diffusers, read without the library ------------------------------------------------------------------

UNET = {"_class_name": "UNet2DModel", "block_out_channels": [32, 32], "in_channels": 3, "out_channels": 3, "sample_size": 8}
DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "variance_type": "fixed_small"}
INDEX = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}


def pipeline(folder: Path, unet: Any = UNET, scheduler: Any = DDPM, index: Any = INDEX, weights: str | None = None) -> Path:
    for name, content in (
        ("unet/config.json", unet),
        ("scheduler/scheduler_config.json", scheduler),
        ("model_index.json", index),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    name = weights or "diffusion_pytorch_model.safetensors"
    save_file({"conv_in.weight": torch.zeros(1)}, folder / "unet" / name)
    return folder


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"unet": {**UNET, "_class_name": "UNet2DConditionModel"}}, "for a text, or in a latent space"),
        ({"unet": {**UNET, "_class_name": "MyModel"}}, "no denoiser of pixels"),
        ({"unet": {**UNET, "out_channels": 4}}, "3 or 6 channels out"),
        ({"unet": {**UNET, "time_embedding_type": "fourier"}}, "it is fed noise levels"),
        ({"unet": {**UNET, "class_embed_type": "identity"}}, "class_embed_type"),
        ({"unet": {**UNET, "num_class_embeds": 10}}, "class-conditional"),
        ({"unet": {**UNET, "sample_size": "8"}}, "does not have the form"),
        ({"unet": {**UNET, "out_channels": 6}}, "contradicts the UNet"),
        ({"unet": None}, "a pipeline without one"),
        ({"scheduler": {**DDPM, "_class_name": "ScoreSdeVeScheduler"}}, "ScoreSdeVeScheduler"),
        ({"scheduler": {**DDPM, "variance_type": "learned_range"}}, "contradicts the UNet"),
        ({"scheduler": {**DDPM, "thresholding": True}}, "dynamic thresholding"),
        ({"scheduler": {**DDPM, "beta_schedule": "laplace"}}, "schedule one of"),
        ({"scheduler": {**DDPM, "prediction_type": "flow"}}, "prediction one of"),
        ({"scheduler": None}, "does not say how it was trained"),
        ({"index": {**INDEX, "_class_name": ["pipeline", "MyPipeline"]}}, "code of its own"),
        ({"index": {**INDEX, "unet": ["my_unet", "MyUNet"]}}, "code of its own"),
        ({"index": {**INDEX, "vqvae": ["diffusers", "VQModel"]}}, "latent diffusion"),
        ({"weights": "diffusion_pytorch_model.bin"}, "no UNet weights as safetensors"),
        ({"weights": "diffusion_pytorch_model.fp16.safetensors"}, "filename='unet/diffusion_pytorch_model.fp16.safetensors'"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    with pytest.raises(RSRouterError, match=match) as caught:
        load_denoiser(pipeline(tmp_path, **changed))
    assert caught.value.remedy


@pytest.mark.parametrize(
    "stated",
    [{"schedule": "cosine"}, {"prediction": "v_prediction"}, {"steps": 4000}, {"beta_end": 0.03}, {"clip": None}],
)
def test_statements_that_the_files_contradict(tmp_path: Path, stated: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="contradicts the"):
        load_denoiser(pipeline(tmp_path), diffusion=stated)
    with pytest.raises(CheckpointError, match="already describes its own architecture"):
        load_denoiser(tmp_path, architecture="small_unet")
    with pytest.raises(CheckpointError, match="takes no class"):
        load_denoiser(tmp_path, diffusion={"null_class": 0})


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ArchitectureError, match="needs diffusers") as caught:
        load_denoiser(pipeline(tmp_path), diffusion={"steps": 1000, "timestep": "nearest"})
    assert caught.value.remedy == "pip install 'rsrouter[diffusers]'"


def test_gated_and_missing_repositories(hub: HubServer, tmp_path: Path) -> None:
    hub.put("org/gated", {"unet/config.json": json.dumps(UNET).encode()})
    hub.gated.add("org/gated")
    for name, match in (("org/gated", "gated"), ("org/none", "does not exist")):
        with pytest.raises(HubError, match=match):
            load_denoiser(f"hf-hub:{name}")
    hub.put("org/bin", {"unet/config.json": json.dumps(UNET).encode(), "unet/diffusion_pytorch_model.bin": b"x"})
    with pytest.raises(CheckpointError, match="no UNet weights as safetensors") as caught:
        load_denoiser("hf-hub:org/bin")
    assert "save_pretrained" in caught.value.remedy
