"""Architectures by name: what a `config.json` or a spec file may ask for.

Only names registered here, timm's own, torchvision's (`torchvision:resnet18`), or those that an installed package announces are
ever built; a checkpoint cannot bring code along. A user adds a module in one line, `register_architecture("my_net", MyNet)`; a
package announces one in its pyproject.toml, and whoever installs the package can load what is built of it:

    [project.entry-points."rsrouter.architectures"]
    my_net = "my_package.nets:MyNet"
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from typing import Any

import torch
from torch import nn

from rsrouter.core.errors import ArchitectureError, CheckpointError
from rsrouter.experts.cifar_resnet import DEPTHS, CifarResNet
from rsrouter.experts.denoisers import DnCNN, SmallUNet
from rsrouter.experts.diffusers_files import ARCHITECTURE as DIFFUSERS_UNET
from rsrouter.experts.diffusers_files import unet2d
from rsrouter.experts.openai_unet import OpenAIUNet
from rsrouter.experts.papers import DenseNet40, LeNet
from rsrouter.experts.small_cnn import SmallCNN
from rsrouter.experts.small_resnet import SmallResNet
from rsrouter.experts.structure import ORIGIN, structure_of
from rsrouter.experts.tensors import canonical
from rsrouter.process import usual_settings

_ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {}
_INPUT_SHAPES: dict[str, tuple[int, int, int]] = {}
_DENOISERS: set[str] = set()
#: group of entry points under which packages announce architectures, and which distribution announced what
ENTRY_POINTS = "rsrouter.architectures"
_PACKAGES: dict[str, str] = {}

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
    package: str | None = None,
) -> Callable[..., nn.Module]:
    """Makes `build(num_classes=..., **kwargs)` available under `name`; returns `build`.

    Args:
        name: what configs and specs write as `architecture`.
        build: a class or function that returns a module giving logits `(B, num_classes)`; it is called with `num_classes`
            where it takes it. The name stands for what it computes: give a changed class another name.
        input_shape: `(C, H, W)` if the architecture takes only one.
        denoiser: it maps images to images and is built without `num_classes`.
        package: the distribution whose networks `build` makes, where it is not the one that `build` lies in.

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
    if package is not None:
        _PACKAGES[name] = package
    return build


#: before the names of torchvision's models
TORCHVISION = "torchvision:"


def _torchvision(model: str, num_classes: int, **kwargs: Any) -> nn.Module:
    from torchvision import models

    built: nn.Module = models.get_model(model, weights=None, num_classes=num_classes, **kwargs)
    return built


@cache
def _announced(name: str) -> metadata.EntryPoints:
    return metadata.entry_points(group=ENTRY_POINTS, name=name)


@cache
def _distribution_of(module: str) -> str:
    """The installed package that holds a module, or the module's own name: a search through the files of every package."""
    return (metadata.packages_distributions().get(module) or [module])[0]


def _find(name: str) -> Callable[..., nn.Module] | None:
    """What builds `name`, looked for among the announcements of installed packages where it is not registered yet."""
    if name.startswith(TORCHVISION) and name not in _ARCHITECTURES:
        from torchvision import models

        plain = name.removeprefix(TORCHVISION)
        if plain not in models.list_models(module=models):
            return None
        register_architecture(name, partial(_torchvision, plain))
    if name not in _ARCHITECTURES:
        for announced in _announced(name):
            build = announced.load()
            if name not in _ARCHITECTURES:  # importing may have registered it, with its input shape
                register_architecture(name, build)
            _PACKAGES[name] = announced.dist.name if announced.dist else ""
    return _ARCHITECTURES.get(name)


def package_of(name: str) -> str | None:
    """The distribution that builds an architecture: None for one of ours or unknown here, `"timm"`, or a user's package; the
    name of the module where no installed package holds it.

    >>> package_of("small_resnet"), package_of("resnet18")
    (None, 'timm')
    """
    build = _find(name)
    if build is None:
        return "timm" if _timm_model(name) is not None else None
    if _is_own(build):
        return _PACKAGES.get(name)
    module = str(getattr(build.func if isinstance(build, partial) else build, "__module__", "")).split(".")[0]
    return _PACKAGES.get(name) or _distribution_of(module)


def architectures() -> tuple[str, ...]:
    """Registered names, sorted (timm's own names are accepted as well)."""
    return tuple(sorted(_ARCHITECTURES))


def is_denoiser(name: str) -> bool:
    """Whether `name` maps images to images."""
    return _find(name) is not None and name in _DENOISERS


def input_shape_of(name: str) -> tuple[int, int, int] | None:
    """`(C, H, W)` where the architecture takes only one, else None."""
    return _INPUT_SHAPES.get(name) if _find(name) is not None else None


def _timm_model(name: str) -> str | None:
    """timm's name of a model (`timm/` before it is allowed), or None. timm is imported only for unregistered names."""
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return None
    import timm

    plain = name.removeprefix("timm/")
    return plain if timm.is_model(plain.split(".")[0]) else None


def canonical_name(name: str) -> str:
    """The one name of an architecture: `timm/resnet18.a1_in1k` is `resnet18`.

    >>> canonical_name("timm/resnet18.a1_in1k"), canonical_name("small_resnet")
    ('resnet18', 'small_resnet')
    """
    return name if _find(name) is not None else name.removeprefix("timm/").split(".")[0]


def _takes_classes(name: str) -> bool:
    """Whether the constructor is given `num_classes`; not a denoiser's, nor that of a class made for one task."""
    if name in _DENOISERS:
        return False
    build = _find(name)
    if build is None:
        return True
    try:
        taken = inspect.signature(build).parameters
    except (TypeError, ValueError):
        return True
    return "num_classes" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())


def known_architecture(name: str) -> bool:
    """Whether `build_architecture` can build `name`: registered here, or a model of timm."""
    return _find(name) is not None or _timm_model(name) is not None


def _as_stored(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back: a module built from its stored description has the same attributes."""
    if isinstance(value, Mapping):
        return {key: _as_stored(v) for key, v in value.items()}
    return [_as_stored(v) for v in value] if isinstance(value, list | tuple) else value


@usual_settings()
def build_architecture(name: str, num_classes: int | None, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
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
    module = _build(name, num_classes, kwargs)
    if find_architecture(module) is not None:  # built by another name, and as that one left it
        return module
    made = {"num_classes": num_classes, **_as_stored(dict(kwargs or {}))}
    # how it was built travels with the module, so that a router can be written down and rebuilt
    setattr(module, ORIGIN, Origin(canonical_name(name), made, _structure(name, made, module)))
    return module


def build_skeleton(name: str, num_classes: int | None, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """As `build_architecture`, on the meta device: names and shapes without any memory for values.

    Raises:
        CheckpointError: as `build_architecture`, and where a constructor needs real tensors.

    >>> build_skeleton("lenet", 10).fc1.weight.is_meta
    True
    """
    with usual_settings(), torch.device("meta"):
        return _build(name, num_classes, kwargs)


def _build(name: str, num_classes: int | None, kwargs: Mapping[str, Any] | None) -> nn.Module:
    arguments: dict[str, Any] = _as_stored(dict(kwargs or {}))
    build = _find(name)
    if build is None:
        timm_name = _timm_model(name)
        if timm_name is None:
            raise ArchitectureError(
                f"Unknown architecture {name!r}",
                expected=f"one of {list(architectures())} or a timm model",
                received=repr(name),
                remedy="install the package that announces it, or say --import MODULE for a module that registers it (in Python: "
                "import that module, or rsrouter.register_architecture(name, YourModule), before loading)",
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
    if _takes_classes(name):
        arguments["num_classes"] = num_classes
    try:
        module: nn.Module = build(**arguments)
    except ArchitectureError:  # a library that is missing
        raise
    except Exception as error:  # a constructor that gets what it was not made for may raise anything
        accepted = "" if isinstance(build, partial) else str(inspect.signature(build))
        raise ArchitectureError(
            f"Architecture {name!r} does not take these arguments",
            expected=f"its constructor's arguments {accepted}".strip(),
            received=str(dict(kwargs or {})),
            remedy=f"{type(error).__name__}: {error}",
        ) from error
    return module


@dataclass(frozen=True)
class Origin:
    """How a module was built: name and arguments, and its structure then (empty where two builds differ)."""

    architecture: str
    kwargs: dict[str, Any]
    structure: str


def _is_own(build: Callable[..., nn.Module]) -> bool:
    made_by = build.func if isinstance(build, partial) else build
    return str(getattr(made_by, "__module__", "")).split(".")[0] == "rsrouter"


_STRUCTURES: dict[bytes, str] = {}


def _structure(name: str, made: dict[str, Any], module: nn.Module) -> str:
    """The structure that `name` with these arguments always has; "" where a user's constructor makes it anew each time
    (a random mask that is not a buffer), so that the name does not tell which one it is."""
    structure = structure_of(module).digest
    if name not in _ARCHITECTURES or _is_own(_ARCHITECTURES[name]):
        return structure
    key = canonical([name, made])
    if key not in _STRUCTURES:
        with torch.random.fork_rng(devices=[]):
            again = _ARCHITECTURES[name](**{k: v for k, v in made.items() if k != "num_classes" or _takes_classes(name)})
        _STRUCTURES[key] = structure if structure_of(again).digest == structure else ""
    return structure if _STRUCTURES[key] == structure else ""


def find_architecture(module: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a module made by `build_architecture` whose structure is as it was built; None for any other.

    >>> module = build_architecture("small_resnet", 3)
    >>> find_architecture(module)
    ('small_resnet', {'num_classes': 3})
    >>> module.fc = nn.Identity()
    >>> find_architecture(module) is None
    True
    """
    origin = getattr(module, ORIGIN, None)
    if not isinstance(origin, Origin) or not origin.structure or structure_of(module).digest != origin.structure:
        return None
    return origin.architecture, dict(origin.kwargs)


def _register_own() -> None:
    register_architecture("small_cnn", SmallCNN)
    register_architecture("small_resnet", SmallResNet)
    for depth in DEPTHS:
        register_architecture(f"cifar_resnet{depth}", partial(CifarResNet, depth=depth), input_shape=(3, 32, 32))
    register_architecture("lenet", LeNet, input_shape=(1, 28, 28))
    register_architecture("densenet40", DenseNet40, input_shape=(3, 32, 32))
    register_architecture("dncnn", DnCNN, denoiser=True)
    register_architecture("small_unet", SmallUNet, denoiser=True)
    register_architecture("openai_unet", OpenAIUNet, denoiser=True)
    register_architecture(DIFFUSERS_UNET, unet2d, denoiser=True, package="diffusers")


_register_own()
