"""Modules as data: a registered architecture, or a plain stack of torch.nn layers, written to JSON and rebuilt."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from rsrouter.core.errors import CheckpointError
from rsrouter.experts.registry import architectures, build_architecture, find_architecture

#: torch.nn layers that are rebuilt from their constructor's arguments (all of which they keep as attributes)
_LAYERS = (
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv2d",
    "Dropout",
    "ELU",
    "Flatten",
    "GELU",
    "Hardswish",
    "Identity",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Tanh",
)
_SKIPPED = {"device", "dtype", "_weight"}


def describe_module(module: nn.Module) -> dict[str, Any]:
    """JSON-ready description from which `build_module` makes the same structure.

    Raises:
        CheckpointError: a module that is neither registered nor a stack of known torch.nn layers.
    """
    if isinstance(module, nn.Sequential) and type(module) is nn.Sequential:
        return {"layer": "Sequential", "children": [describe_module(child) for child in module]}
    name = type(module).__name__
    if name in _LAYERS and type(module) is getattr(nn, name):
        kwargs: dict[str, Any] = {}
        for parameter in inspect.signature(type(module).__init__).parameters.values():
            if parameter.name in {"self", *_SKIPPED} or parameter.kind is parameter.VAR_KEYWORD:
                continue
            value = getattr(module, parameter.name, None)
            if parameter.name == "bias":
                value = value is not None
            kwargs[parameter.name] = list(value) if isinstance(value, tuple) else value
        return {"layer": name, "kwargs": kwargs}
    found = find_architecture(module)
    if found is not None:
        return {"architecture": found[0], "kwargs": found[1]}
    raise CheckpointError(
        f"A {name} cannot be written down",
        expected="a registered architecture or a stack of torch.nn layers",
        received=name,
        remedy=f"rsrouter.register_architecture('my_{name.lower()}', {name}) and build it through "
        "rsrouter.build_architecture, before saving and before loading",
    )


def build_module(description: dict[str, Any]) -> nn.Module:
    """The structure `describe_module` wrote, freshly initialised. Only known layers and registered names are built.

    Raises:
        CheckpointError: anything else.
    """
    if "architecture" in description:
        kwargs = dict(description.get("kwargs", {}))
        return build_architecture(str(description["architecture"]), kwargs.pop("num_classes"), kwargs)
    layer = description.get("layer")
    if layer == "Sequential":
        return nn.Sequential(*(build_module(child) for child in description.get("children", [])))
    if layer not in _LAYERS:
        raise CheckpointError(
            "Unknown layer in a saved router",
            expected=f"one of {('Sequential', *_LAYERS)} or {architectures()}",
            received=repr(layer),
            remedy="register the architecture, or update rsrouter",
        )
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in description.get("kwargs", {}).items()}
    try:
        built: nn.Module = getattr(nn, layer)(**kwargs)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"Layer {layer} does not take these arguments",
            expected="its constructor's arguments",
            received=str(kwargs),
            remedy=str(error),
        ) from error
    return built
