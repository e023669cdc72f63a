"""Architectures by name: what a `config.json` or a spec file may ask for.

Only names registered here, or timm's own, are ever built; a checkpoint cannot bring code along. A user adds a
module in one line: `register_architecture("my_net", MyNet)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from rsrouter.core.errors import ArchitectureError, CheckpointError
from rsrouter.experts.cifar_resnet import DEPTHS, CifarResNet
from rsrouter.experts.denoisers import DnCNN, SmallUNet
from rsrouter.experts.small_resnet import SmallResNet

_ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {}
_INPUT_SHAPES: dict[str, tuple[int, int, int]] = {}
_DENOISERS: set[str] = set()

#: timm arguments that make it read other files or weights; a config.json may not set them
_TIMM_FORBIDDEN = frozenset(
    {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "scriptable",
        "exportable",
        "no_jit",
        "features_only",
    }
)


def register_architecture(
    name: str,
    build: Callable[..., nn.Module],
    *,
    input_shape: tuple[int, int, int] | None = None,
    denoiser: bool = False,
) -> Callable[..., nn.Module]:
    """Makes `build(num_classes=..., **kwargs)` available under `name`; returns `build`.

    Args:
        name: what configs and specs write as `architecture`.
        build: a class or function that returns a module giving logits `(B, num_classes)`.
        input_shape: `(C, H, W)` if the architecture takes only one.
        denoiser: it maps images to images and is built without `num_classes`.

    Raises:
        CheckpointError: the name is taken by something else.
    """
    if _ARCHITECTURES.get(name, build) is not build:
        raise CheckpointError(
            f"Architecture {name!r} is taken",
            expected="an unused name",
            received=repr(_ARCHITECTURES[name]),
            remedy="prefix the name with your project's",
        )
    _ARCHITECTURES[name] = build
    if input_shape is not None:
        _INPUT_SHAPES[name] = input_shape
    if denoiser:
        _DENOISERS.add(name)
    return build


def architectures() -> tuple[str, ...]:
    """Registered names, sorted (timm's own names are accepted as well)."""
    return tuple(sorted(_ARCHITECTURES))


def is_denoiser(name: str) -> bool:
    """Whether `name` maps images to images."""
    return name in _DENOISERS


def input_shape_of(name: str) -> tuple[int, int, int] | None:
    """`(C, H, W)` where the architecture takes only one, else None."""
    return _INPUT_SHAPES.get(name)


def _timm_model(name: str) -> str | None:
    """timm's name of a model (`timm/` before it is allowed), or None. timm is imported only for unregistered names."""
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return None
    import timm

    plain = name.removeprefix("timm/")
    return plain if timm.is_model(plain.split(".")[0]) else None


def known_architecture(name: str) -> bool:
    """Whether `build_architecture` can build `name`: registered here, or a model of timm."""
    return name in _ARCHITECTURES or _timm_model(name) is not None


def _as_stored(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back: a module built from its stored description has the same attributes."""
    if isinstance(value, Mapping):
        return {key: _as_stored(v) for key, v in value.items()}
    return [_as_stored(v) for v in value] if isinstance(value, list | tuple) else value


def build_architecture(name: str, num_classes: int, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """A freshly initialised module of a registered architecture or of timm.

    Args:
        name: registered here, or one of timm's models.
        num_classes: width of the logits.
        kwargs: passed to the architecture, tuples as lists; arguments that would make timm read other files are refused.

    Returns:
        A module from images `(B, C, H, W)` to logits `(B, num_classes)` (a denoiser: to images).

    Raises:
        CheckpointError: unknown name, or keyword arguments that do not fit.
    """
    arguments: dict[str, Any] = _as_stored(dict(kwargs or {}))
    build = _ARCHITECTURES.get(name)
    if build is None:
        timm_name = _timm_model(name)
        if timm_name is None:
            raise ArchitectureError(
                f"Unknown architecture {name!r}",
                expected=f"one of {list(architectures())} or a timm model",
                received=repr(name),
                remedy="rsrouter.register_architecture(name, YourModule) before loading",
            )
        import timm

        if bad := sorted(_TIMM_FORBIDDEN & arguments.keys()):
            raise CheckpointError(
                f"Architecture {name!r} may not set these arguments",
                expected="arguments of the model itself",
                received=str(bad),
                remedy="remove them; weights come only from the pinned file",
            )
        build = partial(timm.create_model, timm_name.split(".")[0], pretrained=False)
    if name not in _DENOISERS:
        arguments["num_classes"] = num_classes
    try:
        module = build(**arguments)
    except (TypeError, ValueError) as error:
        accepted = "" if isinstance(build, partial) else str(inspect.signature(build))
        raise ArchitectureError(
            f"Architecture {name!r} does not take these arguments",
            expected=f"its constructor's arguments {accepted}".strip(),
            received=str(dict(kwargs or {})),
            remedy=str(error),
        ) from error
    # how it was built travels with the module, so that a router can be written down and rebuilt
    module._rsrouter_architecture = (name, {"num_classes": num_classes, **_as_stored(dict(kwargs or {}))})  # type: ignore[assignment]
    return module


def find_architecture(module: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a module made by `build_architecture`; None for any other."""
    found: tuple[str, dict[str, Any]] | None = getattr(module, "_rsrouter_architecture", None)
    return found


def _register_own() -> None:
    register_architecture("small_resnet", SmallResNet)
    for depth in DEPTHS:
        register_architecture(f"cifar_resnet{depth}", partial(CifarResNet, depth=depth), input_shape=(3, 32, 32))
    register_architecture("dncnn", DnCNN, denoiser=True)
    register_architecture("small_unet", SmallUNet, denoiser=True)


_register_own()
