"""Pixel-space UNets of diffusers: what stands in a pipeline's folder about the network and its noise schedule.

Everything is read from `config.json` and `scheduler_config.json`, with the scheduler class's own values for what the file leaves
out. The library itself is imported only when a network is built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from rsrouter.core.errors import ArchitectureError, CheckpointError, HubError
from rsrouter.experts.checkpoints import WeightFile
from rsrouter.experts.places import INDEX as SHARDS
from rsrouter.experts.places import Place, check_relative
from rsrouter.experts.provenance import Name, Width
from rsrouter.experts.schedule import Diffusion
from rsrouter.stored import Stored, read_json, validated

#: how the architecture is called, and its class in diffusers
ARCHITECTURE, UNET = "diffusers/UNet2DModel", "UNet2DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG, SCHEDULER, PIPELINE = "config.json", "scheduler_config.json", "model_index.json"
#: schedulers whose `step` predicts the original sample as one-shot denoising does, clipped
SCHEDULERS = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler")
_RESAVE = "load the pipeline where you trust it, and write it with pipeline.save_pretrained(folder): safetensors, nothing custom"
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")


class _UNet(Stored):
    """What of a UNet's `config.json` decides whether it can stand before a classifier."""

    block_out_channels: tuple[Width, ...]
    in_channels: Width = 3
    out_channels: Width = 3
    sample_size: Width | tuple[Width, Width] | None = None
    class_embed_type: Name | None = None
    num_class_embeds: Width | None = None
    time_embedding_type: Name = "positional"


class _Scheduler(Stored):
    """A `scheduler_config.json`, with the values that diffusers' classes have for what it leaves out."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Name = "linear"
    trained_betas: Annotated[tuple[float, ...], Field(max_length=100_000)] | None = None
    prediction_type: Name = "epsilon"
    rescale_betas_zero_snr: bool = False
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    variance_type: Name | None = None


@dataclass(frozen=True)
class UNetFolder:
    """A UNet in a folder or repository.

    Attributes:
        where: location fields of a `Provenance`.
        weights: its weight file here.
        kwargs: arguments of the network.
        channels, side: of the images it was trained on; side None where the file does not say.
        classes: number of classes it is conditioned on; None: on none.
        learned_variance: it returns twice the channels.
        diffusion: what the scheduler's file says; None where there is none.
        title: names it in an error.
        path: of the weight file in its place.
    """

    where: dict[str, Any]
    weights: Path
    kwargs: dict[str, Any]
    channels: int
    side: tuple[int, int] | None
    classes: int | None
    learned_variance: bool
    diffusion: Diffusion | None
    title: str
    path: str

    def beside(self, place: Place, name: str) -> Path:
        """A file of the weight file's folder."""
        found = place.find(PurePosixPath(self.path).with_name(check_relative(name, "An index")).as_posix())
        if found is None:
            raise CheckpointError("A shard is missing", expected=name, received="no such file", remedy="fetch it again")
        return found


def _title(place: Place) -> str:
    return place.reference.repo_id if place.reference is not None else Path(os.path.abspath(place.folder or "")).name


def _names(place: Place, folder: str) -> list[str]:
    """Names of the files in one folder, as far as they can be listed."""
    if place.reference is None or place.hub is None:
        inside = (place.folder or Path()) / folder
        return sorted(p.name for p in inside.iterdir()) if inside.is_dir() else []
    try:
        files = place.hub.files(place.reference)
    except HubError:
        return []
    return [name.removeprefix(folder) for name in files if name.startswith(folder) and "/" not in name.removeprefix(folder)]


def _json(place: Place, name: str) -> dict[str, Any] | None:
    path = place.find(name)
    if path is None:
        return None
    content = read_json(path, f"{name} of {_title(place)}", error=CheckpointError, remedy="fetch it again")
    return content if isinstance(content, dict) else {}


def find_unet(place: Place, filename: str | None = None) -> UNetFolder | None:
    """What a folder, weight file or repository says about a UNet of diffusers; None where it is none of diffusers.

    Args:
        place: a pipeline's folder, a UNet's own, its weight file, or a repository.
        filename: weight file, where it is not the usual one.

    Raises:
        CheckpointError: of diffusers, but not to be used: another kind of network, pickled weights, code of its own.
        HubError: the repository cannot be read.
    """
    index = _json(place, PIPELINE)
    if index is not None:
        _check_index(index, _title(place))
    inside = "unet/" if place.find(f"unet/{CONFIG}") is not None else ""
    config = _json(place, f"{inside}{CONFIG}")
    if config is None or "_class_name" not in config:
        if index is not None:
            raise _unusable(_title(place), "unet/config.json", "a pipeline without one")
        return None
    title = f"{inside}{CONFIG} of {_title(place)}"
    if config["_class_name"] != UNET:
        why = "it denoises for a text, or in a latent space" if "UNet" in str(config["_class_name"]) else "no denoiser of pixels"
        raise _unusable(title, f"_class_name {UNET}", f"{config['_class_name']!r}, {why}")
    kwargs = {key: value for key, value in config.items() if not key.startswith("_")}
    known = {key: value for key, value in kwargs.items() if key in _UNet.model_fields}
    unet = validated(_UNet, known, title, error=CheckpointError, remedy="fetch it again")
    if unet.out_channels not in (unet.in_channels, 2 * unet.in_channels):
        raise _unusable(title, f"{unet.in_channels} or {2 * unet.in_channels} channels out", f"{unet.out_channels}")
    if unet.time_embedding_type not in ("positional", "learned"):
        raise _unusable(
            title, "a network of time steps", f"time_embedding_type {unet.time_embedding_type!r}: it is fed noise levels"
        )
    if unet.class_embed_type not in (None, "timestep"):
        raise _unusable(title, "no class, or class numbers", f"class_embed_type {unet.class_embed_type!r}")
    learned = unet.out_channels == 2 * unet.in_channels
    path, weights = _weights(place, inside, filename or place.only)
    size = unet.sample_size
    return UNetFolder(
        where=place.where(path),
        weights=weights,
        kwargs=kwargs,
        channels=unet.in_channels,
        side=(size, size) if isinstance(size, int) else size,
        classes=unet.num_class_embeds if unet.class_embed_type is None else 2**31,
        learned_variance=learned,
        diffusion=_scheduler(place, inside, learned),
        title=_title(place),
        path=path,
    )


def _unusable(title: str, expected: str, received: str, remedy: str = "") -> CheckpointError:
    remedy = remedy or "use an unconditional UNet2DModel that was trained on pixels"
    return CheckpointError(f"{title} cannot stand before a classifier", expected=expected, received=received, remedy=remedy)


def _check_index(index: dict[str, Any], title: str) -> None:
    """Refuses pipelines with code of their own, and those that work on something else than pixels."""
    unet = index.get("unet")
    entries = [entry for entry in index.values() if isinstance(entry, list)]
    if isinstance(index.get("_class_name"), list) or any(
        not str(e[0]).startswith(("diffusers", "transformers")) for e in entries if e and e[0]
    ):
        raise _unusable(title, "classes of diffusers alone", "a pipeline that brings code of its own", _RESAVE)
    if "vae" in index or "vqvae" in index:
        raise _unusable(title, "a network that denoises pixels", "a latent diffusion: its UNet denoises what an encoder makes")
    if not isinstance(unet, list) or unet[-1] != UNET:
        raise _unusable(title, f"unet: {UNET}", f"unet: {unet!r}")


def _weights(place: Place, inside: str, filename: str | None) -> tuple[str, Path]:
    for path in [filename] if filename else [f"{inside}{WEIGHTS}", f"{inside}{WEIGHTS.removesuffix('.safetensors')}{SHARDS}"]:
        found = place.find(check_relative(path, "The argument")) if path.endswith((".safetensors", SHARDS)) else None
        if found is not None:
            return path, found
    others = [name for name in _names(place, inside) if name.startswith("diffusion_pytorch_model")]
    variants = [name for name in others if name.endswith(".safetensors")]
    remedy = f"pickles of diffusers are not read: {_RESAVE}"
    if variants:
        remedy = f"filename={inside + variants[0]!r}"
    elif not any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in (filename or "", *others)):
        remedy = "check the folder"
    raise CheckpointError(
        f"{_title(place)} has no UNet weights as safetensors",
        expected=f"{inside}{WEIGHTS}",
        received=", ".join(others) or filename or "none",
        remedy=remedy,
    )


def _scheduler(place: Place, inside: str, learned_variance: bool) -> Diffusion | None:
    """The schedule, from the pipeline's folder or from beside the UNet's own."""
    names = [f"scheduler/{SCHEDULER}", SCHEDULER] if inside else [SCHEDULER, f"scheduler/{SCHEDULER}"]
    content = next((found for name in names if (found := _json(place, name)) is not None), None)
    if content is None and place.folder is not None and _title(place) == "unet":  # the folder inside a pipeline was given
        beside = Path(os.path.abspath(place.folder)).parent / "scheduler" / SCHEDULER
        if beside.is_file():
            content = read_json(beside, SCHEDULER, error=CheckpointError, remedy="fetch it again")
    if content is None:
        return None
    title = f"{SCHEDULER} of {_title(place)}"
    if not isinstance(content, dict) or content.get("_class_name") not in SCHEDULERS:
        found = content.get("_class_name") if isinstance(content, dict) else type(content).__name__
        raise _unusable(
            title,
            f"one of {', '.join(SCHEDULERS)}",
            repr(found),
            "where it was trained with DDPM's noise, save DDPMScheduler.from_config(pipeline.scheduler.config) in its place",
        )
    known = {key: value for key, value in content.items() if key in _Scheduler.model_fields}
    return diffusion_of(
        validated(_Scheduler, known, title, error=CheckpointError, remedy="fetch it again"), learned_variance, title
    )


def diffusion_of(read: _Scheduler, learned_variance: bool, title: str) -> Diffusion:
    """A scheduler's file as `Diffusion`; CheckpointError where the two do not go together."""
    if read.thresholding:
        raise _unusable(title, "thresholding false", "dynamic thresholding, which is not a function of each pixel")
    if read.variance_type is not None and read.variance_type.startswith("learned") != learned_variance:
        raise CheckpointError(
            f"{title} contradicts the UNet",
            expected=f"variance_type {'learned or learned_range' if learned_variance else 'that is fixed'}, as its channels say",
            received=read.variance_type,
            remedy="correct the file, or use the scheduler that the network was trained with",
        )
    schedule = "trained_betas" if read.trained_betas is not None else read.beta_schedule
    ends = schedule in ("linear", "scaled_linear", "sigmoid")
    return Diffusion(
        schedule=schedule,
        steps=read.num_train_timesteps,
        beta_start=read.beta_start if ends else None,
        beta_end=read.beta_end if ends else None,
        trained_betas=read.trained_betas,
        zero_snr=read.rescale_betas_zero_snr,
        prediction=read.prediction_type,
        learned_variance=learned_variance,
        clip=read.clip_sample_range if read.clip_sample else None,
    )


def renamed(file: WeightFile) -> WeightFile:
    """A UNet's tensors under the names that diffusers has now (attention was called otherwise before 0.12)."""
    return WeightFile(
        {
            entry: {_OLD.sub(lambda m: f".{_OLD_NAMES[m[1]]}.{m[2]}", name): tensor for name, tensor in state.items()}
            for entry, state in file.states.items()
        }
    )


def unet2d(*, block_out_channels: Sequence[int], **config: Any) -> nn.Module:
    """A `UNet2DModel` by its configuration.

    Raises:
        ArchitectureError: diffusers is not installed.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ArchitectureError(
            "This denoiser needs diffusers",
            expected="diffusers, to build its UNet2DModel",
            received=f"{type(error).__name__}: {error}"[:200],
            remedy="pip install 'rsrouter[diffusers]'",
        ) from error
    build: Any = UNet2DModel
    module: nn.Module = build(block_out_channels=block_out_channels, **config)
    return module


__all__ = ["ARCHITECTURE", "UNetFolder", "find_unet", "renamed", "unet2d"]
