"""Architectures by name: what a `config.json` or a spec file may ask for.

Only names registered here (or timm's own) are ever built; a checkpoint cannot bring code along. A user adds a
module in one line: `register_architecture("my_net", MyNet)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.small_resnet import SmallResNet

_ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {}


def register_architecture(name: str, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Makes `build(num_classes=..., **kwargs)` available under `name`; returns `build`.

    Raises:
        CheckpointError: the name is taken by something else.
    """
    if _ARCHITECTURES.get(name, build) is not build:
        raise CheckpointError(f"Architecture {name!r} is taken", expected="an unused name",
                              received=repr(_ARCHITECTURES[name]), remedy="prefix the name with your project's")
    _ARCHITECTURES[name] = build
    return build


def architectures() -> tuple[str, ...]:
    """Registered names, sorted."""
    return tuple(sorted(_ARCHITECTURES))


def build_architecture(name: str, num_classes: int, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """A freshly initialised module of a registered architecture.

    Raises:
        CheckpointError: unknown name, or keyword arguments that do not fit.
    """
    if name not in _ARCHITECTURES:
        raise CheckpointError(f"Unknown architecture {name!r}", expected=f"one of {list(architectures())}", received=repr(name),
                              remedy="rsrouter.register_architecture(name, YourModule) before loading")
    try:
        return _ARCHITECTURES[name](num_classes=num_classes, **dict(kwargs or {}))
    except TypeError as error:
        raise CheckpointError(f"Architecture {name!r} does not take these arguments", expected="its constructor's arguments",
                              received=str(dict(kwargs or {})), remedy=str(error)) from error


register_architecture("small_resnet", SmallResNet)
