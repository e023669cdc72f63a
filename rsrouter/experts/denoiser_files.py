"""Denoisers from files: a UNet of diffusers, of OpenAI's repositories, or of a registered architecture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rsrouter.core.errors import CheckpointError, InputError
from rsrouter.experts.config import checked
from rsrouter.experts.diffusers_files import ARCHITECTURE, UNetFolder, find_unet, renamed
from rsrouter.experts.loaders import LOADERS, Sources, check_tensors, load_network, open_checkpoint, read_pinned, shared
from rsrouter.experts.places import Place, open_place, read_weights
from rsrouter.experts.provenance import Provenance
from rsrouter.experts.registry import is_denoiser
from rsrouter.experts.schedule import STATED, Diffusion, stated_diffusion, with_statements
from rsrouter.experts.tensors import tensors_digest
from rsrouter.hub import Hub

OPENAI = "openai_unet"
#: architectures of ours that take a time step
TIMED = (OPENAI, "small_unet")
#: what only the user knows of a diffusers folder that holds a scheduler
_FREE = ("timestep", "null_class")


@dataclass(frozen=True)
class Denoiser:
    """A denoising network and where it came from.

    Attributes:
        module: the network.
        provenance: None: made in memory.
        diffusion: what it was trained with, where its files or the user say so.
        channels, side: of the images it was trained on, where that is known.
    """

    module: nn.Module
    provenance: Provenance | None = None
    diffusion: Diffusion | None = None
    channels: int | None = None
    side: tuple[int, int] | None = None

    def shape_for(self, shape: Sequence[int]) -> tuple[int, ...]:
        """`(C, H, W)` of its images; as `shape` says where it takes several."""
        return (self.channels or shape[0], *(self.side or tuple(shape[1:])))


def load_denoiser(
    source: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    diffusion: Mapping[str, Any] | Diffusion | None = None,
    licence: str | None = None,
    filename: str | None = None,
    revision: str | None = None,
    **hub: Any,
) -> Denoiser:
    """A pinned denoiser from a folder, a file or the Hub.

    A `UNet2DModel` of diffusers, alone or as `unet/` of a pipeline, says itself what it is and how it was trained. For any other
    file both are stated.

    Args:
        source: as in `load_expert`.
        architecture: registered with `register_architecture(..., denoiser=True)`: `"openai_unet"`, `"dncnn"`, `"small_unet"`, or
            yours. Not for diffusers.
        kwargs: its arguments. Not for diffusers.
        diffusion: settings of `Diffusion` by name. With diffusers' scheduler file only `timestep` and `null_class` are free.
        licence: of the weights.
        filename, revision: as in `load_expert`.
        hub: `token`, `cache_dir`, `local_files_only`.

    Raises:
        CheckpointError: not a denoiser, a file that does not fit, or one that says otherwise than what was stated.
        InputError: something that decides the result is neither in the files nor stated.
        HubError, IntegrityError: as `load_expert`.
    """
    told = checked({"kwargs": dict(kwargs) if isinstance(kwargs, Mapping) else kwargs, "licence": licence}, "the denoiser")
    stated = diffusion.to_dict() if isinstance(diffusion, Diffusion) else diffusion
    reader = Hub(**hub)
    place = open_place(source, revision, **hub)
    folder = find_unet(place, filename)
    if folder is not None:
        if architecture not in (None, ARCHITECTURE) or told["kwargs"]:
            raise CheckpointError(
                f"{folder.title} already describes its own architecture",
                expected="no architecture and no kwargs for a UNet of diffusers",
                received=f"architecture {architecture!r}, kwargs {told['kwargs']}",
                remedy="leave them out",
            )
        return _of_diffusers(place, folder, stated or {}, told["licence"] or place.licence(), reader)
    if not isinstance(architecture, str) or not is_denoiser(architecture):
        raise CheckpointError(
            "The denoiser's architecture is not known" if architecture is None else f"{architecture!r} is not a denoiser",
            expected="a folder or repository of diffusers (unet/config.json), or an architecture registered with denoiser=True",
            received=repr(architecture),
            remedy="give architecture: openai_unet, dncnn, small_unet, or your own by "
            "register_architecture(name, YourDenoiser, denoiser=True)",
        )
    arguments = told["kwargs"] or {}
    settings = None if stated is None else _of_plain(architecture, arguments, stated, os.path.basename(os.fspath(source)))
    where, _, sha256, checkpoint = open_checkpoint(source, filename=filename, revision=revision, **hub)
    if (
        architecture == OPENAI
        and not arguments.get("class_cond")
        and any("label_emb.weight" in s for s in checkpoint.states.values())
    ):
        raise CheckpointError(
            f"{where['filename']} is class-conditional",
            expected="an unconditional UNet",
            received="label_emb.weight",
            remedy="say kwargs class_cond = the number of classes, and diffusion null_class = the class that stands for none; "
            "without such a class use the unconditional model",
        )
    del checkpoint
    provenance = Provenance(
        **where,
        sha256=sha256,
        loader="checkpoint",
        architecture=architecture,
        kwargs=arguments,
        licence=told["licence"] or place.licence(),
    )
    module = load_network(provenance, 2, Sources(hub=reader))
    channels, side = _images(architecture, arguments)
    pinned = provenance.model_copy(update={"tensors": tensors_digest(module)})
    return Denoiser(module, pinned, settings, channels, side)


def _images(architecture: str, kwargs: Mapping[str, Any]) -> tuple[int | None, tuple[int, int] | None]:
    """Channels and size of the images that one of our denoisers takes."""
    usual = {OPENAI: 3, "small_unet": 1, "dncnn": 3}.get(architecture)
    side = kwargs.get("image_size") if architecture == OPENAI else None
    return (None if usual is None else kwargs.get("image_channels", usual)), (side, side) if side else None


def _of_plain(architecture: str, kwargs: Mapping[str, Any], stated: Any, who: str) -> Diffusion:
    """What a user states about a file that says nothing itself."""
    if architecture != OPENAI:
        return stated_diffusion(stated, who)
    learned = bool(kwargs.get("learn_sigma", False))
    if isinstance(stated, Mapping):
        if stated.get("learned_variance", learned) != learned:
            raise InputError(
                "Two statements about learned variances",
                expected=f"learned_variance {learned}, as learn_sigma of the network",
                received=str(stated["learned_variance"]),
                remedy="leave learned_variance out",
            )
        stated = {**stated, "learned_variance": learned}
    found = stated_diffusion(stated, who, (*STATED, "rescale_timesteps"))
    _check_class(kwargs.get("class_cond"), found.null_class, who)
    return found


def _of_diffusers(place: Place, folder: UNetFolder, stated: Any, licence: str | None, hub: Hub) -> Denoiser:
    if folder.diffusion is not None:
        diffusion = with_statements(folder.diffusion, stated, _FREE, folder.title)
    else:
        said = {**stated, "learned_variance": folder.learned_variance} if isinstance(stated, Mapping) else stated
        diffusion = stated_diffusion(said, f"{folder.title}, which has no scheduler_config.json,")
    _check_class(folder.classes, diffusion.null_class, folder.title)
    sha256, _ = read_weights(folder.weights, None, lambda shard: folder.beside(place, shard))
    provenance = Provenance(
        **folder.where,
        sha256=sha256,
        loader="diffusers",
        architecture=ARCHITECTURE,
        kwargs=folder.kwargs,
        licence=licence,
    )
    module = load_network(provenance, 2, Sources(hub=hub))
    pinned = provenance.model_copy(update={"tensors": tensors_digest(module)})
    return Denoiser(module, pinned, diffusion, folder.channels, folder.side)


def _check_class(classes: int | None, null_class: int | None, who: str) -> None:
    """A network that wants a class gets a stated one; any other gets none."""
    if classes is None and null_class is not None:
        raise CheckpointError(
            f"{who} takes no class", expected="no null_class", received=str(null_class), remedy="leave null_class out"
        )
    if classes is not None and (null_class is None or null_class >= classes):
        raise CheckpointError(
            f"{who} is class-conditional",
            expected=f"null_class, the number (below {classes}) of the class that stands for none",
            received=str(null_class),
            remedy="diffusion = { null_class = ... } as it was trained; without such a class use an unconditional network",
        )


def _load_unet(provenance: Provenance, num_classes: int, sources: Sources) -> nn.Module:
    parse = read_pinned(provenance, sources)
    module = shared(provenance, num_classes, lambda: renamed(parse()))
    check_tensors(provenance, tensors_digest(module))
    return module


LOADERS["diffusers"] = _load_unet
